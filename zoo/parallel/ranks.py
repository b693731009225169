"""The processes that read one text together, and which of them reads which part of it.

    Ranks   consecutive processes, and what they send each other
    Split   the chunks that a text is cut into, by their places from 0, and who reads them

One chunk for each rank serves states of a fixed size: every chunk costs the same. Of causal softmax
attention the last of N such chunks costs (2 N - 1) / N times the mean, because it reads all keys.
In zigzag there are 2 N chunks, of which rank r reads those at r and 2 N - 1 - r: the work of every
rank is the same (Grattafiori 2024, Llama 3, section 3.3.2, arXiv 2407.21783, whose ranks gather all
keys instead of handing them over). Where only outputs are computed, a rank may read each of these
parts in several chunks, one after another: what a layer computes at a time is then smaller.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from zoo.ops.runtime.sizes import ceil_div


@dataclass
class Ranks:
    """Consecutive processes that read one text together.

    Args:
        size: their number, N.
        index: this one's place among them, from 0.
        first: rank of the first in the process group.
    """

    size: int
    index: int
    first: int = 0
    bytes_sent: int = 0  # by this process, of states and their gradients
    _turn: int = 0
    _pending: list[tuple[int, Any, Tensor]] = field(
        default_factory=list
    )  # turn, work, what it sends
    _kept: dict[int, list[Tensor]] = field(default_factory=dict)  # what it sent to itself, by tag

    def send(self, x: Tensor, to: int, tag: int) -> None:
        """Begin to send to another rank, or keep for this one; memory behind x must not change."""
        if to == self.index:
            self._kept.setdefault(tag, []).append(x.detach() if x.requires_grad else x)
            return
        x = x.detach().contiguous()
        self.bytes_sent += x.numel() * x.element_size()
        self._pending.append((self._turn, dist.isend(x, self.first + to, tag=tag), x))

    def receive(self, like: Tensor, source: int, tag: int) -> Tensor:
        """Wait for what a rank sends: the same shape and dtype as `like`, which may be filled."""
        if source == self.index:
            return self._kept[tag].pop(0)
        dist.recv(like, self.first + source, tag=tag)
        return like

    def enter(self, turn: int) -> None:
        """Begin a turn: what was sent in a turn is received by the end of the next, and not kept
        longer.

        Nobody waits for a rank that waits for him, as long as all ranks take turns in order and
        what a turn receives was sent in an earlier one, or in this one by a call that waits for
        nothing that is sent later.
        """
        self._turn = turn
        self.finish(before=turn - 1)

    def finish(self, before: int | None = None) -> None:
        """Wait until everything sent so far, or in turns before one, has arrived."""
        left = []
        for sent in self._pending:
            if before is None or sent[0] < before:
                sent[1].wait()
            else:
                left.append(sent)
        self._pending = left


class Split(NamedTuple):
    """A text cut into chunks, each of which one of `ranks` reads."""

    ranks: Ranks
    parts: int  # as many as ranks or twice as many
    tokens: int
    chunks_each: int = 1  # of a part

    @classmethod
    def of(cls, ranks: Ranks, tokens: int, zigzag: bool, chunk: int | None = None) -> "Split":
        """In zigzag where that is possible: no chunk may be empty.

        Args:
            chunk: about the most tokens that a rank reads at a time; None: a whole part.
        """
        twice = zigzag and 1 < ranks.size <= tokens // 2
        parts = ranks.size * (1 + twice)
        each = 1 if chunk is None else min(ceil_div(tokens, parts * chunk), tokens // parts)
        return cls(ranks, parts, tokens, each)

    @property
    def last(self) -> int:
        """The place of the last chunk."""
        return self.parts * self.chunks_each - 1

    def part(self, place: int) -> int:
        """The part, from 0, that the chunk at a place is of."""
        return place // self.chunks_each

    def owner(self, place: int) -> int:
        """Which rank reads the chunk at a place."""
        part = self.part(place)
        return min(part, self.parts - 1 - part) if self.parts > self.ranks.size else part

    def chunks(self) -> dict[int, slice]:
        """The tokens of each chunk that this rank reads, by its place."""
        own = [place for place in range(self.last + 1) if self.owner(place) == self.ranks.index]
        return {place: slice(self._start(place), self._start(place + 1)) for place in own}

    def send(self, x: Tensor, to: int, tag: int) -> None:
        """Begin to send to whoever reads the chunk at a place."""
        self.ranks.send(x, self.owner(to), tag)

    def receive(self, like: Tensor, source: int, tag: int) -> Tensor:
        """Wait for what whoever reads the chunk at a place sends."""
        return self.ranks.receive(like, self.owner(source), tag)

    def _start(self, place: int) -> int:
        return self.tokens * place // (self.last + 1)
