"""Labels on the nearest keys: the split into few keys and a shifted window is the dense formula."""

import pytest
import torch

from zoo.attention.local import (
    attend_per_key,
    relative_window,
    relative_window_around,
    shifted_views,
)

H, D, E = 3, 4, 5
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def inputs(tokens: int, past: int, labels: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(2, tokens, H, D), (2, past + tokens, H, D), (2, past + tokens, H, E), (labels, H, D)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def dense(q, k, v, labels, which, mask):
    """softmax of q . (k + a_label) / sqrt(d) over visible keys, with every k + a written out."""
    shifted = k[:, None] + labels[which]  # (b, i, j, h, d)
    scores = torch.einsum("bihd,bijhd->bihj", q, shifted) / D**0.5
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    blind = ~mask.any(-1)[:, None]
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0)[..., None])
    return torch.einsum("bihj,bjhe->bihe", weights, v), lse


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("past", [0, 2, 40])
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_relative_is_the_dense_formula(tokens, past, first):
    size, clip = 20, 4
    q, k, v, labels = leaves = inputs(tokens, past, clip + 1 - first)
    apart = torch.arange(past, past + tokens)[:, None] - torch.arange(past + tokens)
    mask = (apart >= first) & (apart < size)
    which = (apart - first).clamp(0, clip - first)
    found = relative_window(q, k, v, labels, size, first=first)
    expected = dense(q, k, v, labels, which, mask)
    torch.testing.assert_close(found, expected, **EXACT)
    if tokens + past <= first:
        return  # nothing is seen

    def gradients(out, lse):
        return torch.autograd.grad(out.sin().sum() + lse[:, mask.any(-1)].sin().sum(), leaves)

    torch.testing.assert_close(gradients(*found), gradients(*expected), **EXACT)


@pytest.mark.parametrize("tokens", [1, 2, 5, 50])
def test_relative_around_distinguishes_before_from_after(tokens):
    size, clip = 9, 3
    q, k, v, labels = inputs(tokens, 0, 2 * clip + 1)
    apart = torch.arange(tokens)[:, None] - torch.arange(tokens)
    which = torch.where(apart >= 0, apart.clamp(max=clip), clip + (-apart).clamp(max=clip))
    expected = dense(q, k, v, labels, which, apart.abs() < size)
    torch.testing.assert_close(relative_window_around(q, k, v, labels, size), expected, **EXACT)


def test_a_query_without_any_of_the_few_keys_sees_nothing_and_has_a_finite_gradient():
    q, k, v, _ = leaves = inputs(3, 0, 1)
    visible = torch.tensor([[True, False], [False, False], [True, True]])
    out, lse = attend_per_key(q, [k, k], [v, v], visible=visible)
    assert (out[:, 1] == 0).all()
    assert (lse[:, 1] == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), leaves[:3]):
        assert grad.isfinite().all()
        assert (grad[:, [0, 2]] != 0).any()


def test_earlier_counts_back_from_each_token_and_says_what_is_missing():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    views, there = shifted_views(x, 4, range(1, 4))
    assert [view.flatten().tolist() for view in views] == [[1, 2, 3, 4], [0, 1, 2, 3], [0, 0, 1, 2]]
    assert there is not None
    assert there.tolist() == [[True, True, False]] + [[True] * 3] * 3
    assert shifted_views(x, 3, range(1, 4))[1] is None
