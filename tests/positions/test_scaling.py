"""Rotary scalings: golden values, ends, identities, hand-made tables, and transformers' own."""

import inspect
import math
from itertools import pairwise

import pytest
import torch

from zoo.positions import scaling
from zoo.positions.rope import apply_rope, inverse_frequencies
from zoo.positions.scaling import (
    KeepFirst,
    current_factor,
    dropped,
    dynamic_ntk,
    dynamic_yarn,
    linear,
    llama3,
    longrope,
    ntk_aware,
    ntk_by_parts,
    temperature,
    yarn,
)

THETA = inverse_frequencies(128)
LAMBDAS = [1 + 0.25 * i for i in range(64)]


def base_of(inv_freq: tuple[float, ...]) -> float:
    return inv_freq[1] ** (-len(inv_freq))


def test_linear_is_interpolation_of_the_positions():
    inv_freq, factor = linear(width=16, factor=4)
    x = torch.randn(1, 12, 2, 16, dtype=torch.float64)
    quarter = torch.arange(12, dtype=torch.float64) / 4
    expected = apply_rope(x, inverse_frequencies(16), positions=quarter)
    torch.testing.assert_close(apply_rope(x, inv_freq), expected, rtol=1e-12, atol=1e-12)
    assert (inv_freq[0], factor) == (0.25, 1.0)


@pytest.mark.parametrize(
    ("s", "base"), [(2, 20221.26), (4, 40889.94), (8, 82684.62), (16, 167198.74), (32, 338096.95)]
)
def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest(s, base):
    inv_freq, factor = ntk_aware(width=128, factor=s)
    assert base_of(inv_freq) == pytest.approx(base, abs=0.005)
    assert (inv_freq[0], factor) == (1.0, 1.0)
    assert inv_freq[-1] == pytest.approx(THETA[-1] / s, rel=1e-12)


def test_dynamic_ntk_is_plain_up_to_the_window_and_switches_strictly_above():
    for length in (1, 4095, 4096):
        given = dynamic_ntk(width=128, factor=2, original_length=4096, length=length)
        assert given == (THETA, 1.0)
    above = dynamic_ntk(width=128, factor=2, original_length=4096, length=4097)
    assert above[0][-1] < THETA[-1]
    doubled, _ = dynamic_ntk(width=128, factor=2, original_length=4096, length=8192)
    assert base_of(doubled) == pytest.approx(30527.74, abs=0.005)


def test_the_papers_dynamic_factor_is_the_length_over_the_window():
    assert current_factor(12288, 4096) == 3
    assert current_factor(12288, 4096, factor=2) == 5
    assert current_factor(1000, 1000, factor=1.1) == 1  # to the last bit
    paper = dynamic_ntk(width=64, original_length=100, length=250)
    assert paper == ntk_aware(width=64, factor=2.5)
    assert dynamic_yarn(width=64, original_length=512, length=2048) == yarn(
        width=64, factor=4, original_length=512
    )
    assert dynamic_yarn(width=64, original_length=512, length=512) == (inverse_frequencies(64), 1.0)


def test_the_papers_ramp_is_linear_in_the_turns_of_the_trained_window():
    """Width 8, base 16: theta = 1, 1/2, 1/4, 1/8; in L = 50 the first turns r = 7.96 times."""
    inv_freq, factor = ntk_by_parts(
        width=8, base=16, factor=4, original_length=50, beta_fast=7, beta_slow=1.5
    )
    r = 50 / (2 * math.pi)
    gamma = [1, (r / 2 - 1.5) / 5.5, (r / 4 - 1.5) / 5.5, 0]
    expected = [f * ((1 - g) / 4 + g) for f, g in zip((1, 0.5, 0.25, 0.125), gamma, strict=True)]
    assert inv_freq == pytest.approx(expected, rel=1e-12)
    assert factor == 1


def test_the_codes_ramp_is_linear_in_the_pair():
    """The same pairs: r = 7 and 1.5 at pairs log2(r_0/7) and log2(r_0/1.5), rounded to 0 and 3."""
    given = {"width": 8, "base": 16, "original_length": 50, "factor": 4}
    ends = {"beta_fast": 7, "beta_slow": 1.5, "ramp": "code"}
    theta = (1, 0.5, 0.25, 0.125)
    inv_freq, _ = ntk_by_parts(**given, **ends)
    gamma = [1, 2 / 3, 1 / 3, 0]
    expected = [f * ((1 - g) / 4 + g) for f, g in zip(theta, gamma, strict=True)]
    assert inv_freq == pytest.approx(expected, rel=1e-12)
    inv_freq, _ = ntk_by_parts(**given, **ends, truncate=False)
    first, last = math.log2(25 / math.pi / 7), math.log2(25 / math.pi / 1.5)
    gamma = [1, 1 - (1 - first) / (last - first), 1 - (2 - first) / (last - first), 0]
    expected = [f * ((1 - g) / 4 + g) for f, g in zip(theta, gamma, strict=True)]
    assert inv_freq == pytest.approx(expected, rel=1e-12)


def test_the_codes_ramp_starts_at_the_first_pair_at_the_earliest():
    """In 64 tokens no pair of Llama's turns 32 times; once, at pair 16.1."""
    inv_freq, _ = yarn(width=128, factor=4, original_length=64)
    for i, (got, f) in enumerate(zip(inv_freq, THETA, strict=True)):
        gamma = max(1 - i / 17, 0)
        assert got == pytest.approx(f * ((1 - gamma) / 4 + gamma), rel=1e-12)
    tiny, _ = yarn(width=128, factor=4, original_length=4)  # nor once in 4: all but the first slow
    assert tiny == (1.0, *(f / 4 for f in THETA[1:]))


@pytest.mark.parametrize(("window", "first", "last"), [(4096, 20, 46), (2048, 16, 41)])
def test_the_codes_ramp_of_llama_runs_between_the_published_pairs(window, first, last):
    inv_freq, _ = yarn(width=128, factor=16, original_length=window)
    ratio = [f / theta for f, theta in zip(inv_freq, THETA, strict=True)]
    assert ratio[first] == 1 > ratio[first + 1]
    assert ratio[last - 1] > 0.07 > ratio[last] == pytest.approx(1 / 16, rel=1e-12)


def test_yarn_has_the_published_frequencies_and_temperatures():
    inv_freq, factor = yarn(width=128, factor=16, original_length=4096)
    golden = {20: 0.056234, 21: 0.046941, 33: 0.0046, 45: 0.000152, 46: 0.000083, 63: 0.000007}
    for pair, value in golden.items():
        assert inv_freq[pair] == pytest.approx(value, abs=6e-7)
    assert factor == pytest.approx(1.277259, abs=1e-6)
    assert factor**2 == pytest.approx(1.631390, abs=1e-6)
    assert temperature(32) == pytest.approx(1.346574, abs=1e-6)
    assert temperature(4) == pytest.approx(1.138629, abs=1e-6)
    assert temperature(1) == 1


def test_harmonic_mixing_is_linear_in_the_wavelength():
    arith, _ = yarn(width=128, factor=16, original_length=4096)
    harmonic, _ = yarn(width=128, factor=16, original_length=4096, mix="harmonic")
    gamma = 1 - 13 / 26  # pair 33 of the ramp from 20 to 46
    assert arith[33] == pytest.approx(THETA[33] * ((1 - gamma) / 16 + gamma))
    assert 1 / harmonic[33] == pytest.approx(((1 - gamma) * 16 + gamma) / THETA[33])
    assert harmonic[:21] == arith[:21]
    assert harmonic[46:] == arith[46:]


def test_deepseek_divides_the_two_temperatures():
    both = {"width": 64, "factor": 40, "original_length": 4096}
    assert yarn(**both, mscale=0.707, mscale_all_dim=0.707)[1] == 1
    assert yarn(**both, mscale=0.707)[1] == pytest.approx(0.0707 * math.log(40) + 1)
    assert yarn(**both, mscale=1, mscale_all_dim=0.5)[1] == temperature(40) / temperature(40, 0.5)


def test_longrope_rescales_each_pair_strictly_above_the_window():
    given = {"width": 128, "factor": 32, "original_length": 4096, "long_factors": LAMBDAS}
    rescaled = tuple(f / lam for f, lam in zip(THETA, LAMBDAS, strict=True))
    assert longrope(**given)[0] == longrope(**given, length=4097)[0] == rescaled
    assert longrope(**given, length=4096)[0] == THETA
    short = longrope(**given, short_factors=[2.0] * 64, length=4096)[0]
    assert short == tuple(f / 2 for f in THETA)
    assert longrope(**given)[1] == pytest.approx(1.190238, abs=1e-6)
    assert longrope(**given, magnitude="yarn")[1] == temperature(32)


def test_longrope_leaves_the_first_positions_as_they_were():
    inv_freq, _ = longrope(width=128, factor=8, original_length=64, long_factors=LAMBDAS)
    x = torch.randn(1, 20, 1, 128, dtype=torch.float64)
    for start in (0, 9):
        rows = KeepFirst(inv_freq, THETA, 12)(torch.arange(start, start + 20))
        y, cut = apply_rope(x, rows, start), 12 - start
        assert torch.equal(y[:, :cut], apply_rope(x, THETA, start)[:, :cut])
        assert torch.equal(y[:, cut:], apply_rope(x, inv_freq, start)[:, cut:])


def test_llama3_keeps_divides_and_blends_by_wavelength():
    inv_freq, factor = llama3(width=128)
    theta = inverse_frequencies(128, 5e5)
    for got, f in zip(inv_freq, theta, strict=True):
        turns = 8192 * f / (2 * math.pi)
        smooth = (turns - 1) / 3
        expected = f if turns > 4 else f / 8 if turns < 1 else (1 - smooth) * f / 8 + smooth * f
        assert got == pytest.approx(expected, rel=1e-12)
    assert inv_freq[28] == theta[28]
    assert inv_freq[32] == pytest.approx(0.00052485, abs=1e-8)
    assert inv_freq[35] == theta[35] / 8
    assert factor == 1


EVERY = {
    linear: {},
    ntk_aware: {},
    dynamic_ntk: {"length": 4096},
    ntk_by_parts: {},
    yarn: {},
    dynamic_yarn: {"length": 4096},
    longrope: {"long_factors": [1.0] * 64},
    llama3: {},
}
BY_PARTS = [
    {"ramp": ramp, "mix": mix, "truncate": truncate}
    for ramp in ("paper", "code")
    for mix in ("arith", "harmonic")
    for truncate in (True, False)
    if truncate or ramp == "code"
]


def scaled(scale, **given):
    """The scaling of those of the arguments that it takes."""
    takes = inspect.signature(scale).parameters
    return scale(**{name: value for name, value in given.items() if name in takes})


@pytest.mark.parametrize("scale", EVERY)
def test_factor_one_is_the_identity(scale):
    given = {"width": 128, "base": 10000.0, "factor": 1, "original_length": 4096}
    inv_freq, factor = scaled(scale, **given, **EVERY[scale])
    assert inv_freq == pytest.approx(THETA, rel=1e-15)
    assert factor == 1


def test_dropped_positions_leave_every_token_where_it_is():
    inv_freq, factor = dropped(width=64)
    x = torch.randn(1, 20, 2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply_rope(x, inv_freq, 2**20, attention_factor=factor), x)


@pytest.mark.parametrize("scale", EVERY)
def test_scaled_scores_depend_on_the_distance_alone_even_a_million_tokens_in(scale):
    inv_freq, factor = scaled(scale, width=128, factor=4, original_length=512, **EVERY[scale])
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 20, 1, 128, dtype=torch.float64, generator=generator)

    def scores(start: int) -> torch.Tensor:
        at = (apply_rope(x, inv_freq, start, attention_factor=factor) for x in (q, k))
        return torch.einsum("bihd,bjhd->ij", *at)

    torch.testing.assert_close(scores(2**20), scores(0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("options", BY_PARTS)
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("window", [3, 128, 4096, 10**9])
def test_frequencies_fall_and_lie_between_interpolated_and_plain(options, width, window):
    inv_freq, _ = ntk_by_parts(width=width, factor=8, original_length=window, **options)
    theta = inverse_frequencies(width)
    assert all(a > b for a, b in pairwise(inv_freq))
    assert all(f / 8 <= g * (1 + 1e-12) for f, g in zip(theta, inv_freq, strict=True))
    assert all(g <= f for f, g in zip(theta, inv_freq, strict=True))


def test_a_larger_factor_turns_no_pair_faster():
    for scale in (linear, ntk_aware, ntk_by_parts, yarn, llama3):
        given = {"width": 64, "original_length": 512}
        table = [scaled(scale, factor=s, **given)[0] for s in (1, 1.5, 2, 8, 64)]
        for small, large in pairwise(table):
            assert all(a >= b for a, b in zip(small, large, strict=True)), scale
    texts = [
        dynamic_ntk(width=64, original_length=512, length=n)[0] for n in (9, 512, 513, 700, 9000)
    ]
    assert all(a >= b for s, t in pairwise(texts) for a, b in zip(s, t, strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"factor": 0.5}, "factor=0.5: must be at least 1"),
        ({"factor": math.nan}, "factor=nan"),
        ({"original_length": None}, "original_length=null: must be the trained length"),
        ({"original_length": 0}, "original_length=0"),
        ({"base": 1.0}, "base=1.0"),
        ({"width": 127}, "head_width=127: must be even"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(wrong, message):
    needs_no_window = (linear, ntk_aware) if "original_length" in wrong else ()
    for scale in [scale for scale in EVERY if scale not in needs_no_window]:
        given = {"width": 128, "base": 10000.0, "factor": 2, "original_length": 4096}
        with pytest.raises(ValueError, match=message) as error:
            scaled(scale, **(given | EVERY[scale] | wrong))
        assert "\n" not in str(error.value), scale


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dynamic_ntk(width=64, original_length=512),
            "length=None: must be the number of tokens read",
        ),
        (lambda: ntk_aware(width=2, factor=2), "width=2"),
        (lambda: yarn(width=64, factor=2, original_length=64, beta_fast=1), "beta_slow=1"),
        (
            lambda: ntk_by_parts(width=64, factor=2, original_length=64, truncate=False),
            "truncate=false: rounds the ends of ramp=code alone",
        ),
        (lambda: yarn(width=64, factor=2, original_length=64, mix="arit"), "Did you mean 'arith'"),
        (lambda: yarn(width=64, factor=2, original_length=64, ramp="pap"), "Did you mean 'paper'"),
        (
            lambda: longrope(width=64, factor=2, original_length=64, long_factors=[1.0] * 31),
            "must be 32 positive numbers, one for each pair",
        ),
        (
            lambda: longrope(width=64, factor=2, original_length=64, long_factors=[0.0] * 32),
            "must be 32 positive numbers",
        ),
    ],
)
def test_wrong_options_are_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


ORACLES = [
    ("linear", {"factor": 4.0}, linear, {"factor": 4}, None),
    ("dynamic", {"factor": 2.0}, dynamic_ntk, {"factor": 2, "length": 4096}, 4096),
    ("dynamic", {"factor": 2.0}, dynamic_ntk, {"factor": 2, "length": 9000}, 9000),
    ("yarn", {"factor": 16.0}, yarn, {"factor": 16}, None),
    (
        "yarn",
        {"factor": 4.0, "truncate": False, "beta_fast": 128, "beta_slow": 2},
        yarn,
        {"factor": 4, "truncate": False, "beta_fast": 128, "beta_slow": 2},
        None,
    ),
    (
        "yarn",
        {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
        yarn,
        {"factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707},
        None,
    ),
    (
        "longrope",
        {"factor": 32.0, "long_factor": LAMBDAS, "short_factor": [1.5] * 64},
        longrope,
        {"factor": 32, "long_factors": LAMBDAS, "short_factors": [1.5] * 64, "length": 4096},
        4096,
    ),
    (
        "longrope",
        {"factor": 32.0, "long_factor": LAMBDAS, "short_factor": [1.5] * 64},
        longrope,
        {"factor": 32, "long_factors": LAMBDAS, "short_factors": [1.5] * 64, "length": 4097},
        4097,
    ),
    (
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        llama3,
        {"factor": 8},
        None,
    ),
]


@pytest.mark.parametrize(("kind", "theirs", "scale", "ours", "length"), ORACLES)
def test_transformers_agrees_to_its_float32(kind, theirs, scale, ours, length):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    parameters = {"rope_type": kind, "rope_theta": 10000.0} | theirs
    if kind not in ("linear", "dynamic"):
        parameters["original_max_position_embeddings"] = 4096
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        max_position_embeddings=int(4096 * theirs["factor"]) if length is None else 4096,
        rope_parameters=parameters,
    )
    expected, expected_factor = rope.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    inv_freq, factor = scaled(scale, width=128, base=10000.0, original_length=4096, **ours)
    torch.testing.assert_close(torch.tensor(inv_freq), expected, rtol=2e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_a_scaling_takes_the_lengths_that_it_depends_on_and_no_others():
    lengths = {"original_length", "length"}
    for scale in EVERY:
        names = set(inspect.signature(scale).parameters)
        assert {"width", "base", "factor"} <= names
        assert getattr(scaling, scale.__name__) is scale
        given = {"width": 128, "factor": 4, "original_length": 512, "length": 1000, **EVERY[scale]}
        if scale is longrope:
            given["long_factors"] = [2.0] * 64
        for name in lengths & names:
            changed = scaled(scale, **{**given, name: 300})
            assert changed != scaled(scale, **given), (scale.__name__, name)
