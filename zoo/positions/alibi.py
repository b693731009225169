"""Attention with linear biases (Press 2022, section 3): score(i, j) -= slope_h (i - j).

Softmax does not see a constant per row, so the bias is a function of the key alone, slope * j,
and that is two more channels of q and k: attention kernels need not know of it, and no (t, t)
bias is ever formed. The lse is shifted by slope * i, the same for every part of a query's keys.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 2048  # queries that share an origin; keeps slope * j small where it matters
_STEP = 64  # j = 64 * high + low: both exact in bfloat16 up to 16k keys away


def slopes(heads: int, factor: float = 1.0) -> list[float]:
    """2^(-8(h+1)/heads); for other than a power of two, as the published code fills them up.

    Divided by `factor` = L'/L they are interpolated: a text of L' tokens has the biases of one
    of L (Al-Khateeb 2023).
    """
    if not factor >= 1:
        raise ValueError(f"factor={factor}: ALiBi is interpolated by 1 or more")
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    rest = [2 ** (-8 * (h + 0.5) / power) for h in range(heads - power)]
    return [slope / factor for slope in first + rest]


def add_bias_channels(
    q: Float[Tensor, "b tq h d"],
    k: Float[Tensor, "b tk h d"],
    origin: int,
    factor: float = 1.0,
    positions: Int[Tensor, "b tk"] | None = None,
) -> tuple[Float[Tensor, "b tq h d2"], Float[Tensor, "b tk h d2"]]:
    """q and k whose product carries the score scaled by 1/sqrt(d) plus slope_h (j - origin).

    `origin` is the index in `k` of the first query, which may be past its end, `factor` as in
    `slopes`, `positions` where keys and queries stand if not at 0, 1, 2 ..; call attention with
    `scale=1`.
    """
    slope = torch.tensor(slopes(q.shape[2], factor), dtype=q.dtype, device=q.device)
    if positions is None:
        distance = torch.arange(k.shape[1], device=k.device) - origin
    else:
        distance = positions - positions[:, origin, None]
    high = torch.div(distance, _STEP, rounding_mode="floor")
    where = torch.stack([high, distance - _STEP * high], -1).to(k.dtype)  # (tk, 2) or (b, tk, 2)
    weight = torch.stack([_STEP * slope, slope], -1)  # (h, 2)
    return (
        torch.cat([q * q.shape[-1] ** -0.5, weight.expand(*q.shape[:3], 2)], -1),
        torch.cat([k, where.unsqueeze(-2).expand(*k.shape[:3], 2)], -1),
    )
