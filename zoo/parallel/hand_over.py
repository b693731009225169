"""A text split over ranks: a chunk is read from the state that was left where it begins.

    HandOver    a sublayer's state on its way to a chunk, given in the place of that state
    publish     called by a sublayer that knows a part of its state before its output

A rank's chunk is a chunk as any other (zoo.mixers.base): outputs, states and gradients are those of
the whole text, because every causal sublayer's chunks compose. In the backward pass the gradient of
each state goes the other way.

No rank waits for a whole model: while the second one computes its first layer, the first is at its
second (a wavefront, as in TeraPipe, Li 2021, arXiv 2102.07988; LASP hands the states of linear
attention from rank to rank, Sun 2024, arXiv 2404.02882). Each field of a state is a message of its
own, sent when it is published and received when it is read: what a layer computes before it needs
its state, and after it has left it, no other rank waits for. So a pass over L layers takes longer
by N - 1 times what one layer does in between. The other way, to read each chunk from the empty
state, to compose the maps of all chunks and to correct the outputs, does that part twice in every
layer: handing over is the cheaper while there are fewer ranks than layers. Softmax attention has
nothing in between: its keys are published before it attends, and all ranks attend at once. Of two
chunks of one rank the later one is read while the earlier one's call is at that place
(`zoo.model.chunks.read_chunks`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from zoo.parallel.ranks import Split

Read = Callable[[Tensor, Any], tuple[Tensor, Any]]  # (chunk, state) -> (output, state after it)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
DTYPES += (torch.uint8,)  # of quantized keys and values
NUMBER = -1  # in place of a dtype: the leaf is a whole number, such as the tokens read so far
WORDS = 8  # int64 that describe a leaf: dtype, dimensions, sizes
HEADER_BYTES = WORDS * 8
TAGS, FIELD = 1024, 32  # messages of a sublayer, and of a field of its state
WHOLE = ""  # the name of a state without fields

_current: "_Pass | None" = None  # of the sublayer that is being called


class HandOver:
    """The state of one sublayer in one pass over a text, given in the place of that state.

    Args:
        split: the text's, over its ranks.
        place: of the chunk.
        number: of the sublayer in its model.
        keeps: return the state after the chunk as well, which takes its memory.
        again: keep what was received for a second call, which takes its memory until then.
        published: called once, when all of the state after the chunk is published.
    """

    def __init__(
        self,
        split: Split,
        place: int,
        number: int,
        keeps: bool = False,
        again: bool = False,
        published: Callable[[], None] | None = None,
    ) -> None:
        self.split, self.place, self.tag = split, place, number * TAGS
        self.keeps, self.again, self.published = keeps, again, published
        self.received: dict[str, list[Any]] = {}  # leaves of each field, for a second call
        self.sent: dict[str, list[Tensor]] = {}  # shapes of the tensors of the state after

    def read(self, sublayer: Read, x: Tensor, empty: Any) -> tuple[Tensor, Any]:
        """The sublayer's output for the chunk x, and its state after it or ().

        A second call, as activation checkpointing makes it, repeats the first and sends nothing;
        it needs `again`, as nothing is sent to it either.

        Args:
            empty: its state before a text.
        """
        global _current
        this = _Pass(self, empty, x)
        outer, _current = _current, this
        try:
            y, after = sublayer(x, this.state)
            this.finish(after)
        finally:
            _current = outer
            this.arrived.clear()  # the pass and its state hold each other until Python collects
        y = _Tied.apply(y, *this.ties) if this.ties else y
        return y, after if self.keeps else ()

    def send(self, leaves: list[Any], tag: int, device: torch.device) -> None:
        """Send a field of the state after the chunk to the next chunk's rank."""
        to = self.place + 1
        words = torch.tensor([_described(leaf) for leaf in leaves], device=device)
        self.split.send(words, to, tag)
        for place, x in enumerate(_tensors(leaves), 1):
            if x.numel():
                self.split.send(x, to, tag + place)

    def receive(self, count: int, tag: int, device: torch.device) -> list[Any]:
        """The leaves of a field of the state before the chunk, of which there are so many."""
        source, found, place = self.place - 1, [], 0
        words = torch.empty((count, WORDS), dtype=torch.int64, device=device)
        for code, dims, *sizes in self.split.receive(words, source, tag).tolist():
            if code == NUMBER:
                found.append(dims)
                continue
            place += 1
            x = torch.empty(sizes[:dims], dtype=DTYPES[code], device=device)
            found.append(self.split.receive(x, source, tag + place) if x.numel() else x)
        return found

    def send_gradients(self, gradients: Sequence[Tensor], tag: int) -> None:
        """Send the gradients of a field to the rank that it came from."""
        for place, gradient in enumerate(gradients, 1):
            if gradient.is_floating_point() and gradient.numel():
                self.split.send(gradient, self.place - 1, tag + place)

    def receive_gradients(self, sent: Sequence[Tensor], tag: int) -> list[Tensor | None]:
        """Wait for the gradients of a field that was sent; None of what is not differentiable."""
        found: list[Tensor | None] = []
        for place, like in enumerate(sent, 1):
            if not like.is_floating_point():
                found.append(None)
                continue
            gradient = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            if gradient.numel():
                gradient = self.split.receive(gradient, self.place + 1, tag + place)
            found.append(gradient)
        return found


class _Pass:
    """One call of a sublayer: the fields of its state that have arrived, and those sent."""

    def __init__(self, hand_over: HandOver, empty: Any, x: Tensor) -> None:
        self.hand_over, self.device = hand_over, x.device
        self.fields = _fields(empty)
        self.tags = {name: hand_over.tag + FIELD * i for i, name in enumerate(self.fields)}
        self.arrived: dict[str, Any] = {}
        self.published: set[str] = set()
        self.ties: list[Tensor] = []  # scalars of a backward pass that sends or receives
        self.state = empty
        if hand_over.place:
            self.state = _arriving(type(empty))(self) if WHOLE not in self.fields else self[WHOLE]

    def __getitem__(self, name: str) -> Any:
        """A field of the state before the chunk, which is waited for."""
        if name in self.arrived:
            return self.arrived[name]
        hand_over, (leaves, structure) = self.hand_over, tree_flatten(self.fields[name])
        if leaves:
            found = hand_over.received.get(name)
            if found is None:
                found = hand_over.receive(len(leaves), self.tags[name], self.device)
            if hand_over.again:
                hand_over.received[name] = found
            leaves = found
        if (tensors := _tensors(leaves)) and torch.is_grad_enabled():
            tie, *tensors = _Received.apply(hand_over, self.tags[name], self._anchor(), *tensors)
            self._tie(tie)
            rest = iter(tensors)
            leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.arrived[name] = tree_unflatten(leaves, structure)
        return self.arrived[name]

    def publish(self, fields: Mapping[str, Any]) -> None:
        """Send those fields of the state after the chunk that were not sent yet."""
        hand_over = self.hand_over
        if hand_over.place == hand_over.split.last:
            return
        for name in [name for name in fields if name not in self.published]:
            self.published.add(name)
            leaves = tree_flatten(fields[name])[0]
            tensors = _tensors(leaves)
            if leaves and name not in hand_over.sent:
                hand_over.send(leaves, self.tags[name], self.device)
                hand_over.sent[name] = [x.new_empty(()).expand(x.shape) for x in tensors]
            if tensors and torch.is_grad_enabled():
                sent = hand_over.sent[name]
                tag = self.tags[name]
                self._tie(_Sent.apply(hand_over, tag, sent, self._anchor(), *tensors))
        if hand_over.published and len(self.published) == len(self.fields):
            then, hand_over.published = hand_over.published, None
            then()

    def finish(self, after: Any) -> None:
        """Send what was not published, and receive what was not read."""
        self.publish(_fields(after))
        for name in self.fields if self.hand_over.place else ():
            self[name]

    def _anchor(self) -> Tensor:
        return torch.zeros((), device=self.device, requires_grad=torch.is_grad_enabled())

    def _tie(self, tie: Tensor) -> None:
        if tie.requires_grad:
            self.ties.append(tie)


def publish(**fields: Any) -> None:
    """Send fields of the state after a chunk on, where the chunk is one of several ranks'."""
    if _current is not None:
        _current.publish(fields)


def _fields(state: Any) -> dict[str, Any]:
    return state._asdict() if hasattr(state, "_fields") else {WHOLE: state}


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@functools.cache
def _arriving(kind: Any) -> Callable[[_Pass], Any]:
    """A NamedTuple of the kind from a pass, each of whose fields is waited for when it is read."""

    def field(name: str) -> property:
        return property(lambda self: self._pass[name])

    def every(self: Any) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in kind._fields)

    reads: dict[str, Any] = {name: field(name) for name in kind._fields}
    reads["__iter__"] = lambda self: iter(every(self))
    reads["__getitem__"] = lambda self, index: every(self)[index]
    reads["_replace"] = lambda self, **given: kind(*every(self))._replace(**given)
    lazy = type(kind.__name__, (kind,), reads)

    def made(this: _Pass) -> Any:
        state = lazy(*this.fields.values())
        state._pass = this
        return state

    return made


def _described(leaf: Any) -> list[int]:
    if not isinstance(leaf, Tensor):
        return [NUMBER, leaf] + [0] * (WORDS - 2)
    words = [DTYPES.index(leaf.dtype), leaf.dim(), *leaf.shape]
    return words + [0] * (WORDS - len(words))


class _Received(torch.autograd.Function):
    """What was received, and a scalar that ties it to the loss, whether it is used or not."""

    @staticmethod
    def forward(ctx: Any, hand_over: HandOver, tag: int, anchor: Tensor, *received: Tensor) -> Any:
        ctx.hand_over, ctx.tag = hand_over, tag
        found = [x.detach() for x in received]
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return anchor.clone(), *found

    @staticmethod
    def backward(ctx: Any, _tie: Tensor, *gradients: Tensor) -> Any:  # pyright: ignore
        ctx.hand_over.send_gradients(gradients, ctx.tag)
        return None, None, None, *[None] * len(gradients)


class _Sent(torch.autograd.Function):
    """Tensors that were sent -> a scalar; their gradients are received."""

    @staticmethod
    def forward(
        ctx: Any, hand_over: HandOver, tag: int, sent: list[Tensor], anchor: Tensor, *_: Tensor
    ) -> Tensor:
        ctx.hand_over, ctx.tag, ctx.sent = hand_over, tag, sent
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, _tie: Tensor) -> Any:  # pyright: ignore
        return None, None, None, None, *ctx.hand_over.receive_gradients(ctx.sent, ctx.tag)


class _Tied(torch.autograd.Function):
    """y, of whose gradient the ties get a zero: their backward passes run whenever y's does."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *ties: Tensor) -> Tensor:
        ctx.ties = [tie.new_zeros(()) for tie in ties]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore
        return dy, *ctx.ties
