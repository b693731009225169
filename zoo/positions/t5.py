"""T5's relative positions (Raffel 2020, section 2.1, arXiv 1910.10683): a learned bias per head and
bucket of distances, score(i, j) += B[bucket(i - j), h].

Near distances have a bucket each, farther ones share buckets of geometrically growing width, and
all from `max_distance` on share the last: a longer text has no distance without a bias. Departures:
T5 has one table for all layers, and no 1/sqrt(d) on its scores.

Memory is linear in the tokens. Keys from `max_distance` on share one bias per head, which shifts
the lse of plain attention over those keys. A bias is formed for nearer keys alone, one tile of
queries at a time, and again in the backward pass.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.config.domains import Positive
from zoo.errors import refuse
from zoo.ops.attention import Part, attend, repeat_heads
from zoo.ops.dtypes import wide_dtype
from zoo.ops.merge import merge
from zoo.positions.base import CrossLayer, Positions

TILE = 512  # queries


def bucket(
    distance: Int[Tensor, "*n"],
    *,
    buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = False,
) -> Int[Tensor, "*n"]:
    """Return the bucket of each distance i - j from a query i to a key j.

    Args:
        bidirectional: keys after the query, i < j, have the upper half of the buckets; otherwise
            they share bucket 0 with the query's own key.
    """
    side = buckets // 2 if bidirectional else buckets
    exact = _exact_distances(buckets, max_distance, bidirectional)
    apart = distance.abs() if bidirectional else distance.clamp(min=0)
    log_fraction = torch.log(apart.double().clamp(min=exact) / exact) / math.log(
        max_distance / exact
    )
    logarithmic = (exact + log_fraction * (side - exact)).long().clamp(max=side - 1)
    found = torch.where(apart < exact, apart, logarithmic)
    return found + side * (distance < 0) if bidirectional else found


def _exact_distances(buckets: int, max_distance: int, bidirectional: bool) -> int:
    """Return how many distances have a bucket of their own: half of one side's."""
    exact = buckets // (4 if bidirectional else 2)
    if exact < 1:
        refuse("buckets", buckets, f"must be at least {4 if bidirectional else 2}")
    if exact >= max_distance:
        rule = f"gives {exact} distances a bucket each, but max_distance={max_distance}"
        refuse("buckets", buckets, rule, "Use fewer buckets or a larger max_distance.")
    return exact


class RelativeBias(nn.Module):
    """A learned bias per bucket and head, initially zero. Its weight is not decayed."""

    def __init__(
        self,
        *,
        heads: int,
        buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        _exact_distances(buckets, max_distance, bidirectional)
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(buckets, heads))
        self.weight.no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self, queries_at: Num[Tensor, " tq"], keys_at: Num[Tensor, " tk"]
    ) -> Float[Tensor, "h tq tk"]:
        """Return the bias between every query and key, by their positions; fractions of a distance,
        which some extensions give, are cut off."""
        apart = queries_at[:, None] - keys_at
        found = bucket(
            apart.floor().long() if apart.is_floating_point() else apart,
            buckets=self.weight.shape[0],
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        return self.weight[found].movedim(-1, 0)


class T5(Positions):
    """T5's biases, one table per layer.

    Args:
        buckets: biases per head.
        max_distance: tokens from which on all distances share the last bucket.
    """

    one_sided: ClassVar[bool] = True
    takes_sink: ClassVar[bool] = False
    takes_softcap: ClassVar[bool] = False
    takes_pattern: ClassVar[bool] = True

    def __init__(
        self,
        heads: int,
        head_width: int,
        /,
        *,
        buckets: Positive = 32,
        max_distance: Positive = 128,
    ) -> None:
        super().__init__(heads, head_width)
        self.bias = RelativeBias(heads=heads, buckets=buckets, max_distance=max_distance)

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
        if self.pattern is not None:
            return self.pattern.with_bias(q, k, v, start, self.bias).to(v.dtype)
        return t5_attention(q, k, v, self.bias, backend=backend)


def t5_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b n g d"],
    v: Float[Tensor, "b n g e"],
    bias: RelativeBias,
    *,
    backend: str = "auto",
) -> Float[Tensor, "b t h e"]:
    """Return biased causal attention; the queries are the last t of the n tokens."""
    first, outs = k.shape[1] - q.shape[1], []
    for rows in q.split(TILE, 1):
        last = first + rows.shape[1]
        nearest = max(first - bias.max_distance + 1, 0)  # keys before it share the last bucket
        at = torch.arange(nearest, last, device=q.device)
        own = at[first - nearest :]
        nearest_k, nearest_v = (repeat_heads(x[:, nearest:last], q.shape[2]) for x in (k, v))
        args = (rows, nearest_k, nearest_v, bias(own, at), own[:, None] >= at)
        results = [checkpoint(dense_attention, *args, use_reentrant=False)]
        if nearest:
            out, lse = attend([Part(rows, k[:, :nearest], v[:, :nearest])], backend=backend)
            results.append((out, lse + bias.weight[-1]))
        outs.append(merge(results)[0])
        first = last
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def dense_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h e"],
    bias: Float[Tensor, "h #t #n"],
    mask: Bool[Tensor, "t n"],
) -> tuple[Tensor, Tensor]:
    """Return softmax(q k^T / sqrt(d) + bias) v and its lse; without a visible key 0 and -inf."""
    wide = wide_dtype(q)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).to(wide) * q.shape[-1] ** -0.5 + bias
    scores = scores.masked_fill(~mask, -torch.inf)
    blind = ~mask.any(-1)
    lse = scores.masked_fill(blind[:, None], 0.0).logsumexp(-1)  # keeps gradients finite
    weights = torch.exp(scores - lse[..., None]).to(v.dtype)
    lse = lse.masked_fill(blind, -torch.inf)
    return torch.einsum("bhij,bjhe->bihe", weights, v), lse.transpose(1, 2)
