"""Key blocks: consecutive keys, which queries attend to them, and what both are rotated to.

KeyBlock            what an `AttentionPattern` returns for a block of queries
identity, constant  maps from positions in the text to positions of rotation
distant_keys        the key blocks of all keys farther than a window
KeyIndex            where the keys of a text lie in a cache that has evicted some
RotationCache       tokens rotated by each map, computed once
merged              the partial results of a block's key blocks as its outputs
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.ops.merge import merge
from zoo.positions.rope import Frequencies, apply_rope

# Positions of tokens in the text -> positions they are rotated to: one each, or one for all.
PositionMap = Callable[[Int[Tensor, " n"]], Tensor]
Scaled = tuple[Frequencies, float]  # inverse frequencies and the attention factor
Scaling = Callable[[int], Scaled]  # of a text of that many tokens


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


@dataclass(frozen=True)
class constant:  # noqa: N801 (read as the function it stands for)
    """Rotate all tokens to one position; with keys at 0, a query's position is the distance."""

    position: int

    def __call__(self, _positions: Tensor) -> Tensor:
        return torch.tensor([self.position])


class KeyIndex(NamedTuple):
    """Which keys of a text are cached: the first `sinks`, and all from `sinks` + `dropped` on."""

    sinks: int
    dropped: int
    size: int

    def positions(self) -> Int[Tensor, " n"]:
        """The positions of the cached keys in the text."""
        slots = torch.arange(self.size)
        return torch.where(slots < self.sinks, slots, slots + self.dropped)

    def slots(self, keys: range) -> slice:
        """Where consecutive keys lie in the cache, which holds all of them."""
        return slice(self._slot(keys.start), self._slot(keys.stop - 1) + 1)

    def _slot(self, position: int) -> int:
        return position if position < self.sinks else position - self.dropped

    def cached(self, block: KeyBlock) -> KeyBlock | None:
        """The key block without keys that are not cached: those a training window left behind."""
        gone = self.sinks + self.dropped - block.keys.start
        if gone <= 0 or block.keys.start < self.sinks:
            return block
        if gone >= len(block.keys):
            return None
        rows = block.rows[gone:] if block.causal and block.rows else block.rows
        return block._replace(keys=block.keys[gone:], rows=rows)


class RotationCache:
    """Tokens rotated to the positions that maps give, computed once for each map.

    Maps are compared by `==`: methods of one pattern and `constant` compare by what they do.
    """

    def __init__(self, x: Float[Tensor, "b n h d"], positions: Int[Tensor, " n"]) -> None:
        self.x, self.positions = x, positions
        self.scaled: Scaled | None = None
        self.rotated: dict[PositionMap, Tensor] = {}

    def use(self, scaled: Scaled) -> "RotationCache":
        """Rotate with these frequencies from now on; what others gave is dropped."""
        if not _same(self.scaled, scaled):
            self.scaled, self.rotated = scaled, {}
        return self

    def __getitem__(self, position_map: PositionMap) -> Float[Tensor, "b n h d"]:
        if position_map not in self.rotated:
            assert self.scaled is not None
            inv_freq, factor = self.scaled
            rotated = apply_rope(self.x, inv_freq, position_map(self.positions), factor)
            self.rotated[position_map] = rotated
        return self.rotated[position_map]


def _same(one: Scaled | None, other: Scaled) -> bool:
    """Whether both rotate alike; trained frequencies only where they are the very same tensor."""
    if one is None or one[1] != other[1]:
        return False
    if isinstance(one[0], torch.Tensor) or isinstance(other[0], torch.Tensor):
        return one[0] is other[0]
    return one[0] == other[0]


def distant_keys(
    rows: range,
    width: int,
    queries_at: PositionMap,
    keys_at: PositionMap,
    last: int | None = None,
) -> list[KeyBlock]:
    """Key blocks of the keys (before `last`) that are `width` or more before the query."""
    if last is not None and rows.stop > width + last:  # late rows attend to all of them
        late = range(max(rows.start, width + last), rows.stop)
        views = [KeyBlock(range(last), queries_at, keys_at, late)] if last else []
        return [*distant_keys(range(rows.start, late.start), width, queries_at, keys_at), *views]
    seeing = range(max(rows.start, width), rows.stop)
    if not seeing:
        return []
    first = seeing.start - width
    views = [KeyBlock(range(first, seeing.stop - width), queries_at, keys_at, seeing, causal=True)]
    return [*views, KeyBlock(range(first), queries_at, keys_at, seeing)] if first else views


def positions_of(rows: range) -> Tensor:
    return torch.arange(rows.start, rows.stop)


def cut(x: Tensor, whole: range, rows: range) -> Tensor:
    """The given rows of a tensor that holds all of `whole`."""
    return x[:, rows.start - whole.start : rows.stop - whole.start]


def merged(block: range, results: Sequence[tuple[range, tuple[Tensor, Tensor]]]) -> list[Tensor]:
    """Merge partial results into the block's outputs, cut where some of their rows begin or end."""
    edges = {edge for rows, _ in results for edge in (rows.start, rows.stop) if edge in block}
    outs = []
    for first, last in pairwise(sorted(edges | {block.start, block.stop})):
        over = [
            (cut(out, rows, range(first, last)), cut(lse, rows, range(first, last)))
            for rows, (out, lse) in results
            if first in rows
        ]
        outs.append(merge(over)[0])
    return outs
