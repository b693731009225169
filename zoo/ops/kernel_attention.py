"""Computes additive attention: sums over visible keys, weighted by a kernel of each score alone.

    o_i = sum_j f(s_ij) v_j         s_ij = scale q_i.k_j + slope (j - i)

    relu            f(s) = max(s, 0)           (Wortsman 2023, section 3)
    squared_relu    f(s) = max(s, 0)^2
    gaussian        exp(-scale ||q_i - k_j||^2 / 2)     (Lu 2021, SOFT, eq. 3); no slope

Nothing is normalised across keys, so results over disjoint sets of keys simply add. The Gaussian is
f = exp on the same products once q and k carry their norms in two more channels.

Backends: `reference` (the formula, literally) and `torch` (the formula in tiles of queries by
keys, skipping those wholly in the future, recomputed in the backward pass: memory linear in t).
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from zoo.errors import choose
from zoo.ops.dtypes import wide_dtype
from zoo.ops.runtime.dispatch import select_backend

TILE = 256  # queries, and keys, per tile; with fewer queries a tile takes more keys

# f and its derivative
KERNELS = {
    "relu": (torch.relu, lambda s: (s > 0).to(s.dtype)),
    "squared_relu": (lambda s: torch.relu(s).square(), lambda s: 2 * torch.relu(s)),
    # rounding may leave a squared distance of -1e-7
    "gaussian": (lambda s: s.clamp(max=0).exp(), lambda s: s.clamp(max=0).exp()),
}


def kernel_attention(
    q: Float[Tensor, "b tq h d"],
    k: Float[Tensor, "b tk h d"],
    v: Float[Tensor, "b tk h e"],
    kernel: str,
    *,
    scale: float | None = None,
    slopes: Float[Tensor, " h"] | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Float[Tensor, "b tq h e"]:
    """Return sum_j f(s_ij) v_j, in float32 or better; `scale` is 1/sqrt(d) unless given.

    `causal`: the queries are the last tq of the tk tokens, and each sees the keys up to its own.
    `slopes` of a linear bias are constants, without a gradient. Products are in the dtype of the
    inputs, the Gaussian's, which are differences of large numbers, in float32 or better.
    """
    choose("kernel", kernel, KERNELS)
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(f"kernel_attention: {q.shape[1]} queries for {k.shape[1]} tokens")
    if slopes is not None and (kernel == "gaussian" or not causal):
        raise ValueError("kernel_attention: slopes are for causal scores of a ReLU")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if kernel == "gaussian":
        q, k = _with_norms(q, k)
    form = {"torch": _Tiled.apply, "reference": _formula}[
        select_backend("kernel_attention", backend, {"torch": True, "reference": True})
    ]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return form(q, k, v, kernel, scale, slopes, causal).transpose(1, 2)


def weight_sums(
    q: Float[Tensor, "b tq h d"],
    k: Float[Tensor, "b tk h d"],
    kernel: str,
    *,
    slopes: Float[Tensor, " h"] | None = None,
    causal: bool = True,
) -> tuple[Float[Tensor, "b tq h"], Float[Tensor, "b tq h"]]:
    """Return of every query the sum R of its weights f(s), and the entropy of f(s) / R in nats.

    Both are 0 where all weights are. In tiles of queries, recomputed in the backward pass.
    """
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    found = []
    with torch.autocast(q.device.type, enabled=False):
        for row in range(0, q.shape[-2], TILE):
            rows = slice(row, min(row + TILE, q.shape[-2]))
            last = k.shape[-2] - q.shape[-2] + rows.stop if causal else k.shape[-2]
            given = (q, k, kernel, slopes, causal, rows, slice(0, last))
            found.append(checkpoint(_weight_sums, *given, use_reentrant=False))
    sums, entropies = (torch.cat(parts, -1).transpose(1, 2) for parts in zip(*found, strict=True))
    return sums, entropies


def _weight_sums(
    q: Tensor, k: Tensor, kernel: str, slopes: Tensor | None, causal: bool, rows: slice, cols: slice
) -> tuple[Tensor, Tensor]:
    scores, future = _scores(q, k, q.shape[-1] ** -0.5, slopes, causal, rows, cols)
    weights = KERNELS[kernel][0](scores)
    weights = weights if future is None else weights.masked_fill(future, 0)
    least = torch.finfo(weights.dtype).tiny  # 0 log 0 = 0, with a finite gradient
    sums = weights.sum(-1)
    logs = (weights * weights.clamp(min=least).log()).sum(-1)
    divisor = sums.clamp(min=least)
    return sums, torch.where(sums > 0, divisor.log() - logs / divisor, 0)


def gaussian(
    x: Float[Tensor, "*b m d"], y: Float[Tensor, "*b n d"], scale: float
) -> Float[Tensor, "*b m n"]:
    """Return exp(-scale ||x_i - y_j||^2 / 2), whole: for the few rows of landmarks."""
    x, y = _with_norms(x, y)
    with torch.autocast(x.device.type, enabled=False):
        return (scale * (x @ y.mT)).clamp(max=0).exp()


def _with_norms(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Extend q and k by two channels, so that their product is -||q - k||^2 / 2."""
    q, k = (x.to(wide_dtype(x)) for x in (q, k))
    q_norm, k_norm = (-x.square().sum(-1, keepdim=True) / 2 for x in (q, k))
    return (
        torch.cat([q, q_norm, torch.ones_like(q_norm)], -1),
        torch.cat([k, torch.ones_like(k_norm), k_norm], -1),
    )


def _formula(q, k, v, kernel: str, scale: float, slopes: Tensor | None, causal: bool) -> Tensor:
    rows, cols = slice(0, q.shape[-2]), slice(0, k.shape[-2])
    scores, future = _scores(q, k, scale, slopes, causal, rows, cols)
    weights = KERNELS[kernel][0](scores)
    weights = weights if future is None else weights.masked_fill(future, 0)
    return weights @ v.to(weights.dtype)


def _scores(
    q, k, scale: float, slopes: Tensor | None, causal: bool, rows: slice, cols: slice
) -> tuple[Tensor, Tensor | None]:
    """Return a tile's scores, and which of them lie in the future; None where none does."""
    wide = wide_dtype(q)
    scores = (q[..., rows, :] @ k[..., cols, :].mT).to(wide) * scale
    first = k.shape[-2] - q.shape[-2] + rows.start  # the tile's first query, as a key
    if not causal or (slopes is None and cols.stop <= first + 1):
        return scores, None
    i = torch.arange(first, first + rows.stop - rows.start, device=q.device)
    distance = torch.arange(cols.start, cols.stop, device=q.device) - i[:, None]
    if slopes is not None:
        scores = scores + slopes.to(wide)[:, None, None] * distance
    return scores, distance > 0


def _tiles(queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yield the tiles of queries by keys in which some query sees some key."""
    for row in range(0, queries, TILE):
        rows = slice(row, min(row + TILE, queries))
        visible = keys - queries + rows.stop if causal else keys
        width = TILE * TILE // (rows.stop - row)
        for col in range(0, visible, width):
            yield rows, slice(col, min(col + width, visible))


class _Tiled(torch.autograd.Function):
    """With p = f(s):  dv = p^T do,  ds = f'(s) (do v^T),  dq = scale ds k,  dk = scale ds^T q."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel: str,
        scale: float,
        slopes: Tensor | None,
        causal: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = kernel, scale, slopes, causal
        wide = wide_dtype(q)
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=wide)
        for rows, cols in _tiles(q.shape[-2], k.shape[-2], causal):
            scores, future = _scores(q, k, scale, slopes, causal, rows, cols)
            weights = KERNELS[kernel][0](scores)
            weights = weights if future is None else weights.masked_fill_(future, 0)
            out[..., rows, :] += weights.to(v.dtype) @ v[..., cols, :]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (d_out,) = grads
        q, k, v = ctx.saved_tensors
        kernel, scale, slopes, causal = ctx.options
        value, slope = KERNELS[kernel]
        dq, dk, dv = (torch.zeros_like(x, dtype=d_out.dtype) for x in (q, k, v))
        d_out = d_out.to(v.dtype)
        with torch.autocast(q.device.type, enabled=False):
            for rows, cols in _tiles(q.shape[-2], k.shape[-2], causal):
                scores, future = _scores(q, k, scale, slopes, causal, rows, cols)
                weights, d_weights = value(scores), d_out[..., rows, :] @ v[..., cols, :].mT
                if future is not None:
                    weights.masked_fill_(future, 0)
                    d_weights.masked_fill_(future, 0)
                dv[..., cols, :] += weights.to(v.dtype).mT @ d_out[..., rows, :]
                d_scores = slope(scores).mul_(d_weights).mul_(scale).to(q.dtype)
                dq[..., rows, :] += d_scores @ k[..., cols, :]
                dk[..., cols, :] += d_scores.mT @ q[..., rows, :]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None
