"""Attention patterns of rotary models: which keys each query sees, and at what distance.

For each block of queries an `AttentionPattern` returns key blocks: which keys, which of the queries
attend to them, and the positions to which queries and keys are rotated for it. Set `nearest` to
include the last N keys at their true positions; `views` then lists only the remaining keys. Blocks
of disjoint keys are parts of one softmax (`zoo.ops.attention`), so a remap of distances is a short
list of key blocks and nothing else; any chunking of the text and any block of queries gives the
same output. Keys are cached before any rotation, because a remap or a scaling may rotate the same
key to several positions.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.attention.window import last_tokens, window
from zoo.ops.attention import Part, attend
from zoo.ops.merge import Partial, merge
from zoo.positions.rope import Frequencies, apply_rope

BLOCK_QUERIES = 1024  # queries that share key blocks: fused kernels take tiles of that many
MAX_BLOCK_QUERIES = 8192  # the same where key blocks are small

# Positions of tokens in the text -> positions they are rotated to: one each, or one for all.
PositionMap = Callable[[Int[Tensor, " n"]], Tensor]
Scaling = Callable[[int], tuple[Frequencies, float]]  # length -> (inv_freq, attention factor)


class KeyBlock(NamedTuple):
    """Consecutive keys and how a block of queries attends to them."""

    keys: range  # their positions in the text
    queries_at: PositionMap
    keys_at: PositionMap
    rows: range | None = None  # positions of the queries that attend; None: the whole block
    causal: bool = False  # as many keys as queries: query i attends to the first i
    times: float = 1.0  # how many times each key counts in the softmax


def identity(positions: Tensor) -> Tensor:
    """Rotate tokens to their own positions."""
    return positions


@cache  # one function per position: rotated tokens are cached by their map
def constant(position: int) -> PositionMap:
    """Rotate all tokens to one position; with keys at 0, a query's position is the distance."""
    return lambda positions: torch.tensor([position])


class AttentionPattern:
    """Plain causal attention: every key up to the query's own, at its true distance.

    `scaling` gives the frequencies for a text of so many tokens; where it depends on the length,
    queries of the bucket up to n * `bucket` all use those for that length, so that what a query
    sees depends on its position alone and not on how the text was cut into chunks.
    """

    nearest: int | None = None  # keys seen where they stand, besides those of the views
    sinks = 0  # keys kept from the beginning of the text; views are of these alone if there are any
    recent: int | None = None  # and from its end; None: all

    def __init__(self, scaling: Scaling, *, bucket: int | None = None) -> None:
        self.scaling, self.bucket = scaling, bucket
        self.steps = [BLOCK_QUERIES] + ([bucket] if bucket else [])

    def views(self, rows: range) -> list[KeyBlock]:
        return distant_keys(rows, 0, identity, identity)

    def blocks(self, rows: range) -> Iterator[range]:
        """`rows` cut at every multiple of every one of `steps`."""
        first = rows.start
        while first < rows.stop:
            last = min(rows.stop, *((first // step + 1) * step for step in self.steps))
            yield range(first, last)
            first = last

    def __call__(
        self,
        q: Float[Tensor, "b t h d"],
        k: Float[Tensor, "b n h d"],
        v: Float[Tensor, "b n h e"],
        start: int,
        backend: str = "auto",
        always: Sequence[Part] = (),
    ) -> Float[Tensor, "b t h e"]:
        """Attention of the queries at start, start + 1, ... over the kept keys and their own.

        `always` are further keys that each of these queries sees, as they are.
        """
        dropped = start + q.shape[1] - k.shape[1]

        def place(position: int) -> int:
            return position if position < self.sinks else position - dropped

        stands = torch.arange(k.shape[1])
        stands = torch.where(stands < self.sinks, stands, stands + dropped)
        viewed = slice(self.sinks or None)
        whole = range(start, start + q.shape[1])
        near = self._near(q, k, v, start, backend) if self.nearest else None
        outs, keys, scaled, length = [], {}, None, None
        for block in self.blocks(whole):
            reached = (
                block.stop if self.bucket is None else -(-block.stop // self.bucket) * self.bucket
            )
            if scaled is None or (self.bucket and reached != length):
                before, scaled, length = scaled, self.scaling(reached), reached
                if not _same(before, scaled):
                    keys = _Turned(k[:, viewed], stands[viewed], *scaled)
            inv_freq, factor = scaled
            queries = _Turned(_cut(q, whole, block), _positions(block), *scaled)
            results = [(whole, near)] if near else []
            if always:
                parts = [part._replace(q=_cut(part.q, whole, block)) for part in always]
                results.append((block, attend(parts, backend=backend)))
            for view in self.views(block):
                view = self._kept(view, dropped)
                if view is None:
                    continue
                rows = view.rows or block
                run = slice(place(view.keys.start), place(view.keys.stop - 1) + 1)
                at = view.queries_at(_positions(rows)) if self.sinks else None
                if at is not None and len(at) == 1 and not callable(inv_freq):
                    # few keys are turned back by where all of the queries stand, which stay
                    back = view.keys_at(stands[run]) - at
                    seen = apply_rope(k[:, run], inv_freq, back, factor**2)
                    seeing = _cut(q, whole, rows)
                else:
                    seen = keys[view.keys_at][:, run]
                    seeing = _cut(queries[view.queries_at], block, rows)
                seeing, seen = self.scored(seeing, seen, rows.start - view.keys.start)
                part = Part(seeing, seen, v[:, run], view.causal, times=view.times)
                results.append((rows, attend([part], backend=backend)))
            outs += _merged(block, results)
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    def _near(self, q: Tensor, k: Tensor, v: Tensor, start: int, backend: str) -> Partial:
        """The queries over the nearest keys; where tokens were dropped the sinks are not among."""
        assert self.nearest is not None
        if start + q.shape[1] > k.shape[1]:
            k, v = k[:, self.sinks :], v[:, self.sinks :]
        inv_freq, factor = self.scaling(start + q.shape[1])
        k, v = (last_tokens(x, q.shape[1] + self.nearest - 1) for x in (k, v))
        at = torch.arange(start + q.shape[1] - k.shape[1], start + q.shape[1])
        k = apply_rope(k, inv_freq, at, factor)
        q = apply_rope(q, inv_freq, at[k.shape[1] - q.shape[1] :], factor)
        return window(q, k, v, self.nearest, backend=backend)

    def _kept(self, view: KeyBlock, dropped: int) -> KeyBlock | None:
        """The view without keys that are gone: those a training window left behind."""
        gone = self.sinks + dropped - view.keys.start
        if gone <= 0 or view.keys.start < self.sinks:
            return view
        if gone >= len(view.keys):
            return None
        rows = view.rows[gone:] if view.causal and view.rows else view.rows
        return view._replace(keys=view.keys[gone:], rows=rows)

    def scored(self, q: Tensor, k: Tensor, origin: int) -> tuple[Tensor, Tensor]:
        """Turned queries and the keys of a view as their products score.

        The first query stands `origin` keys after the view's first.
        """
        del origin
        return q, k

    def keep(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What of the keys and values later queries may see."""
        if self.recent is None or k.shape[1] <= self.sinks + self.recent:
            return k, v
        last = k.shape[1] - self.recent
        return tuple(torch.cat([x[:, : self.sinks], x[:, last:]], 1) for x in (k, v))  # type: ignore

    def kept(self, tokens: int) -> int:
        """How many keys are kept after so many tokens."""
        return tokens if self.recent is None else min(tokens, self.sinks + self.recent)


def _same(one: tuple[Frequencies, float] | None, other: tuple[Frequencies, float]) -> bool:
    """Whether keys turned by the one serve the other; trained frequencies, only the very same."""
    if one is None or one[1] != other[1]:
        return False
    if isinstance(one[0], torch.Tensor) or isinstance(other[0], torch.Tensor):
        return one[0] is other[0]
    return one[0] == other[0]


class _Turned(dict[PositionMap, Tensor]):
    """Tokens turned to all the places that are asked for, once to each."""

    def __init__(self, x: Tensor, stands: Tensor, inv_freq: Frequencies, factor: float) -> None:
        super().__init__()
        self.x, self.stands, self.scaled = x, stands, (inv_freq, factor)

    def __missing__(self, places: PositionMap) -> Tensor:
        inv_freq, factor = self.scaled
        self[places] = apply_rope(self.x, inv_freq, places(self.stands), factor)
        return self[places]


def _positions(rows: range) -> Tensor:
    return torch.arange(rows.start, rows.stop)


def _cut(x: Tensor, whole: range, rows: range) -> Tensor:
    """Those rows of a tensor that has all of `whole`."""
    return x[:, rows.start - whole.start : rows.stop - whole.start]


def _merged(block: range, results: Sequence[tuple[range, Partial]]) -> list[Tensor]:
    """The block's outputs, cut where the rows of some partial results begin or end."""
    edges = {edge for rows, _ in results for edge in (rows.start, rows.stop) if edge in block}
    outs = []
    for first, last in pairwise(sorted(edges | {block.start, block.stop})):
        over = [
            (_cut(out, rows, range(first, last)), _cut(lse, rows, range(first, last)))
            for rows, (out, lse) in results
            if first in rows
        ]
        outs.append(merge(over)[0])
    return outs


def distant_keys(
    rows: range,
    width: int,
    queries_at: PositionMap,
    keys_at: PositionMap,
    last: int | None = None,
) -> list[KeyBlock]:
    """Keys (before `last`) that lie `width` or more before the query, as the maps say."""
    if last is not None and rows.stop > width + last:  # these see all of them
        late = range(max(rows.start, width + last), rows.stop)
        views = [KeyBlock(range(last), queries_at, keys_at, late)] if last else []
        return [*distant_keys(range(rows.start, late.start), width, queries_at, keys_at), *views]
    seeing = range(max(rows.start, width), rows.stop)
    if not seeing:
        return []
    first = seeing.start - width
    views = [KeyBlock(range(first, seeing.stop - width), queries_at, keys_at, seeing, causal=True)]
    return [*views, KeyBlock(range(first), queries_at, keys_at, seeing)] if first else views


def distances(pattern: AttentionPattern, tokens: int) -> Float[Tensor, "n n"]:
    """The distance at which each query sees each key, NaN where it does not: what the paper draws.

    Raises ValueError where a key is seen twice.
    """
    seen = torch.full((tokens, tokens), torch.nan, dtype=torch.float64)
    at = torch.arange(tokens)
    if pattern.nearest:
        apart = at[:, None] - at
        near = (apart >= 0) & (apart < pattern.nearest)
        seen[near] = apart[near].double()
    for block in pattern.blocks(range(tokens)):
        for view in pattern.views(block):
            rows, keys = (slice(x.start, x.stop) for x in (view.rows or block, view.keys))
            apart = view.queries_at(at[rows])[:, None] - view.keys_at(at[keys]).double()
            cells = seen[rows, keys]
            sees = torch.ones_like(cells, dtype=torch.bool)
            sees = sees.tril() if view.causal else sees
            if (sees & ~cells.isnan()).any():
                raise ValueError("a query sees a key twice")
            cells[sees] = apart.expand_as(cells)[sees]
    return seen


# The names of before, for the modules that still import them.
Reach = AttentionPattern
View = KeyBlock
plain = identity
