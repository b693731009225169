"""xPos: golden decays, the dense formula over two blocks, and finite numbers at any length."""

import pytest
import torch
from schemes import WIDTH, assert_same, inputs

from zoo.attention.pattern import AttentionPattern, distances
from zoo.errors import UserError
from zoo.ops.attention import Part, attend
from zoo.positions.rope import apply_rope, inverse_frequencies
from zoo.positions.xpos import BlockwiseXPos, XPos, apply_xpos_decay, zetas

BLOCK = 5


def blockwise(steps: int) -> BlockwiseXPos:
    theta = inverse_frequencies(WIDTH, 100.0)
    found = BlockwiseXPos(lambda _: (theta, 1.0), block=BLOCK)
    found.steps = [steps, BLOCK]
    return found


def test_zetas_of_width_8_are_the_published_ones():
    assert zetas(8) == pytest.approx([0.2857, 0.4643, 0.6429, 0.8214], abs=5e-5)


def dense_scores(q, k, start: int, scale_base: float = 512.0) -> torch.Tensor:
    """sum_i Re(q_i conj(k_i) e^(i (m-n) theta_i)) zeta_i^((m-n)/B), pair by pair."""
    half = q.shape[-1] // 2
    at = torch.arange(start + q.shape[1], dtype=torch.float64)
    apart = at[start:, None] - at[: k.shape[1]]
    scores = torch.zeros(q.shape[1], k.shape[1], dtype=torch.float64)
    for i, (theta, zeta) in enumerate(
        zip(inverse_frequencies(2 * half), zetas(2 * half), strict=True)
    ):
        q_i, k_i = (torch.complex(x[0, :, 0, i], x[0, :, 0, i + half]) for x in (q, k))
        phase = torch.polar(zeta ** (apart / scale_base), theta * apart)
        scores += (q_i[:, None] * k_i.conj() * phase).real
    return scores


@pytest.mark.parametrize(("past", "tokens"), [(0, 20), (15, 20), (0, 1), (40, 1)])
def test_scores_fade_pair_by_pair_with_the_distance(past, tokens):
    q = torch.randn(1, tokens, 1, 8, dtype=torch.float64)
    k = torch.randn(1, past + tokens, 1, 8, dtype=torch.float64)
    theta = inverse_frequencies(8)
    faded_q, faded_k = apply_xpos_decay(
        apply_rope(q, theta, past), apply_rope(k, theta), past, scale_base=16
    )
    found = torch.einsum("bihd,bjhd->ij", faded_q, faded_k)
    torch.testing.assert_close(found, dense_scores(q, k, past, 16), rtol=1e-10, atol=1e-10)


def test_layouts_differ_by_a_permutation_of_the_channels():
    q, k = torch.randn(2, 1, 9, 2, 12, dtype=torch.float64)
    regroup = torch.arange(12).view(6, 2).T.flatten()
    half_split = apply_xpos_decay(q[..., regroup], k[..., regroup], 0)
    pairs = apply_xpos_decay(q, k, 0, interleaved=True)
    for half, pair in zip(half_split, pairs, strict=True):
        assert torch.equal(half, pair[..., regroup])


def test_parts_of_the_keys_merge_to_the_whole():
    """Every part has a centre of its own, so keys can be cached rotated and decayed at use."""
    theta, block = inverse_frequencies(8), 6
    q, k, v = torch.randn(3, 1, 2 * block, 2, 8, dtype=torch.float64)
    q, k = apply_rope(q, theta), apply_rope(k, theta)
    whole = attend([Part(*apply_xpos_decay(q, k, 0), v, causal=True)])[0]
    old, new = slice(block), slice(block, None)
    parts = [
        Part(*apply_xpos_decay(q[:, new], k[:, new], 0), v[:, new], causal=True),
        Part(*apply_xpos_decay(q[:, new], k[:, old], block), v[:, old]),
    ]
    torch.testing.assert_close(attend(parts)[0], whole[:, new], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_overflows_at_any_length(dtype):
    """A fixed centre leaves float32 at 36k tokens; the last query here sees a key 2^20 before."""
    q = torch.randn(1, 4, 1, 8, dtype=dtype)
    late_k = torch.randn(1, 2**20, 1, 8, dtype=dtype)
    faded_q, faded_k = apply_xpos_decay(q, late_k, 2**20)
    assert faded_q.abs().amax() <= q.abs().amax()
    assert faded_k.abs().amax() <= late_k.abs().amax()
    scores = torch.einsum("bihd,bjhd->ij", faded_q, faded_k)
    assert scores.isfinite().all()
    assert not scores[:, 0].any()  # a million tokens off it has faded away
    own = torch.randn(1, 2040, 1, 8, dtype=dtype, requires_grad=True)  # all that is allowed
    out, _ = attend(
        [Part(*apply_xpos_decay(own, own, 0, scale_base=64), own, causal=True)], backend="torch"
    )
    out.float().square().sum().backward()
    assert out.isfinite().all()
    assert own.grad is not None
    assert own.grad.isfinite().all()


def test_what_would_overflow_is_refused():
    x = torch.randn(1, 20000, 1, 8)
    with pytest.raises(ValueError, match="at most 16347 queries with their own keys"):
        apply_xpos_decay(x, x, 0)
    apply_xpos_decay(x[:, -100:], x, 19900)
    with pytest.raises(
        ValueError, match=r"gamma=0\.4: must be above 0, and the head width, 7, even"
    ):
        zetas(7)
    with pytest.raises(ValueError, match="gamma=0: must be above 0, and the head width, 8"):
        zetas(8, gamma=0)


def visible(i: int, j: int) -> bool:
    """By the paper's rule: of two neighbouring blocks, and not later."""
    return j <= i and i // BLOCK - j // BLOCK <= 1


@pytest.mark.parametrize("tokens", [1, 5, 11, 33])
@pytest.mark.parametrize("steps", [3, 512])
def test_xpos_is_the_dense_formula_over_a_block_and_the_one_before(tokens, steps):
    q, k, v = leaves = inputs(tokens)
    mask = torch.tensor([[visible(i, j) for j in range(tokens)] for i in range(tokens)])
    assert torch.equal(~distances(blockwise(steps), tokens).isnan(), mask)
    apart = (torch.arange(tokens)[:, None] - torch.arange(tokens)).double()
    scores = torch.zeros(2, 3, tokens, tokens, dtype=torch.float64)
    for i, theta in enumerate(inverse_frequencies(WIDTH, 100.0)):
        fading = zetas(WIDTH)[i] ** (apart / 512)
        a, b = (torch.complex(x[..., i], x[..., i + WIDTH // 2]) for x in (q, k))
        pairs = torch.einsum("bih,bjh->bhij", a, b.conj())
        scores = scores + (pairs * torch.polar(fading, apart * theta)).real
    weights = (scores / WIDTH**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhe->bihe", weights, v)
    assert_same(blockwise(steps)(q, k, v, 0), expected, leaves)


@pytest.mark.parametrize("cuts", [[33], [1, 2, 7, 20, 33], [11, 12, 33], [3, 9, 33]])
def test_any_chunks_are_read_as_one_block_after_the_other(cuts):
    q, k, v = leaves = inputs(33)
    cached, outs, start = (k[:, :0], v[:, :0]), [], 0
    for end in cuts:
        cached = [
            torch.cat([old, x[:, start:end]], 1) for old, x in zip(cached, (k, v), strict=True)
        ]
        outs.append(blockwise(512)(q[:, start:end], *cached, start))
        cached, start = blockwise(512).evict(*cached), end
    assert_same(torch.cat(outs, 1), AttentionPattern.__call__(blockwise(512), q, k, v, 0), leaves)


def test_further_keys_that_all_see_are_merged_with_every_block():
    q, k, v = leaves = inputs(33)
    found, wanted = (
        form(blockwise(512), q, k, v, 0, always=[Part(q, k[:, 3:5] * 0.5, v[:, 7:9])])
        for form in (BlockwiseXPos.__call__, AttentionPattern.__call__)
    )
    assert_same(found, wanted, leaves)


def test_within_the_training_length_blocks_hide_nothing():
    assert not distances(blockwise(512), 2 * BLOCK).tril().isnan().any()
    assert distances(blockwise(512), 2 * BLOCK + 1)[-1, :BLOCK].isnan().all()
    assert XPos(2, 8, window=7).pattern.block == 4


@pytest.mark.parametrize(("window", "given"), [(None, "null"), (-3, "-3")])
def test_xpos_without_a_training_length_is_refused(window, given):
    with pytest.raises(UserError, match=f"window={given}: must be the training length"):
        XPos(2, 8, window=window)
