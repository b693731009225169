"""Sums e^{w + k} and e^{w + k} v over sets of keys, channel by channel, without overflow.

Queries at once with a set of keys that all of them see are a product of matrices,
e^{w - max w} e^{k - max k}, and lose nothing that matters: the largest key is in every sum. A
causal triangle is such squares, halving, down to a few tokens done pair by pair. Sums over disjoint
sets merge like partial softmax attention.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.ops.wkv4 import LOG_ZERO

PAIRS = 4  # tokens at most of a causal triangle done pair by pair


class Sums(NamedTuple):
    """Holds numerators and denominators over e^top; `top` is a constant to autograd."""

    sums: Float[Tensor, "... q 2 c"]
    top: Float[Tensor, "... q c"]


def dense_sums(w: Tensor, k: Tensor, v: Tensor) -> Sums:
    """Sum for every query over every key: w (..., q, n); k, v (..., n, c)."""
    top_w, top_k = w.detach().amax(-1, keepdim=True), k.detach().amax(-2, keepdim=True)
    e = torch.exp(k - top_k)
    sums = torch.exp(w - top_w) @ torch.cat([e * v, e], -1)
    return Sums(sums.unflatten(-1, (2, -1)), top_w + top_k)


def causal_sums(w: Tensor, k: Tensor, v: Tensor) -> Sums:
    """Sum for every query over the keys up to its own: w (..., n, n); k, v (..., n, c); n = 2^i."""
    n = k.shape[-2]
    if n <= PAIRS:
        future = torch.ones(n, n, dtype=torch.bool, device=k.device).triu(1)
        scores = (w[..., None] + k[..., None, :, :]).masked_fill(future[..., None], LOG_ZERO)
        top = scores.detach().amax(-2)
        e = torch.exp(scores - top[..., None, :])
        return Sums(torch.stack([(e * v[..., None, :, :]).sum(-2), e.sum(-2)], -2), top)
    half = n // 2
    corners = torch.stack([w[..., :half, :half], w[..., half:, half:]], -3)
    two = [x.unflatten(-2, (2, half)) for x in (k, v)]
    sums, top = causal_sums(corners, *two)
    below = dense_sums(w[..., half:, :half], *(x[..., 0, :, :] for x in two))
    second = merge([Sums(sums[..., 1, :, :, :], top[..., 1, :, :]), below])
    return Sums(
        torch.cat([sums[..., 0, :, :, :], second.sums], -3),
        torch.cat([top[..., 0, :, :], second.top], -2),
    )


def merge(parts: Sequence[Sums]) -> Sums:
    """Merge sums of the same queries over disjoint sets of keys."""
    top = reduce(torch.maximum, [part.top for part in parts])
    sums = [part.sums * torch.exp(part.top - top)[..., None, :] for part in parts]
    return Sums(reduce(torch.add, sums), top)


def average(parts: Sequence[Sums]) -> Tensor:
    numerator, denominator = merge(parts).sums.unbind(-2)
    return numerator / denominator
