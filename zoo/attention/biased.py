"""Attention patterns without rotation: scores with a bias of the positions of query and key.

    by_slopes    a slope per head and token of distance is taken off (ALiBi: Press 2022, arXiv
                 2108.12409): two more channels of queries and keys, so that fused kernels serve
    by_table     any bias of the two positions, such as T5's (Raffel 2020, arXiv 1910.10683), formed
                 for one tile of queries and keys at a time and again in the backward pass

The positions are those to which an `AttentionPattern` would rotate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.attention.key_blocks import KeyBlock, KeyIndex, cut, identity, merged, positions_of
from zoo.attention.window import window
from zoo.ops.attention import Part, attend, repeat_heads
from zoo.ops.dtypes import wide_dtype
from zoo.ops.merge import Partial
from zoo.positions.t5 import dense_attention

if TYPE_CHECKING:
    from zoo.attention.pattern import AttentionPattern

Bias = Callable[[Tensor, Tensor], Tensor]  # positions of queries and of keys -> (h, queries, keys)
TILE_QUERIES, TILE_KEYS = 512, 2048


def by_slopes(
    pattern: AttentionPattern,
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b n g d"],
    v: Float[Tensor, "b n g e"],
    start: int,
    slopes: Sequence[float],
    backend: str,
) -> Float[Tensor, "b t h e"]:
    """Attend from the queries at start, start + 1, ... to the cached keys and their own."""
    queries = range(start, start + q.shape[1])
    index = KeyIndex(pattern.sinks, queries.stop - k.shape[1], k.shape[1])
    outs = []
    for block, key_blocks in pattern.plan(queries, index):
        results = []
        if pattern.nearest:
            near = nearest_keys(pattern, block, index)
            part = _part(near, block, q, k, v, queries, index, slopes)
            results.append((block, window(*part[:3], pattern.nearest, backend=backend)))
        for view in key_blocks:
            part = _part(view, block, q, k, v, queries, index, slopes)
            results.append((view.rows or block, attend([part], backend=backend)))
        outs += merged(block, results)
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def nearest_keys(pattern: AttentionPattern, block: range, index: KeyIndex) -> KeyBlock:
    """The cached keys that are among the nearest of any query of a block."""
    assert pattern.nearest is not None
    first = max(block.start - pattern.nearest + 1, 0)
    first = max(first, pattern.sinks + index.dropped) if index.dropped else first
    return KeyBlock(range(first, block.stop), identity, identity)


def _part(
    view: KeyBlock,
    block: range,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: range,
    index: KeyIndex,
    slopes: Sequence[float],
) -> Part:
    """The part of the softmax that a key block is, its bias two more channels of q and k.

    These are in float32 or better, and count from the block's first query, as large positions would
    lose the distance.
    """
    rows, slots, origin = view.rows or block, index.slots(view.keys), block.start
    wide = wide_dtype(q)
    q_rows, k_slots = cut(q, queries, rows).to(wide), k[:, slots].to(wide)
    q_at = view.queries_at(positions_of(rows)).double() - origin
    k_at = view.keys_at(positions_of(view.keys)).double() - origin
    at = [x.to(q.device, wide).reshape(1, -1, 1, 1) for x in (q_at, k_at)]
    slope = torch.tensor(slopes, dtype=wide, device=q.device).reshape(1, 1, -1, 1)
    scale = (q.shape[-1] + 2) ** 0.5  # which attention divides by
    ones = [x[..., :1].new_ones(()).expand(*x.shape[:3], 1) for x in (q_rows, k_slots)]
    q_more = torch.cat([slope * ones[0], -slope * at[0] * ones[0]], -1)
    k_more = torch.cat([at[1] * ones[1], ones[1]], -1)
    q_all = torch.cat([q_rows * q.shape[-1] ** -0.5, q_more], -1) * scale
    k_all = torch.cat([k_slots, k_more], -1)
    return Part(q_all, k_all, v[:, slots].to(wide), view.causal, times=view.times)


def by_table(
    pattern: AttentionPattern,
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b n g d"],
    v: Float[Tensor, "b n g e"],
    start: int,
    bias: Bias,
) -> Float[Tensor, "b t h e"]:
    """Attend from the queries at start, start + 1, ... to the cached keys and their own."""
    queries = range(start, start + q.shape[1])
    index, outs = KeyIndex(pattern.sinks, queries.stop - k.shape[1], k.shape[1]), []
    k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))
    for block, key_blocks in pattern.plan(queries, index):
        results: list[tuple[range, Partial]] = []
        views: list[tuple[KeyBlock, int | None]] = [(view, None) for view in key_blocks]
        if pattern.nearest:
            views.append((nearest_keys(pattern, block, index), pattern.nearest))
        for view, nearest in views:
            for rows, keys, visible in _tiles(view, view.rows or block, nearest):
                q_tile, slots = cut(q, queries, rows), index.slots(keys)
                at = view.queries_at(positions_of(rows)), view.keys_at(positions_of(keys))
                table = bias(*(x.to(q.device) for x in at)) + math.log(view.times)
                given = (q_tile, k[:, slots], v[:, slots], table, visible.to(q.device))
                results.append((rows, checkpoint(dense_attention, *given, use_reentrant=False)))
        outs += merged(block, results)
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def _tiles(
    view: KeyBlock, rows: range, nearest: int | None
) -> Iterator[tuple[range, range, Bool[Tensor, "tq tk"]]]:
    """Tiles of queries and keys with which of the keys each query sees.

    `nearest`: the key block is that of so many nearest keys of each query.
    """
    origin = 0 if nearest else rows.start - view.keys.start
    for row in range(rows.start, rows.stop, TILE_QUERIES):
        some = range(row, min(row + TILE_QUERIES, rows.stop))
        for key in range(view.keys.start, view.keys.stop, TILE_KEYS):
            keys = range(key, min(key + TILE_KEYS, view.keys.stop))
            apart = positions_of(some)[:, None] - positions_of(keys) - origin
            visible = torch.ones_like(apart, dtype=torch.bool)
            if view.causal or nearest:
                visible = apart >= 0
            if nearest:
                visible = visible & (apart < nearest)
            if visible.any():
                yield some, keys, visible
