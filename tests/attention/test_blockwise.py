"""xPos with blockwise causal attention, and T5's buckets, against the dense formula."""

import pytest
import torch

from zoo.attention import t5_attention as module
from zoo.attention.blockwise import BlockwiseXPos
from zoo.attention.pattern import Reach, distances
from zoo.mixers.softmax import SoftmaxAttention
from zoo.ops.attention import Part
from zoo.positions.rope import inverse_frequencies
from zoo.positions.t5 import RelativeBias
from zoo.positions.xpos import zetas

WIDTH, BLOCK = 8, 5


def reach(steps: int) -> BlockwiseXPos:
    theta = inverse_frequencies(WIDTH, 100.0)
    found = BlockwiseXPos(lambda _: (theta, 1.0), block=BLOCK)
    found.steps = [steps, BLOCK]
    return found


def inputs(tokens: int, past: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, 3, WIDTH) for n in (tokens, past + tokens, past + tokens)]
    draw = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [x.requires_grad_() for x in draw]


def assert_same(found, expected, leaves) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    weights = torch.randn_like(found)
    grads, wanted = (
        torch.autograd.grad((out * weights).sum(), leaves) for out in (found, expected)
    )
    torch.testing.assert_close(grads, wanted, rtol=1e-9, atol=1e-11)


def seen(i: int, j: int) -> bool:
    """By the paper's rule: of two neighbouring blocks, and not later."""
    return j <= i and i // BLOCK - j // BLOCK <= 1


@pytest.mark.parametrize("tokens", [1, 5, 11, 33])
@pytest.mark.parametrize("steps", [3, 512])
def test_xpos_is_the_dense_formula_over_a_block_and_the_one_before(tokens, steps):
    q, k, v = leaves = inputs(tokens)
    mask = torch.tensor([[seen(i, j) for j in range(tokens)] for i in range(tokens)])
    assert torch.equal(~distances(reach(steps), tokens).isnan(), mask)
    apart = (torch.arange(tokens)[:, None] - torch.arange(tokens)).double()
    scores = torch.zeros(2, 3, tokens, tokens, dtype=torch.float64)
    for i, theta in enumerate(inverse_frequencies(WIDTH, 100.0)):
        fading = zetas(WIDTH)[i] ** (apart / 512)
        a, b = (torch.complex(x[..., i], x[..., i + WIDTH // 2]) for x in (q, k))
        pairs = torch.einsum("bih,bjh->bhij", a, b.conj())
        scores = scores + (pairs * torch.polar(fading, apart * theta)).real
    weights = (scores / WIDTH**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhe->bihe", weights, v)
    assert_same(reach(steps)(q, k, v, 0), expected, leaves)


@pytest.mark.parametrize("cuts", [[33], [1, 2, 7, 20, 33], [11, 12, 33], [3, 9, 33]])
def test_any_chunks_are_read_as_one_block_after_the_other(cuts):
    q, k, v = leaves = inputs(33)
    kept, outs, start = (k[:, :0], v[:, :0]), [], 0
    for end in cuts:
        kept = [torch.cat([old, x[:, start:end]], 1) for old, x in zip(kept, (k, v), strict=True)]
        outs.append(reach(512)(q[:, start:end], *kept, start))
        kept, start = reach(512).keep(*kept), end
    assert_same(torch.cat(outs, 1), Reach.__call__(reach(512), q, k, v, 0), leaves)


def test_further_keys_that_all_see_are_merged_with_every_block():
    q, k, v = leaves = inputs(33)
    found, wanted = (
        form(reach(512), q, k, v, 0, always=[Part(q, k[:, 3:5] * 0.5, v[:, 7:9])])
        for form in (BlockwiseXPos.__call__, Reach.__call__)
    )
    assert_same(found, wanted, leaves)


def test_within_the_training_length_blocks_hide_nothing():
    assert not distances(reach(512), 2 * BLOCK).tril().isnan().any()
    assert distances(reach(512), 2 * BLOCK + 1)[-1, :BLOCK].isnan().all()
    assert SoftmaxAttention(width=16, heads=2, positions="xpos", window=7).reach.block == 4


@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (40, 0), (1, 30), (40, 30)])
def test_t5_is_the_dense_formula_with_a_bias_per_bucket(tokens, past, monkeypatch):
    monkeypatch.setattr(module, "TILE", 7)
    bias = RelativeBias(heads=3, buckets=8, max_distance=20).double()
    torch.nn.init.normal_(bias.weight)
    leaves = [*inputs(tokens, past), bias.weight]
    q, k, v, _ = leaves
    apart = torch.arange(past, past + tokens)[:, None] - torch.arange(past + tokens)
    # 8 buckets: 0 1 2 3, then from 4 (20/4)^(i/4): 4 .. 5, 6 .. 8, 9 .. 13, 14 and more
    row = torch.bucketize(apart, torch.tensor([1, 2, 3, 4, 6, 9, 14]), right=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / WIDTH**0.5 + bias.weight[row].movedim(-1, 0)
    weights = scores.masked_fill(apart < 0, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhe->bihe", weights, v)
    assert_same(module.t5_attention(q, k, v, bias), expected, leaves)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"positions": "xpos"}, "positions=xpos, and no others, take window"),
        ({"positions": "rope", "window": 8}, "positions=xpos, and no others, take window"),
        ({"positions": "xpos", "window": -3}, "window=-3: must be >= 1"),
        ({"positions": "xpos", "window": 8, "causal": False}, "positions=xpos are one-sided"),
        ({"positions": "t5", "causal": False}, "positions=t5 are one-sided"),
    ],
)
def test_positions_that_lack_something_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxAttention(width=16, heads=2, **given)
