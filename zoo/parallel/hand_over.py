"""A text split over ranks: each reads its chunk from the state that the rank before it left.

    Ranks       consecutive processes that read one text together; each has one chunk of it
    HandOver    a sublayer's state on its way through them: received before the chunk, sent after it
    publish     called by a sublayer whose state is known before its output, so that the next rank
                need not wait for that

A rank's chunk is a chunk as any other (zoo.mixers.base): outputs, states and gradients are those of
the whole text, because every causal sublayer's chunks compose. In the backward pass the gradient of
each state goes the other way.

No rank waits for a whole model: while the second one computes its first layer, the first is at its
second (a wavefront: Li 2021, TeraPipe, section 3.2, arXiv 2102.07988; states of linear attention
handed from rank to rank: Sun 2024, LASP, section 2.2, arXiv 2404.02882). Of a pass over L layers
each rank waits about (N - 1) / L, as far as a sublayer needs its state, and nothing is computed
twice. Softmax attention publishes its keys before it attends, so that all ranks attend at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Read = Callable[[Tensor, Any], tuple[Tensor, Any]]  # (chunk, state) -> (output, state after it)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
NUMBER = -1  # in place of a dtype: the leaf is a whole number, such as the tokens read so far
WORDS = 8  # int64 that describe a leaf: dtype, dimensions, sizes
HEADER_BYTES = WORDS * 8
TAGS = 64  # messages of one sublayer

_current: "HandOver | None" = None  # whose sublayer is being called


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
    _pending: list[tuple[Any, Tensor]] = field(default_factory=list)

    def chunk(self, tokens: int) -> slice:
        """Which of so many tokens this rank reads."""
        return slice(*(tokens * place // self.size for place in (self.index, self.index + 1)))

    def send(self, x: Tensor, to: int, tag: int) -> None:
        """Begin to send to the rank in place `to`; memory behind x must not change."""
        x = x.detach().contiguous()
        self.bytes_sent += x.numel() * x.element_size()
        self._pending.append((dist.isend(x, self.first + to, tag=tag), x))

    def receive(self, like: Tensor, source: int, tag: int) -> Tensor:
        """Wait for what the rank in place `source` sends: the same shape and dtype as `like`."""
        dist.recv(like, self.first + source, tag=tag)
        return like

    def finish(self) -> None:
        """Wait until everything sent so far has arrived."""
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()


class HandOver:
    """The state of one sublayer in one pass over a text, given in place of that state.

    Args:
        ranks: the processes that read the text.
        number: of the sublayer in its model.
    """

    def __init__(self, ranks: Ranks, number: int) -> None:
        self.ranks, self.tag = ranks, number * TAGS
        self.last = ranks.index == ranks.size - 1
        self._received: list[Any] | None = None  # leaves of the state before the chunk
        self._sent: list[Tensor] | None = None  # tensors of the state after it
        self._anchor: Tensor | None = None  # of this pass: ties what was sent to the output

    def read(self, sublayer: Read, x: Tensor, empty: Any) -> Tensor:
        """The sublayer's output for this rank's chunk x.

        A second call, as activation checkpointing makes it, repeats the first and sends nothing.

        Args:
            empty: its state before a text.
        """
        global _current
        anchor = x.new_zeros((), requires_grad=torch.is_grad_enabled())
        ties, state = [], empty
        if self.ranks.index:
            leaves, structure = tree_flatten(empty)
            if self._received is None:
                self._received = self._receive(leaves, x.device)
            tensors = [leaf for leaf in self._received if isinstance(leaf, Tensor)]
            tie, *tensors = _Received.apply(self, anchor, *tensors)
            ties.append(tie)
            rest = iter(tensors)
            found = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self._received]
            state = tree_unflatten(found, structure)
        outer, _current, self._anchor = _current, self, None
        try:
            y, after = sublayer(x, state)
            self.publish(after)
        finally:
            _current = outer
        if not self.last:
            ties.append(self._anchor)
        return _Tied.apply(y, *ties) if torch.is_grad_enabled() else y

    def publish(self, after: Any) -> None:
        """Send the state after the chunk to the next rank, if there is one; once in a pass."""
        if self.last or self._anchor is not None:
            return
        leaves = tree_flatten(after)[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self._sent is None:
            self._send(leaves, tensors)
            self._sent = [x.new_empty(()).expand(x.shape) for x in tensors]  # their shapes alone
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        self._anchor = _Sent.apply(self, anchor, *tensors)

    def _send(self, leaves: list[Any], tensors: list[Tensor]) -> None:
        to = self.ranks.index + 1
        words = torch.tensor([_described(leaf) for leaf in leaves])
        self.ranks.send(words.to(tensors[0].device), to, self.tag)
        for place, x in enumerate(tensors, 1):
            if x.numel():
                self.ranks.send(x, to, self.tag + place)

    def _receive(self, leaves: list[Any], device: torch.device) -> list[Any]:
        """The leaves of the state that the rank before sends, of the structure of `leaves`."""
        source, found, place = self.ranks.index - 1, [], 0
        words = torch.empty((len(leaves), WORDS), dtype=torch.int64, device=device)
        for code, dims, *sizes in self.ranks.receive(words, source, self.tag).tolist():
            if code == NUMBER:
                found.append(dims)
                continue
            place += 1
            x = torch.empty(sizes[:dims], dtype=DTYPES[code], device=device)
            found.append(self.ranks.receive(x, source, self.tag + place) if x.numel() else x)
        return found

    def send_gradients(self, gradients: tuple[Tensor, ...]) -> None:
        """Send the gradient of the state before the chunk to the rank that it came from."""
        for place, gradient in enumerate(gradients, 1):
            if gradient.is_floating_point() and gradient.numel():
                self.ranks.send(gradient, self.ranks.index - 1, self.tag + place)

    def receive_gradients(self) -> list[Tensor | None]:
        """Wait for the gradient of the state after the chunk."""
        assert self._sent is not None
        found: list[Tensor | None] = []
        for place, like in enumerate(self._sent, 1):
            if not like.is_floating_point():
                found.append(None)
                continue
            gradient = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            if gradient.numel():
                self.ranks.receive(gradient, self.ranks.index + 1, self.tag + place)
            found.append(gradient)
        return found


def publish(after: Any) -> None:
    """Send the state after a chunk on, if the sublayer being called is one of several ranks'."""
    if _current is not None:
        _current.publish(after)


def _described(leaf: Any) -> list[int]:
    if not isinstance(leaf, Tensor):
        return [NUMBER, leaf] + [0] * (WORDS - 2)
    words = [DTYPES.index(leaf.dtype), leaf.dim(), *leaf.shape]
    return words + [0] * (WORDS - len(words))


class _Received(torch.autograd.Function):
    """What was received, and a scalar that ties it to the loss, whether it is used or not."""

    @staticmethod
    def forward(ctx: Any, hand_over: HandOver, anchor: Tensor, *received: Tensor) -> Any:
        ctx.hand_over = hand_over
        found = [x.detach() for x in received]
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return anchor.clone(), *found

    @staticmethod
    def backward(ctx: Any, _tie: Tensor, *gradients: Tensor) -> Any:  # pyright: ignore
        ctx.hand_over.send_gradients(gradients)
        return None, None, *[None] * len(gradients)


class _Sent(torch.autograd.Function):
    """Tensors that were sent -> a scalar; their gradients are received."""

    @staticmethod
    def forward(ctx: Any, hand_over: HandOver, anchor: Tensor, *_sent: Tensor) -> Tensor:
        ctx.hand_over = hand_over
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, _tie: Tensor) -> Any:  # pyright: ignore
        return None, None, *ctx.hand_over.receive_gradients()


class _Tied(torch.autograd.Function):
    """y, of whose gradient the ties get a zero: their backward passes run whenever y's does."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *ties: Tensor) -> Tensor:
        ctx.ties = [tie.new_zeros(()) for tie in ties]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore
        return dy, *ctx.ties
