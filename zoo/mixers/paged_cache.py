"""A key/value cache in pages (Kwon 2023, PagedAttention, section 4, arXiv 2309.06180).

    PAGE            consecutive tokens of one text, with their keys and values in one layer
    PagePool        the memory of a layer's pages, and which of them are free
    PagedKeyValues  the state of one text: the pages of its tokens, in order (its block table)

A text that goes on from the state of another shares its pages. What is written behind a page that
is not full goes into the page itself, unless another text has written there already: then the page
is copied (copy on write), and no state ever changes. A page is free again when the last state that
has it is gone: Python counts the references. So a text wastes less than a page, and no text
reserves memory for what it may still become.

Attention reads pages gathered into one tensor, a layer and a text at a time. Where a scheme evicts
tokens its cache has a fixed size, as the state of a recurrence, and stays one tensor.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.mixers.parts import KeyValues
from zoo.mixers.softmax import SoftmaxAttention
from zoo.ops.attention import Part
from zoo.ops.runtime.sizes import ceil_div
from zoo.positions.base import CrossLayer, Positions

PAGE = 16  # tokens
SLAB = 16  # pages that are allocated at a time


class PagePool:
    """The memory of pages (2, PAGE, h, d), keys and values, allocated SLAB pages at a time.

    Attributes:
        memory: each page's own.
        free: pages that no state has.
    """

    def __init__(self, heads: int, width: int, like: Tensor) -> None:
        self.shape = 2, PAGE, heads, width
        self.kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.memory: list[Tensor] = []
        self.free: list[int] = []

    def take(self) -> "Page":
        """Return a free page."""
        if not self.free:
            first = len(self.memory)
            with torch.inference_mode(False):  # so that it may be written in any mode
                self.memory += torch.empty((SLAB, *self.shape), **self.kind).unbind()
            self.free += range(first + SLAB - 1, first - 1, -1)
        return Page(self, self.free.pop())


class Page:
    """A page in use; `filled` of its tokens are written."""

    __slots__ = ("filled", "memory", "pool", "slot")

    def __init__(self, pool: PagePool, slot: int) -> None:
        self.pool, self.slot, self.filled = pool, slot, 0
        self.memory = pool.memory[slot]

    def __del__(self) -> None:
        self.pool.free.append(self.slot)


class PagedKeyValues(NamedTuple):
    """The pages of a text, of which the last may not be full."""

    pages: tuple[Page, ...]
    tokens_seen: int


class PagedCache:
    """How an attention layer reads and writes pages.

    Args:
        positions: the layer's position scheme, which attends.
        heads, head_width: of keys and values.
    """

    def __init__(self, positions: Positions, *, heads: int, head_width: int) -> None:
        self.positions, self.heads, self.head_width = positions, heads, head_width
        self.pools: dict[tuple[torch.dtype, torch.device], PagePool] = {}

    def empty(self, state: KeyValues) -> PagedKeyValues:
        """Return the state before the first token; ValueError for several texts in one state."""
        if len(state.k) != 1:
            raise ValueError("a state in pages is that of one text")
        return PagedKeyValues((), 0)

    def state_bytes(self, tokens: int, batch: int, item: int) -> int:
        """Return the bytes of a text's pages after so many tokens."""
        return batch * ceil_div(tokens, PAGE) * 2 * PAGE * self.heads * self.head_width * item

    def attend(
        self,
        q: Float[Tensor, "1 t h d"],
        k: Float[Tensor, "1 t g d"],
        v: Float[Tensor, "1 t g d"],
        state: PagedKeyValues,
        cross_layer: CrossLayer | None,
        sinks: Sequence[Part],
        backend: str,
    ) -> tuple[Float[Tensor, "1 t h d"], PagedKeyValues]:
        """Return the attention of a chunk's queries, and the state after the chunk."""
        start = state.tokens_seen
        after = self.append(state, torch.stack([k[0], v[0]]))
        k, v = gather(after)
        y = self.positions.attend(q, k, v, start, cross_layer, sinks=sinks, backend=backend)
        return y, after

    def append(self, state: PagedKeyValues, kv: Float[Tensor, "2 t g d"]) -> PagedKeyValues:
        """Return the state with the keys and values of t tokens behind it."""
        kind = kv.dtype, kv.device
        if kind not in self.pools:
            self.pools[kind] = PagePool(self.heads, self.head_width, kv)
        pool = self.pools[kind]
        pages, written, tokens = [*state.pages], 0, kv.shape[1]
        while written < tokens:
            filled = (state.tokens_seen + written) % PAGE
            if not filled:
                pages.append(pool.take())
            elif pages[-1].pool is not pool or pages[-1].filled != filled:
                before, pages[-1] = pages[-1], pool.take()
                pages[-1].memory[:, :filled] = before.memory[:, :filled]
            count = min(PAGE - filled, tokens - written)
            pages[-1].memory[:, filled : filled + count] = kv[:, written : written + count]
            pages[-1].filled = filled + count
            written += count
        return PagedKeyValues(tuple(pages), state.tokens_seen + tokens)


def gather(state: PagedKeyValues) -> tuple[Float[Tensor, "1 n g d"], Float[Tensor, "1 n g d"]]:
    """Return the keys and values of a text as tensors of their own."""
    both = torch.cat([page.memory for page in state.pages], 1)[:, None, : state.tokens_seen]
    return both[0], both[1]


@contextmanager
def paged(model: nn.Module) -> Iterator[None]:
    """Keep the keys and values of one text to a state in pages, where a layer caches all of them.

    A layer whose cache is bounded or in bits keeps it as it is.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, SoftmaxAttention)
        and layer.causal
        and layer.kv_cache is None
        and not layer.positions.bounded
    ]
    for layer in layers:
        sizes = {"heads": layer.kv_heads, "head_width": layer.head_width}
        layer.kv_cache = PagedCache(layer.positions, **sizes)
    try:
        yield
    finally:
        for layer in layers:
            layer.kv_cache = None
