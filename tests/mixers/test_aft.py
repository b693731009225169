"""The Attention Free Transformer is its formula, in all four variants."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from zoo.mixers.aft import AFT
from zoo.mixers.base import count_bytes

VARIANTS = ["simple", "conv", "local", "full"]
WIDTH, WINDOW, POSITIONS = 12, 5, 60


def make(variant: str, dtype=torch.float64) -> AFT:
    """Small, with biases far from zero."""
    torch.manual_seed(0)
    mixer = AFT(
        width=WIDTH, variant=variant, heads=3, window=WINDOW, rank=4, max_length=POSITIONS
    ).to(dtype)
    for name in ("u", "v", "beta"):
        if hasattr(mixer, name):
            torch.nn.init.normal_(getattr(mixer, name))
    return mixer


def biases(mixer: AFT, t: int) -> torch.Tensor:
    """w of every query (row) and key, by head: (h, t, t)."""
    distance = torch.arange(t)[:, None] - torch.arange(t)
    if mixer.variant == "simple":
        return torch.zeros(1, t, t, dtype=torch.float64)
    if mixer.variant == "conv":
        taps = mixer.taps
        spread = taps.var(1, keepdim=True, unbiased=False)
        w = (taps - taps.mean(1, keepdim=True)) / (spread + 1e-5).sqrt()
        w = mixer.gamma[:, None] * w + mixer.beta[:, None]
        return F.pad(w, (0, t))[:, distance.clamp(min=0)]
    w = (mixer.u[:t] @ mixer.v[:t].T)[None]
    return w if mixer.variant == "full" else w * (distance < WINDOW)


def formula(mixer: AFT, x: torch.Tensor) -> torch.Tensor:
    """Equation 2 of the paper with a causal mask, literally."""
    w = biases(mixer, x.shape[1])
    w = w.repeat_interleave(WIDTH // len(w), 0).permute(1, 2, 0)
    weights = torch.exp(mixer.k_proj(x)[:, None] + w)
    weights = weights * torch.ones(w.shape[:2]).tril()[..., None]
    average = (weights * mixer.v_proj(x)[:, None]).sum(2) / weights.sum(2)
    return mixer.o_proj(torch.sigmoid(mixer.q_proj(x)) * average)


@pytest.mark.parametrize("t", [1, 2, 37])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_papers_formula(variant, t):
    mixer, x = make(variant), torch.randn(2, t, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), formula(mixer, x), rtol=1e-11, atol=1e-11)


def test_conv_is_a_convolution_with_expm1_of_w_over_a_sum_of_all():
    """Section 3.2 of the paper, causal."""
    mixer, x = make("conv"), torch.randn(2, 37, WIDTH, dtype=torch.float64)
    e, v = mixer.k_proj(x).exp(), mixer.v_proj(x)
    w = biases(mixer, WINDOW)[:, -1].flip(1)  # of the tokens 0, 1 .. back
    taps = torch.expm1(w).flip(1).repeat_interleave(WIDTH // 3, 0)[:, None]

    def total(y):
        padded = F.pad(y.transpose(1, 2), (WINDOW - 1, 0))
        return F.conv1d(padded, taps, groups=WIDTH).transpose(1, 2) + y.cumsum(1)

    wanted = mixer.o_proj(torch.sigmoid(mixer.q_proj(x)) * total(e * v) / total(e))
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [[1] * 37, [36, 1], [2, 3, 20, 12]])
def test_any_chunking_gives_the_whole(variant, sizes):
    mixer, x = make(variant), torch.randn(2, 37, WIDTH, dtype=torch.float64)
    weights = torch.randn_like(x)

    def read(chunks):
        state, ys = mixer.empty_state(2), []
        for part in x.split(chunks, 1):
            y, state = mixer(part, state)
            ys.append(y)
        y, leaves = torch.cat(ys, 1), [a for a in tree_leaves(state) if torch.is_tensor(a)]
        score = (y * weights).sum() + sum(a.sin().sum() for a in leaves)
        return y, leaves, torch.autograd.grad(score, list(mixer.parameters()))

    for found, wanted in zip(read(sizes), read([37]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_is_as_large_as_it_says(variant):
    mixer = make(variant, torch.float32)
    state = mixer.empty_state(2)
    for tokens in range(1, 12):
        _, state = mixer(torch.randn(2, 1, WIDTH), state)
        assert count_bytes(state) == mixer.state_bytes(tokens, 2)
    assert mixer.recurrent == (variant != "full")
    assert (mixer.state_bytes(50) == mixer.state_bytes(40)) == mixer.recurrent


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns_from_the_least_window(variant):
    mixer = AFT(width=WIDTH, variant=variant, window=WINDOW, rank=4, max_length=POSITIONS)
    mixer(torch.randn(2, mixer.min_window, WIDTH)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("variant", ["local", "full"])
def test_positions_without_a_bias_are_refused_by_number(variant):
    mixer = make(variant)
    x = torch.randn(1, POSITIONS, WIDTH, dtype=torch.float64)
    _, state = mixer(x, mixer.empty_state(1))
    with pytest.raises(ValueError, match="at most 60 tokens and was given 61"):
        mixer(x[:, :1], state)
    with pytest.raises(ValueError, match="was given 120"):
        mixer(torch.cat([x, x], 1))


@pytest.mark.parametrize("variant", ["simple", "conv"])
def test_the_others_read_any_length(variant):
    assert make(variant).max_length is None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [0.0, 1.0, 1e2])
def test_bfloat16_autocast_stays_finite_under_extreme_inputs(variant, size):
    mixer = make(variant, torch.float32)
    x = (size * torch.randn(2, 25, WIDTH)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x, mixer.empty_state(2))
        y, _ = mixer(x, state)
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_short_window_carries_every_token_on():
    """conv: what leaves the kept keys joins the average of older tokens instead."""
    mixer, x = make("conv"), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    _, whole = mixer(x, mixer.empty_state(2))
    carried = mixer.truncate_state(whole, 2)
    assert carried.k.shape[1] == 2
    k, v = mixer.k_proj(x[:, :7]), mixer.v_proj(x[:, :7])
    p, q, o = carried.older.unbind(1)
    torch.testing.assert_close(q * o.exp(), k.exp().sum(1))
    torch.testing.assert_close(p * o.exp(), (k.exp() * v).sum(1))
    assert not carried.older.requires_grad


def test_full_keeps_the_positions_of_the_keys_it_carries():
    mixer, x = make("full"), torch.randn(2, 10, WIDTH, dtype=torch.float64)
    _, state = mixer(x[:, :9], mixer.empty_state(2))
    y, _ = mixer(x[:, 9:], mixer.truncate_state(state, 3))
    w = (mixer.u[9] @ mixer.v[6:10].T)[:, None]
    weights = torch.exp(mixer.k_proj(x[:, 6:]) + w)
    average = (weights * mixer.v_proj(x[:, 6:])).sum(1) / weights.sum(1)
    wanted = mixer.o_proj(torch.sigmoid(mixer.q_proj(x[:, 9])) * average)
    torch.testing.assert_close(y[:, 0], wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_reached_from_the_command_line(variant, tiny):
    model = tiny("aft", f"model.mixer.variant={variant}", "model.mixer.rank=4")
    assert model(torch.zeros(1, 40, dtype=torch.long)).isfinite().all()
    assert model.max_length == (256 if variant in ("local", "full") else None)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"variant": "fast"}, "variant=fast: must be simple, conv, local or full"),
        ({"variant": "conv", "heads": 5}, "heads=5: must divide width=12"),
        ({"variant": "conv", "heads": 0}, "heads=0: must be an integer >= 1"),
        ({"variant": "conv", "window": 1}, "window=1: must be an integer >= 2"),
        ({"variant": "local", "window": 0}, "window=0: must be an integer >= 2"),
        ({"variant": "full"}, "max_length=null: variant="),
        ({"variant": "local", "max_length": 9, "rank": 0}, "rank=0"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(options, line):
    with pytest.raises(ValueError, match=line) as error:
        AFT(width=WIDTH, **options)
    assert "\n" not in str(error.value)
