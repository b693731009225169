"""Rotary positions: golden frequencies, norms, and scores that know only the distance."""

import functools
import math

import pytest
import torch

from zoo.positions import rope
from zoo.positions.rope import _tables, apply_rope, inverse_frequencies, rotary_tables


def test_frequencies_of_width_128_are_the_published_ones():
    theta = inverse_frequencies(128)
    assert theta[0] == 1
    assert theta[1] == pytest.approx(0.865964, abs=1e-6)
    assert theta[32] == pytest.approx(0.01, abs=1e-12)
    assert theta[63] == pytest.approx(0.000115478, abs=1e-9)


def test_tables_of_one_position_are_those_of_the_call():
    for theta in 2 * [inverse_frequencies(6), inverse_frequencies(8), inverse_frequencies(6, 50.0)]:
        for place, dtype, factor in 2 * [(3, torch.float32, 1.0), (4, torch.float64, 2.0)]:
            at = range(place, place + 1)
            cos, sin = rotary_tables(theta, at, torch.device("cpu"), dtype, factor)
            angles = torch.tensor(theta, dtype=torch.float64) * place
            assert cos.dtype == sin.dtype == dtype
            torch.testing.assert_close(cos[0, 0], (factor * angles.cos()).to(dtype))
            torch.testing.assert_close(sin[0, 0], (factor * angles.sin()).to(dtype))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="head_width=7: must be even"):
        inverse_frequencies(7)
    with pytest.raises(ValueError, match=r"base=1\.0"):
        inverse_frequencies(8, base=1.0)
    with pytest.raises(ValueError, match="rotary width 10 is more than the head width 8"):
        apply_rope(torch.zeros(1, 1, 1, 8), inverse_frequencies(10))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_the_complex_product_of_each_pair(interleaved):
    theta = inverse_frequencies(6)
    x = torch.randn(1, 5, 2, 6, dtype=torch.float64)
    y = apply_rope(x, theta, positions=3, interleaved=interleaved)
    for i, angle in enumerate(theta):
        pair = (2 * i, 2 * i + 1) if interleaved else (i, i + 3)
        turn = torch.tensor(
            [complex(math.cos(m * angle), math.sin(m * angle)) for m in range(3, 8)]
        )
        expected = (
            torch.complex(x[..., pair[0]], x[..., pair[1]]) * turn.to(torch.complex128)[:, None]
        )
        found = torch.complex(y[..., pair[0]], y[..., pair[1]])
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("start", [0, 1000, 2**20])
def test_scores_depend_on_the_distance_alone_even_a_million_tokens_in(start):
    theta = inverse_frequencies(32)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 40, 1, 32, generator=generator)
    at_start = torch.einsum("bihd,bjhd->ij", apply_rope(q, theta), apply_rope(k, theta))
    shifted = torch.einsum(
        "bihd,bjhd->ij", apply_rope(q, theta, start), apply_rope(k, theta, start)
    )
    torch.testing.assert_close(shifted, at_start, rtol=0, atol=1e-5)


def test_chunks_of_a_sequence_are_rotated_as_the_whole_is():
    theta = inverse_frequencies(8)
    x = torch.randn(2, 11, 1, 8)
    pieces = [apply_rope(x[:, a:b], theta, a) for a, b in [(0, 4), (4, 5), (5, 11)]]
    assert torch.equal(torch.cat(pieces, 1), apply_rope(x, theta))


def test_layouts_differ_by_a_permutation_of_the_channels():
    """Llama's pairs (i, i + d/2) are RoFormer's (2i, 2i + 1) with the channels regrouped."""
    theta = inverse_frequencies(12)
    x = torch.randn(2, 7, 3, 12, dtype=torch.float64)
    regroup = torch.arange(12).view(6, 2).T.flatten()
    half_split = apply_rope(x[..., regroup], theta, 5)
    wanted = apply_rope(x, theta, 5, interleaved=True)[..., regroup]
    torch.testing.assert_close(half_split, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("interleaved", [False, True])
def test_frequencies_for_some_channels_turn_these_and_leave_the_rest(interleaved):
    theta = inverse_frequencies(4)  # of the rotary width, not of the head's
    x = torch.randn(2, 5, 3, 10, dtype=torch.bfloat16)
    y = apply_rope(x, theta, 2, interleaved=interleaved, attention_factor=1.5)
    alone = apply_rope(x[..., :4], theta, 2, interleaved=interleaved, attention_factor=1.5)
    assert torch.equal(y[..., :4], alone)
    assert torch.equal(y[..., 4:], x[..., 4:])  # nor does the attention factor reach them


def test_the_attention_factor_multiplies_scores_by_its_square():
    theta = inverse_frequencies(8)
    q, k = torch.randn(2, 1, 6, 2, 8, dtype=torch.float64)

    def scores(factor: float) -> torch.Tensor:
        rotated = (apply_rope(x, theta, 3, attention_factor=factor) for x in (q, k))
        return torch.einsum("bihd,bjhd->bhij", *rotated)

    torch.testing.assert_close(scores(1.277259), 1.277259**2 * scores(1.0), rtol=1e-12, atol=1e-12)


def test_explicit_positions_are_where_the_tokens_are():
    theta = inverse_frequencies(16)
    x = torch.randn(2, 9, 2, 16)
    assert torch.equal(apply_rope(x, theta, positions=torch.arange(4, 13)), apply_rope(x, theta, 4))
    rows = torch.stack([torch.arange(9), torch.arange(100, 118, 2)])
    y = apply_rope(x, theta, positions=rows)
    assert torch.equal(y[0], apply_rope(x[:1], theta)[0])
    for i in range(9):
        assert torch.equal(y[1, i], apply_rope(x[1:, i : i + 1], theta, 100 + 2 * i)[0, 0])


def test_positions_between_whole_ones_keep_their_fraction():
    theta = inverse_frequencies(2)  # theta_0 = 1
    x = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 3, 1, 2)
    at = torch.tensor([0.25, 1.5, 2**20 + 0.03125], dtype=torch.float64)
    rotated = apply_rope(x, theta, positions=at)[0, :, 0]
    expected = [[math.cos(m), math.sin(m)] for m in at.tolist()]
    torch.testing.assert_close(rotated, torch.tensor(expected, dtype=torch.float64))


def test_a_million_tokens_in_angles_are_those_of_exact_arithmetic():
    """sin(m + n) from sin and cos of smaller angles; float32 products are wrong by 0.06 here."""
    m = 2**20
    theta = inverse_frequencies(64)
    x = torch.eye(64, dtype=torch.float64)[:32].view(1, 1, 32, 64)  # one head per pair
    rotated = apply_rope(x, theta, m)[0, 0]
    for i, f in enumerate(theta):
        high, low = (m - 1001) * f, 1001 * f
        cos = math.cos(high) * math.cos(low) - math.sin(high) * math.sin(low)
        assert rotated[i, i].item() == pytest.approx(cos, abs=1e-9)
    single = apply_rope(x.float(), theta, m)
    torch.testing.assert_close(single.double(), rotated[None, None], rtol=0, atol=6e-8)


@pytest.mark.parametrize(
    "place", [{"positions": 2**20}, {"positions": torch.arange(2**20, 2**20 + 4)}]
)
def test_autocast_and_half_precision_do_not_reach_the_angles(place):
    theta = inverse_frequencies(32)
    x = torch.randn(1, 4, 2, 32)
    _tables.clear()
    with torch.autocast("cpu", torch.bfloat16):
        inside = apply_rope(x, theta, **place)
        frequencies = apply_rope(x, torch.tensor(theta, dtype=torch.float64), **place)
    assert torch.equal(inside, apply_rope(x, theta, **place))
    assert torch.equal(frequencies, inside)
    half = apply_rope(x.bfloat16(), theta, **place)
    torch.testing.assert_close(half.float(), inside, rtol=2e-2, atol=2e-2)


def test_a_tensor_of_frequencies_gets_its_gradient():
    x = torch.randn(2, 5, 1, 6, dtype=torch.float64)
    theta = torch.tensor(inverse_frequencies(6), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: apply_rope(x, f, 3, attention_factor=1.2), theta)
    by_default = apply_rope(x, inverse_frequencies(6), 3)
    torch.testing.assert_close(apply_rope(x, theta, 3), by_default, rtol=0, atol=1e-15)


@pytest.mark.parametrize("tokens", [1, 33])
def test_rotation_is_that_of_transformers(tokens):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 2, tokens, 3, 16)
    angles = torch.outer(torch.arange(tokens).float(), torch.tensor(inverse_frequencies(16)))
    cos, sin = (f(torch.cat([angles, angles], -1))[None] for f in (torch.cos, torch.sin))
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    found = (apply_rope(x, inverse_frequencies(16)) for x in (q, k))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_turn_is_the_turn_back():
    theta = inverse_frequencies(6)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)  # two channels stay
    turn = lambda y: apply_rope(y, theta, 2**20, attention_factor=1.3)  # noqa: E731
    assert torch.autograd.gradcheck(turn, x)
    assert torch.autograd.gradgradcheck(turn, x)


TABLE = functools.partial(
    rotary_tables, inverse_frequencies(8), device=torch.device("cpu"), dtype=torch.float32
)


def test_as_many_tables_are_kept_as_the_memory_for_them_holds(monkeypatch):
    _tables.clear()
    apart = [2 * torch.arange(start, start + 16) for start in range(40)]  # not consecutive
    tables = [TABLE(positions=at) for at in apart]
    again = [TABLE(positions=at) for at in apart]
    assert all(a[0] is b[0] for a, b in zip(tables, again, strict=True))
    monkeypatch.setattr(rope, "MAX_BYTES", 3 * 2 * tables[0][0].nbytes)
    TABLE(positions=2 * torch.arange(99, 115))
    assert len(_tables) == 3
    _tables.clear()


def test_consecutive_positions_are_rows_of_one_table_that_grows():
    _tables.clear()
    for token in range(1000):  # as in decoding, one after another
        TABLE(positions=range(token, token + 1))
        TABLE(positions=torch.arange(token + 1))
    assert len(_tables) == 1
    (grown,) = _tables.values()
    assert len(grown[0]) == 1024
    _tables.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "positions",
    [
        range(0, 1),
        range(255, 300),
        torch.arange(37, 1000),
        torch.tensor([700]),
        torch.arange(-5, 9),
        torch.tensor([3, 4, 6]),
        torch.tensor([5, 4, 3]),
        torch.tensor([2, 9, 4]),
        torch.tensor([[0, 1], [5, 6]]),
        torch.tensor([0.5, 1.5]),
        torch.arange(2**30, 2**30 + 3),
    ],
)
def test_a_cached_table_has_the_values_of_each_position_alone(positions, dtype):
    _tables.clear()
    for _ in range(2):  # computed, then found
        found = TABLE(positions=positions, dtype=dtype, attention_factor=1.25)
        every = torch.tensor([*positions]) if isinstance(positions, range) else positions
        theta = torch.tensor(inverse_frequencies(8), dtype=torch.float64)
        angles = every.double()[..., None] * theta
        for ours, exact in zip(found, (angles.cos(), angles.sin()), strict=True):
            assert ours.shape == (*every.shape, 1, 4)
            expected = (1.25 * exact).to(dtype)
            torch.testing.assert_close(ours.squeeze(-2), expected, rtol=0, atol=3e-16)
    _tables.clear()


def test_a_table_too_large_to_grow_is_cached_as_requested(monkeypatch):
    _tables.clear()
    monkeypatch.setattr(rope, "MAX_GROWN", 2 * 512 * 4 * 4)  # 512 positions of four float32 pairs
    TABLE(positions=range(510, 512))
    assert [len(cos) for cos, _ in _tables.values()] == [512]
    TABLE(positions=range(511, 513))
    assert [len(cos) for cos, _ in _tables.values()] == [512, 2]
    _tables.clear()
