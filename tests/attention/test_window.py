"""A sliding window is masked attention, however the queries are cut, dilated or merged."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention.window import by_dilation, in_window, last_tokens, two_sided_window, window
from zoo.ops.attention import Part, attend
from zoo.ops.merge import merge

H, D, E = 3, 4, 5
EXACT = {"rtol": 1e-10, "atol": 1e-11}
# tokens, keys before them, size, dilation, gap
CASES = [
    (1, 0, 1, 1, 0),
    (1, 6, 7, 1, 0),  # a decoded token, the window full
    (2, 3, 7, 1, 0),
    (70, 0, 1, 1, 0),
    (70, 0, 2, 1, 0),
    (71, 0, 33, 1, 0),
    (97, 32, 33, 1, 0),
    (97, 40, 33, 1, 0),  # more keys than any query sees
    (97, 7, 33, 1, 0),
    (97, 0, 34, 1, 0),  # a size that fits no block
    (300, 5, 257, 1, 0),
    (20, 0, 50, 1, 0),  # longer than the text
    (50, 0, 9, 4, 0),
    (50, 11, 9, 4, 0),
    (1, 32, 9, 4, 0),
    (3, 2, 9, 4, 0),
    (50, 0, 9, 1, 6),
    (50, 3, 9, 1, 6),
    (4, 0, 9, 1, 6),  # no query sees anything
    (50, 13, 9, 3, 5),
]


def inputs(tokens: int, past: int = 0, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, tokens, H, D), (2, past + tokens, H, D), (2, past + tokens, H, E)]
    make = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [make(*shape).requires_grad_() for shape in shapes]


def masked(q, k, v, mask):
    """softmax over the visible keys, written out; (out, lse)."""
    scores = torch.einsum("bihd,bjhd->bihj", q, k) / D**0.5
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    blind = ~mask.any(-1)[:, None]
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0)[..., None])
    return torch.einsum("bihj,bjhe->bihe", weights, v), lse


def pattern(tokens: int, past: int, size: int, dilation: int, gap: int) -> torch.Tensor:
    """Which key each query sees, one by one."""
    return torch.tensor(
        [
            [
                any(past + i - gap - n * dilation == j for n in range(size))
                for j in range(past + tokens)
            ]
            for i in range(tokens)
        ]
    )


@pytest.mark.parametrize("case", CASES)
def test_a_window_is_attention_under_its_mask(case):
    tokens, past, size, dilation, gap = case
    q, k, v = leaves = inputs(tokens, past)
    found = window(q, k, v, size, dilation=dilation, gap=gap)
    mask = pattern(*case)
    expected = masked(q, k, v, mask)
    torch.testing.assert_close(found, expected, **EXACT)
    if not mask.any():
        return

    def gradients(out, lse):
        return torch.autograd.grad(out.sin().sum() + lse[:, mask.any(-1)].sin().sum(), leaves)

    torch.testing.assert_close(gradients(*found), gradients(*expected), **EXACT)


@pytest.mark.parametrize("backend", ["reference", "torch", "flash"])
def test_every_backend_gives_the_window(backend):
    q, k, v = inputs(90, 3)
    found = window(q, k, v, 20, dilation=2, backend=backend)
    torch.testing.assert_close(found, masked(q, k, v, pattern(90, 3, 20, 2, 0)), **EXACT)


@pytest.mark.parametrize("tokens", [1, 2, 31, 75])
@pytest.mark.parametrize(("side", "dilation"), [(1, 1), (16, 1), (40, 1), (3, 4)])
def test_around_sees_as_far_ahead_as_back(tokens, side, dilation):
    q, k, v = inputs(tokens)
    apart = torch.arange(tokens)[:, None] - torch.arange(tokens)
    mask = (apart.abs() <= side * dilation) & (apart % dilation == 0)
    found = two_sided_window(q, k, v, side, dilation=dilation)
    torch.testing.assert_close(found, masked(q, k, v, mask), **EXACT)


def test_heads_of_different_dilation_come_back_in_their_order():
    q, k, v = inputs(40)
    dilations = [3, 1, 2]  # an order that is not its own inverse
    out, lse = by_dilation(partial(window, size=5), q, k, v, dilations)
    for head, dilation in enumerate(dilations):
        one = [x[:, :, head : head + 1] for x in (q, k, v)]
        expected = window(*one, 5, dilation=dilation)
        torch.testing.assert_close(
            (out[:, :, head : head + 1], lse[:, :, head : head + 1]), expected, **EXACT
        )


@pytest.mark.parametrize(("size", "dilation"), [(1, 1), (20, 1), (6, 4)])
@pytest.mark.parametrize("chunks", [[1] * 60, [59, 1], [1, 19, 21, 19], [33, 27]])
def test_chunks_that_keep_the_last_keys_see_what_one_call_sees(size, dilation, chunks):
    q, k, v = inputs(60)
    span = (size - 1) * dilation
    held = [k[:, :0], v[:, :0]]
    pieces = []
    for parts in zip(*(x.split(chunks, 1) for x in (q, k, v)), strict=True):
        held = [torch.cat([a, b], 1) for a, b in zip(held, parts[1:], strict=True)]
        pieces.append(window(parts[0], *held, size, dilation=dilation))
        held = [last_tokens(x, span) for x in held]
    whole = tuple(torch.cat(x, 1) for x in zip(*pieces, strict=True))
    torch.testing.assert_close(whole, window(q, k, v, size, dilation=dilation), **EXACT)


def test_a_window_merges_with_keys_outside_it_into_one_softmax():
    """Sinks or global tokens: first keys that stay visible, each counted once."""
    q, k, v = inputs(50)
    at = torch.arange(50)
    first = (at[:, None] >= at[:4]) & ~in_window(at, at[:4], 10)
    sinks = attend([Part(q, k[:, :4], v[:, :4], mask=first[None, None])])
    found = merge([window(q, k, v, 10), sinks])
    mask = in_window(at, at, 10) | ((at[:, None] >= at) & (at < 4))
    torch.testing.assert_close(found, masked(q, k, v, mask), **EXACT)


@pytest.mark.parametrize("dilation", [1, 4])
def test_scores_grow_with_the_length_and_not_with_its_square(dilation):
    def scored(tokens: int) -> int:
        q, k, v = inputs(tokens)
        with FlopCounterMode(display=False) as counter:
            window(q, k, v, 65, dilation=dilation)[0].sum().backward()
        return counter.get_total_flops()

    assert scored(4096) < 2.1 * scored(2048)
    each = scored(4096) / 4096 / (2 * 2 * H * (D + E))
    assert each < 1.5 * 2.5 * 65  # forward and 2.5 backward, half as many again in masked scores
