"""Attention patterns of rotary models: which keys each query sees, and at what distance.

For each block of queries an `AttentionPattern` returns key blocks: which keys, which of the queries
attend to them, and the positions to which queries and keys are rotated for it. Set `nearest` to
include the last N keys at their true positions; `views` then lists only the remaining keys. Blocks
of disjoint keys are parts of one softmax (`zoo.ops.attention`), so a remap of distances is a short
list of key blocks and nothing else; any chunking of the text and any block of queries gives the
same output. Keys are cached before any rotation, because a remap or a scaling may rotate the same
key to several positions.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.attention import biased
from zoo.attention.key_blocks import (
    KeyBlock,
    KeyIndex,
    RotationCache,
    Scaling,
    cut,
    distant_keys,
    identity,
    merged,
    positions_of,
)
from zoo.attention.window import last_tokens, window
from zoo.errors import refuse
from zoo.ops.attention import Part, attend
from zoo.ops.merge import Partial
from zoo.ops.runtime.sizes import ceil_div
from zoo.positions.rope import apply_rope

BLOCK_QUERIES = 1024  # queries that share key blocks: fused kernels take tiles of that many
MAX_BLOCK_QUERIES = 8192  # the same where key blocks are small


class AttentionPattern:
    """Plain causal attention: every key up to the query's own, at its true distance.

    Args:
        scaling: the rotary frequencies and the attention factor for a text of so many tokens.
        bucket: tokens; None where `scaling` does not depend on the length. Otherwise queries of
            the bucket up to n * `bucket` all use the frequencies for that length, so that a query's
            result depends on its position alone and not on how the text was cut into chunks.
    """

    nearest: int | None = None  # keys attended to at their true positions, besides the key blocks
    sinks = 0  # keys cached from the beginning of the text: if any, key blocks hold these alone
    top_k = 0  # keys that each query selects by its scores, which have no cap
    recent: int | None = None  # keys cached from its end; None: all

    def __init__(self, scaling: Scaling, *, bucket: int | None = None) -> None:
        self.scaling, self.bucket = scaling, bucket
        self.steps = [BLOCK_QUERIES] + ([bucket] if bucket else [])

    @property
    def longest_window(self) -> int:
        """The tokens behind which a query's keys differ from the one before's by one, or by none.

        Fewer than these are attended to otherwise, as with no window at all.
        """
        return self.nearest or 1

    def views(self, rows: range) -> list[KeyBlock]:
        return distant_keys(rows, 0, identity, identity)

    def blocks(self, rows: range) -> Iterator[range]:
        """`rows` cut at every multiple of every one of `steps`."""
        first = rows.start
        while first < rows.stop:
            last = min(rows.stop, *((first // step + 1) * step for step in self.steps))
            yield range(first, last)
            first = last

    def plan(self, queries: range, index: KeyIndex) -> Iterator[tuple[range, list[KeyBlock]]]:
        """Blocks of `queries`, each with its key blocks among the cached keys.

        ValueError where `views` breaks its rules; see `_check`.
        """
        for block in self.blocks(queries):
            views = self.views(block)
            for view in views:
                self._check(view, block)
            cached = (index.cached(view) for view in views)
            yield block, [view for view in cached if view is not None]

    def _check(self, view: KeyBlock, block: range) -> None:
        keys, rows = view.keys, view.rows or block
        if self.sinks and keys.stop > self.sinks:
            rule = f"with sinks={self.sinks} every key block must hold sinks alone"
        elif rows.start < block.start or rows.stop > block.stop:
            rule = f"the rows of a key block must be among {block}"
        elif view.causal and len(keys) != len(rows):
            rule = "a causal key block must have as many keys as queries"
        elif keys.start > rows.start or (not view.causal and keys.stop > rows.start + 1):
            rule = "no query may attend to later keys"
        else:
            return
        raise ValueError(f"{type(self).__name__}: {rule}. Got {keys} for queries {rows}.")

    def __call__(
        self,
        q: Float[Tensor, "b t h d"],
        k: Float[Tensor, "b n g d"],
        v: Float[Tensor, "b n g e"],
        start: int,
        backend: str = "auto",
        always: Sequence[Part] = (),
        softcap: float | None = None,
    ) -> Float[Tensor, "b t h e"]:
        """Attend from the queries at start, start + 1, ... to the cached keys and their own.

        `always` are further keys that each of these queries attends to, as they are. `softcap` is
        that of `zoo.ops.attention.attend`.
        """
        queries, stored = range(start, start + q.shape[1]), slice(self.sinks or None)
        index = KeyIndex(self.sinks, queries.stop - k.shape[1], k.shape[1])
        keys = RotationCache(k[:, stored], index.positions()[stored])
        nearest = (
            [(queries, self._attend_nearest(q, k, v, start, softcap, backend))]
            if self.nearest
            else []
        )
        outs, length, scaled = [], None, None
        for block, key_blocks in self.plan(queries, index):
            if scaled is None or length != self._length(block):
                length = self._length(block)
                scaled = self.scaling(length)
            rotated = RotationCache(cut(q, queries, block), positions_of(block)).use(scaled)
            results = [*nearest]
            if always:
                parts = [part._replace(q=cut(part.q, queries, block)) for part in always]
                results.append((block, attend(parts, softcap=softcap, backend=backend)))
            results += self.selected(block, cut(q, queries, block), k, v, index)
            for view in key_blocks:
                part = self._part(view, block, rotated, keys.use(scaled), v, index)
                partial = attend([part], softcap=softcap, backend=backend)
                results.append((view.rows or block, partial))
            outs += merged(block, results)
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    def with_slopes(
        self,
        q: Float[Tensor, "b t h d"],
        k: Float[Tensor, "b n g d"],
        v: Float[Tensor, "b n g e"],
        start: int,
        slopes: Sequence[float],
        backend: str = "auto",
    ) -> Float[Tensor, "b t h e"]:
        """Attend by scores that lose a slope per token of distance and head (`biased`)."""
        return biased.by_slopes(self, q, k, v, start, slopes, backend)

    def with_bias(
        self,
        q: Float[Tensor, "b t h d"],
        k: Float[Tensor, "b n g d"],
        v: Float[Tensor, "b n g e"],
        start: int,
        bias: biased.Bias,
    ) -> Float[Tensor, "b t h e"]:
        """Attend by scores with a bias of the two positions (`biased`)."""
        return biased.by_table(self, q, k, v, start, bias)

    def placed(self, positions: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return the positions of tokens in the text as those of an embedding."""
        return positions

    def placeable(self, positions: int) -> int:
        """Return how many tokens of a text have one of the first `positions` of an embedding."""
        return positions

    def selected(
        self,
        _block: range,
        _q: Float[Tensor, "b t h d"],
        _k: Float[Tensor, "b n g d"],
        _v: Float[Tensor, "b n g e"],
        _index: KeyIndex,
    ) -> list[tuple[range, Partial]]:
        """Attend from a block of queries to keys that each of them selects by its scores."""
        return []

    def _length(self, block: range) -> int:
        """The length of text whose frequencies a block of queries uses; 0: any."""
        return 0 if self.bucket is None else ceil_div(block.stop, self.bucket) * self.bucket

    def _part(
        self,
        view: KeyBlock,
        block: range,
        queries: RotationCache,
        keys: RotationCache,
        v: Tensor,
        index: KeyIndex,
    ) -> Part:
        """The part of the softmax that a key block is: its queries and keys rotated, its values."""
        rows, slots = view.rows or block, index.slots(view.keys)
        assert keys.scaled is not None
        inv_freq, factor = keys.scaled
        at = view.queries_at(positions_of(rows)) if self.sinks else None
        if at is not None and len(at) == 1 and not callable(inv_freq):
            # cheaper: rotate the few sinks back by it, and no query
            back = view.keys_at(keys.positions[slots]) - at
            q_rows, k_slots = queries.x, apply_rope(keys.x[:, slots], inv_freq, back, factor**2)
        else:
            q_rows, k_slots = queries[view.queries_at], keys[view.keys_at][:, slots]
        q_rows = cut(q_rows, block, rows)
        q_rows, k_slots = self.scored(q_rows, k_slots, rows.start - view.keys.start)
        return Part(q_rows, k_slots, v[:, slots], view.causal, times=view.times)

    def _attend_nearest(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, softcap: float | None, backend: str
    ) -> Partial:
        """Attend to the nearest keys; where keys were dropped the sinks are not among them."""
        assert self.nearest is not None
        if start + q.shape[1] > k.shape[1]:
            k, v = k[:, self.sinks :], v[:, self.sinks :]
        inv_freq, factor = self.scaling(start + q.shape[1])
        k, v = (last_tokens(x, q.shape[1] + self.nearest - 1) for x in (k, v))
        at = torch.arange(start + q.shape[1] - k.shape[1], start + q.shape[1])
        k = apply_rope(k, inv_freq, at, factor)
        q = apply_rope(q, inv_freq, at[k.shape[1] - q.shape[1] :], factor)
        return window(q, k, v, self.nearest, softcap=softcap, backend=backend)

    def scored(self, q: Tensor, k: Tensor, origin: int) -> tuple[Tensor, Tensor]:
        """Change rotated queries and keys of a key block before their products are scores.

        The first query's position is `origin` after the first key's.
        """
        return q, k

    def evict(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Evict the keys and values that no later query attends to."""
        if self.recent is None or k.shape[1] <= self.sinks + self.recent:
            return k, v
        last = k.shape[1] - self.recent
        return tuple(torch.cat([x[:, : self.sinks], x[:, last:]], 1) for x in (k, v))  # type: ignore

    def cached(self, tokens: int) -> int:
        """The number of keys cached after so many tokens."""
        return tokens if self.recent is None else min(tokens, self.sinks + self.recent)


def check_window(window: int, most: int) -> None:
    """Raise UserError unless the window has 1 to `most` tokens, as many as were trained."""
    if not 1 <= window <= most:
        refuse("window", window, f"must be from 1 to {most}, within the trained length")


def distances(pattern: AttentionPattern, tokens: int) -> Float[Tensor, "n n"]:
    """Draw the distance at which each query attends to each key, as the papers' figures do.

    NaN where it does not. The key blocks are those of the computation (`AttentionPattern.plan`).
    Raises ValueError where these break their rules or a query attends to a key twice.
    """
    grid = torch.full((tokens, tokens), torch.nan, dtype=torch.float64)
    at = torch.arange(tokens)
    if pattern.nearest:
        apart = at[:, None] - at
        nearest_keys = (apart >= 0) & (apart < pattern.nearest)
        grid[nearest_keys] = apart[nearest_keys].double()
    for block, key_blocks in pattern.plan(range(tokens), KeyIndex(pattern.sinks, 0, tokens)):
        for view in key_blocks:
            rows, keys = (slice(x.start, x.stop) for x in (view.rows or block, view.keys))
            apart = view.queries_at(at[rows])[:, None] - view.keys_at(at[keys]).double()
            cells = grid[rows, keys]
            sees = torch.ones_like(cells, dtype=torch.bool)
            sees = sees.tril() if view.causal else sees
            if (sees & ~cells.isnan()).any():
                raise ValueError(f"{type(pattern).__name__}: a query attends to a key twice")
            cells[sees] = apart.expand_as(cells)[sees]
    return grid
