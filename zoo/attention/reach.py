"""How far rotary attention reaches: which keys a query sees, and at what distance it sees them.

A `Reach` answers for a block of queries with a list of views: some keys, the positions that the
queries and these keys are turned to, and a mask. One that sees the `nearest` keys where they stand
names their number instead, and lists the others. Views of disjoint keys are parts of one softmax
(`zoo.ops.attention`), so a remap of distances is a short list of views and nothing else; any
chunking of the text and any block of queries gives the same output. Keys are kept as they were
before any turn, because a remap or a scaling may turn the same key to several positions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.attention.window import Partial, seen_later, window
from zoo.ops.attention import Part, attend, merge
from zoo.positions.rope import Frequencies, turned

BLOCK = 512  # queries that share a list of views,
FEW = 4096  # and where views are of few keys

KeyMap = Callable[[Int[Tensor, " n"]], Tensor]  # where keys stand -> where they are turned to
Scaling = Callable[[int], tuple[Frequencies, float]]  # length -> (inv_freq, attention factor)


class View(NamedTuple):
    """Keys as a block of queries sees them."""

    keys: range  # where they stand in the text
    queries_at: Tensor  # (t,), the positions the queries are turned to
    keys_at: KeyMap
    mask: Bool[Tensor, "t n"] | None = None  # True where the query sees the key
    causal: bool = False  # the queries' own keys: each sees those up to its own
    times: float = 1.0  # that each key counts in the softmax


def plain(positions: Tensor) -> Tensor:
    """Keys turned to where they stand."""
    return positions


def origin(positions: Tensor) -> Tensor:
    """Keys not turned at all, so that a query turned to m sees them at distance m."""
    return torch.zeros_like(positions)


class Reach:
    """Plain causal attention: every key up to the query's own, at its true distance.

    `scaling` gives the frequencies for a text of so many tokens; where it depends on the length,
    queries of the bucket up to n * `bucket` all use those for that length, so that what a query
    sees depends on its position alone and not on how the text was cut into chunks.
    """

    nearest: int | None = None  # keys seen where they stand, besides those of the views
    sinks = 0  # keys kept from the beginning of the text
    recent: int | None = None  # and from its end; None: all

    def __init__(self, scaling: Scaling, *, bucket: int | None = None) -> None:
        self.scaling, self.bucket = scaling, bucket
        self.steps = [BLOCK] + ([bucket] if bucket else [])

    def views(self, rows: range) -> list[View]:
        at = torch.arange(rows.start, rows.stop)
        views = [View(rows, at, plain, causal=True)]
        return [*views, View(range(rows.start), at, plain)] if rows.start else views

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
        near = self._near(q, k, v, start, backend) if self.nearest else None
        outs, keys, scaled, length = [], {}, None, None
        for rows in self.blocks(range(start, start + q.shape[1])):
            reached = (
                rows.stop if self.bucket is None else -(-rows.stop // self.bucket) * self.bucket
            )
            if scaled is None or (self.bucket and reached != length):
                before, scaled, length = scaled, self.scaling(reached), reached
                keys = keys if _same(before, scaled) else {}
            inv_freq, factor = scaled
            here = slice(rows.start - start, rows.stop - start)
            parts = [part._replace(q=part.q[:, here]) for part in always]
            for view in self.views(rows):
                view = self._kept(view, dropped)
                if view is None:
                    continue
                run = slice(place(view.keys.start), place(view.keys.stop - 1) + 1)
                at = view.queries_at
                if self._turns_keys_alone(view, inv_freq):
                    back = view.keys_at(stands[run]) - at[0]
                    seen, turned_q = turned(k[:, run], inv_freq, back, factor**2), q[:, here]
                else:
                    if view.keys_at not in keys:
                        keys[view.keys_at] = turned(k, inv_freq, view.keys_at(stands), factor)
                    seen = keys[view.keys_at][:, run]
                    turned_q = turned(q[:, here], inv_freq, at, factor)
                turned_q, seen = self.scored(turned_q, seen, rows.start - view.keys.start)
                mask = None if view.mask is None else view.mask[None, None].to(q.device)
                parts.append(Part(turned_q, seen, v[:, run], view.causal, mask, view.times))
            results = [attend(parts, backend=backend)] if parts else []
            if near:
                results.append((near[0][:, here], near[1][:, here]))
            outs.append(merge(results)[0] if len(results) > 1 else results[0][0])
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    def _near(self, q: Tensor, k: Tensor, v: Tensor, start: int, backend: str) -> Partial:
        """The queries over the nearest keys; where tokens were dropped the sinks are not among."""
        assert self.nearest is not None
        if start + q.shape[1] > k.shape[1]:
            k, v = k[:, self.sinks :], v[:, self.sinks :]
        inv_freq, factor = self.scaling(start + q.shape[1])
        k, v = (seen_later(x, q.shape[1] + self.nearest - 1) for x in (k, v))
        at = torch.arange(start + q.shape[1] - k.shape[1], start + q.shape[1])
        k = turned(k, inv_freq, at, factor)
        q = turned(q, inv_freq, at[k.shape[1] - q.shape[1] :], factor)
        return window(q, k, v, self.nearest, backend=backend)

    def _turns_keys_alone(self, view: View, inv_freq: Frequencies) -> bool:
        """Where many queries are turned to one position, their few keys are turned back instead."""
        at = view.queries_at
        few = len(view.keys) < len(at) and not callable(inv_freq)
        return few and bool((at == at[0]).all())

    def _kept(self, view: View, dropped: int) -> View | None:
        """The view without keys that are gone: those a training window left behind."""
        gone = self.sinks + dropped - view.keys.start
        if gone <= 0 or view.keys.start < self.sinks:
            return view
        keys = range(view.keys.start + gone, view.keys.stop)
        mask = None if view.mask is None else view.mask[:, gone:]
        return view._replace(keys=keys, mask=mask) if len(keys) else None

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


def far(
    rows: range, width: int, queries_at: Tensor, keys_at: KeyMap, last: int | None = None
) -> list[View]:
    """Keys (before `last`) that lie `width` or more before the query, as the maps say."""
    end = rows.stop - width if last is None else min(rows.stop - width, last)
    whole = max(min(rows.start - width + 1, end), 0)  # seen by every row
    views = [View(range(whole), queries_at, keys_at)] if whole else []
    if whole < end:
        ragged = range(whole, end)
        views.append(View(ragged, queries_at, keys_at, mask=distance(rows, ragged) >= width))
    return views


def distance(rows: range, keys: range) -> Int[Tensor, "t n"]:
    """How far each key lies before each query."""
    return torch.arange(rows.start, rows.stop)[:, None] - torch.arange(keys.start, keys.stop)


def _nearest(rows: range, width: int | None) -> list[View]:
    """The view that `nearest` stands for."""
    if width is None:
        return []
    keys = range(max(rows.start - width + 1, 0), rows.stop)
    apart = distance(rows, keys)
    at = torch.arange(rows.start, rows.stop)
    return [View(keys, at, plain, mask=(apart >= 0) & (apart < width))]


def distances(reach: Reach, tokens: int) -> Float[Tensor, "n n"]:
    """The distance at which each query sees each key, NaN where it does not: what the paper draws.

    Raises ValueError where a key is seen twice.
    """
    seen = torch.full((tokens, tokens), torch.nan, dtype=torch.float64)
    for rows in reach.blocks(range(tokens)):
        for view in [*reach.views(rows), *_nearest(rows, reach.nearest)]:
            stand = torch.arange(view.keys.start, view.keys.stop)
            apart = view.queries_at[:, None] - view.keys_at(stand).double()
            mask = view.mask
            if view.causal:
                mask = distance(rows, view.keys) >= 0
            mask = torch.ones_like(apart, dtype=torch.bool) if mask is None else mask
            cells = seen[rows.start : rows.stop, view.keys.start : view.keys.stop]
            if (mask & ~cells.isnan()).any():
                raise ValueError("a query sees a key twice")
            cells[mask] = apart[mask]
    return seen
