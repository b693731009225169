"""ALiBi: attention with linear biases, score(i, j) -= slope_h (i - j) (Press 2022, section 3, arXiv
2108.12409).

A softmax ignores a constant per row, so the bias can be slope_h j, a function of the key alone. It
is two more channels of q and k: attention kernels need not know of it, and no bias is formed.
The lse is shifted by slope_h i, the same for every part of a query's keys.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.errors import refuse
from zoo.ops.attention import Part, attention, own_and_past
from zoo.positions.base import CrossLayer, Positions, placed_keys

CHUNK = 2048  # queries that share an origin; keeps slope * j small where it matters
_STEP = 64  # j = 64 * high + low, both exact in bfloat16 up to 16k keys away


def slopes(heads: int, factor: float = 1.0) -> list[float]:
    """Return each head's slope, 2^(-8(h+1)/heads); the published code's where heads are no 2^n.

    Args:
        factor: L'/L, by which slopes are divided: a text of L' tokens has the biases of one of L
            (Al-Khateeb 2023, section 3, arXiv 2310.13017).
    """
    if not factor >= 1:
        refuse("factor", factor, "must be at least 1")
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    rest = [2 ** (-8 * (h + 0.5) / power) for h in range(heads - power)]
    return [slope / factor for slope in first + rest]


def add_bias_channels(
    q: Float[Tensor, "b tq h d"],
    k: Float[Tensor, "b tk g dk"],
    origin: int,
    factor: float = 1.0,
    positions: Int[Tensor, "b tk"] | None = None,
) -> tuple[Float[Tensor, "b tq h d2"], Float[Tensor, "b tk g dk2"]]:
    """Return q and k whose product is the score times 1/sqrt(d) plus slope_h (j - origin).

    Call attention with `scale=1`.

    Args:
        origin: index in `k` of the first query, which may be past its end.
        factor: as in `slopes`.
        positions: those of the keys, where not 0, 1, 2 ...
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


class ALiBi(Positions):
    """Linear biases. `slope_factor` divides the slopes."""

    one_sided: ClassVar[bool] = True
    takes_sink: ClassVar[bool] = False
    takes_softcap: ClassVar[bool] = False
    takes_pattern: ClassVar[bool] = True
    placeable: ClassVar[bool] = True
    scaled_by: ClassVar[tuple[str, ...]] = ("zoo.positions.alibi",)

    slope_factor = 1.0

    def slopes(self) -> list[float]:
        return slopes(self.heads, self.slope_factor)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: int,
        cross_layer: CrossLayer | None = None,
        *,
        causal: bool = True,
        sinks: Sequence[Part] = (),
        backend: str = "auto",
    ) -> Tensor:
        at, end, outs = placed_keys(self, cross_layer), k.shape[1] - q.shape[1], []
        if self.pattern is not None and at is None:
            return self.pattern.with_slopes(q, k, v, start, self.slopes(), backend).to(v.dtype)
        for rows in q.split(CHUNK, 1):
            past, end = end, end + rows.shape[1]
            keys_at = None if at is None else at[:, :end]
            q_biased, k_biased = add_bias_channels(
                rows, k[:, :end], past, self.slope_factor, keys_at
            )
            parts = own_and_past(q_biased, k_biased, v[:, :end])
            outs.append(attention(parts, scale=1.0, backend=backend))
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    def scale(self, scaling: Callable[..., Any], factor: float, original_length: int) -> None:
        """Divide every slope by the factor."""
        slopes(self.heads, factor)
        self.slope_factor = factor
