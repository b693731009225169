"""Computes the average of AFT-full (Zhai 2021, section 3.1): a weight for every pair of positions.

    y_t = sum_{t' <= t} e^{k_t' + w_{t,t'}} v_t' / sum_{t' <= t} e^{k_t' + w_{t,t'}}     per channel

Tiles of queries, each recomputed in the backward: time quadratic, memory linear in the tokens.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.ops.dtypes import wide_dtype
from zoo.ops.exponential_sums import average, causal_sums, dense_sums
from zoo.ops.runtime.sizes import next_power_of_two
from zoo.ops.wkv4 import LOG_ZERO

TILE_QUERIES = 128


def aft_full(
    k: Float[Tensor, "b n d"],
    v: Float[Tensor, "b n d"],
    left: Float[Tensor, "t r"],
    right: Float[Tensor, "n r"],
) -> Float[Tensor, "b t d"]:
    """Return the averages of the last t of n tokens, with w = left right^T.

    Arithmetic is float32 or better. Raises `ValueError` on shapes that do not fit.
    """
    if left.shape[0] > k.shape[1] or right.shape[0] != k.shape[1] or v.shape != k.shape:
        raise ValueError(
            f"aft_full: k {tuple(k.shape)}, v {tuple(v.shape)}, left {tuple(left.shape)} and right "
            f"{tuple(right.shape)} do not fit"
        )
    t, wide = len(left), wide_dtype(k)
    size = min(TILE_QUERIES, next_power_of_two(t))
    short = -t % size
    with torch.autocast(k.device.type, enabled=False):
        keys = F.pad(k.to(wide), (0, 0, 0, short), value=LOG_ZERO)
        values = F.pad(v.to(wide), (0, 0, 0, short))
        left, right = (F.pad(x.to(wide), (0, 0, 0, short)) for x in (left, right))
        ys, end = [], k.shape[1] - t
        for rows in left.split(size):
            end += size
            y = checkpoint(
                _tile, rows, right[:end], keys[:, :end], values[:, :end],
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            ys.append(y)
    return torch.cat(ys, 1)[:, :t].to(v.dtype)


def _tile(left: Tensor, right: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Average over all keys for the last queries: dense over the past, causal over their own."""
    w, past = left @ right.t(), len(right) - len(left)
    if not past:
        return average([causal_sums(w, k, v)])
    cut = past, len(left)  # one split has one gradient, where two slices each have one of all keys
    before, own = zip(*(x.split(cut, 1) for x in (w, k, v)), strict=True)
    return average([causal_sums(*own), dense_sums(*before)])
