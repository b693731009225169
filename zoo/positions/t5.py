"""Relative position buckets (Raffel 2020, T5, section 2.1): score(i, j) += B[bucket(i - j), h].

Near distances have a bucket each, farther ones share buckets whose widths grow geometrically, and
all from `max_distance` on share the last: nothing about a longer text is new to the table. T5 has
one table for all layers, and no 1/sqrt(d) on its scores.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def bucket(
    distance: Int[Tensor, "*n"],
    *,
    buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = False,
) -> Int[Tensor, "*n"]:
    """The bucket of each distance i - j, of the query i before which, if positive, the key j lies.

    One-sided, keys after the query share bucket 0 with the query's own; `bidirectional`, they
    have the upper half of the buckets.
    """
    side = buckets // 2 if bidirectional else buckets
    exact = side // 2
    if not 0 < exact < max_distance:
        raise ValueError(
            f"buckets={buckets}: at least {4 if bidirectional else 2}, and fewer single distances "
            f"({exact}) than max_distance={max_distance}"
        )
    apart = distance.abs() if bidirectional else distance.clamp(min=0)
    shared = torch.log(apart.double().clamp(min=exact) / exact) / math.log(max_distance / exact)
    far = (exact + shared * (side - exact)).long().clamp(max=side - 1)
    found = torch.where(apart < exact, apart, far)
    return found + side * (distance < 0) if bidirectional else found


class RelativeBias(nn.Module):
    """A learned bias per bucket and head; zero at first, when attention knows no positions."""

    def __init__(
        self,
        *,
        heads: int,
        buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(buckets, heads))

    def forward(
        self, queries_at: Int[Tensor, " tq"], keys_at: Int[Tensor, " tk"]
    ) -> Float[Tensor, "h tq tk"]:
        """The bias of every query and key, by where they stand."""
        found = bucket(
            queries_at[:, None] - keys_at,
            buckets=self.weight.shape[0],
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        return self.weight[found].movedim(-1, 0)
