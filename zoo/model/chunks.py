"""A text split over ranks: a rank's chunks of it, their part of the loss, and what it sends."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.data.synthetic import NO_LABEL
from zoo.model.backbone import Backbone, BackboneState
from zoo.parallel.hand_over import HEADER_BYTES, HandOver
from zoo.parallel.ranks import Ranks, Split


class Chunk(NamedTuple):
    """A chunk of texts that was read: its tokens, what the head reads there, and the state after
    it where that is kept."""

    tokens: slice
    x: Float[Tensor, "b chunk width"]
    after: BackboneState | None


def split_over(
    model: Backbone, ranks: Ranks, tokens: int, in_order: bool = False, chunk: int | None = None
) -> Split:
    """How a text is split: in zigzag where a later token costs more, as it reads more keys.

    `in_order`: a chunk for each rank, so that all ranks call the blocks in one order. `chunk` is
    that of `Split.of`.
    """
    return Split.of(ranks, tokens, zigzag=not model.recurrent and not in_order, chunk=chunk)


def state_before(
    model: Backbone,
    split: Split,
    place: int,
    empty: BackboneState | None = None,
    keeps: bool = False,
    published: Callable[[], None] | None = None,
) -> BackboneState:
    """The state before the chunk at a place.

    It serves one pass: what a layer keeps is received when the layer is called, and what it leaves
    is sent on. `empty` is the model's empty state, where the model's weights are not here now;
    `keeps` that of HandOver. `published` is called once in every block whose mixer keeps a state,
    when that after the chunk is published.
    """
    blocks, numbers = [], itertools.count()
    again = torch.is_grad_enabled() and bool(model.checkpoint_activations)
    for block in (empty or model.empty_state(1)).blocks:
        given = {
            name: HandOver(
                *(split, place, next(numbers), keeps, again),
                published if name == "mixer" else None,
            )
            for name, own in block._asdict().items()
            if tree_leaves(own)
        }
        blocks.append(block._replace(**given))
    return BackboneState(tuple(blocks), split.chunks()[place].start)


def read_chunks(
    model: Backbone,
    split: Split,
    tokens: Int[Tensor, "b t"],
    positions: Tensor | None = None,
    empty: BackboneState | None = None,
    keep_last: bool = False,
) -> Iterator[Chunk]:
    """Yield this rank's chunks of texts as they are done; with `keep_last` the text's last one with
    the state after it.

    A rank reads its parts block by block. Of two parts the later one is some blocks behind the
    earlier. All ranks take the blocks of all parts in one order, by the sum of a block's number and
    its part's, the order in which a state could reach them at the earliest: so nobody waits for a
    rank that waits for him.

    Where every block publishes before it computes, both parts are at one block instead, the later
    one within the earlier one's call: all keys of a block are sent before anybody attends, and
    nobody waits for attention. The backward pass goes the reverse way: attention of both parts
    first, then the gradients of keys from the last part to the first. Activations that are
    computed again leave no room for it, as the later part would be in the earlier one's.
    """
    chunks, readings = split.chunks(), {}
    read = dict.fromkeys(chunks, 0)  # blocks
    first, *later = chunks
    at_once = len(later) == 1 and split.chunks_each == 1 and _publishes_first(model, empty)

    def advance(place: int) -> None:
        read[place] += 1
        next(readings[place])

    for place, chunk in chunks.items():
        keeps = keep_last and place == split.last
        inner = functools.partial(advance, *later) if at_once and place == first else None
        state = state_before(model, split, place, empty, keeps, inner)
        readings[place] = model.hidden_by_block(tokens[:, chunk], state, positions)

    def turn(step: tuple[int, int]) -> tuple[int, int, int, int]:
        block, place = step
        part = split.part(place)
        return (block, part, place, block) if at_once else (block + part, -part, place, block)

    steps = itertools.product(range(len(model.blocks) + 1), readings)
    for at, _, place, block in sorted(map(turn, steps)):
        if read[place] > block:  # within the earlier part's call
            continue
        split.ranks.enter(at)
        try:
            advance(place)
        except StopIteration as end:
            x, after = end.value
            keeps = keep_last and place == split.last
            yield Chunk(chunks[place], x, after if keeps else None)


def _publishes_first(model: Backbone, empty: BackboneState | None) -> bool:
    """Whether every block knows its state after a chunk before most of its work, read once."""
    if model.checkpoint_activations and torch.is_grad_enabled():
        return False
    states = (empty or model.empty_state(1)).blocks
    return all(
        block.mixer.publishes_first and not tree_leaves(state.feed_forward)
        for block, state in zip(model.layers, states, strict=True)
    )


def chunk_loss(
    model: Backbone,
    ranks: Ranks,
    tokens: Int[Tensor, "b t"],
    labels: Int[Tensor, "b t"],
    positions: Tensor | None = None,
    empty: BackboneState | None = None,
    weight: float = 1.0,
) -> Tensor:
    """This rank's part of the mean loss over windows that all ranks are given whole.

    Its labels count by their share in all labels, what layers add by its share in the tokens;
    `weight` is that of `Backbone.labels_loss`. `empty` is given where weights are divided among the
    ranks, which then gather them in one order.
    """
    split = split_over(model, ranks, tokens.shape[1], in_order=empty is not None)
    count, parts = (labels != NO_LABEL).sum().clamp(min=1), []
    for chunk, x, _ in read_chunks(model, split, tokens, positions, empty):
        nll = model.summed_nll(x, labels[:, chunk]) / count * weight
        share = (chunk.stop - chunk.start) / tokens.shape[1]
        parts.append(model.with_auxiliary(nll, share))
    return sum(parts[1:], parts[0])


def bytes_sent(
    model: Backbone, ranks: Ranks, tokens: int, batch: int = 1, in_order: bool = False
) -> int:
    """Bytes this rank sends in a forward and a backward pass over texts of so many tokens."""
    split, sent = split_over(model, ranks, tokens, in_order), 0
    headers = HEADER_BYTES * len(tree_leaves(model.empty_state(1).blocks))
    for place, chunk in split.chunks().items():
        if place < split.last and split.owner(place + 1) != ranks.index:
            sent += model.state_bytes(chunk.stop, batch) + headers
        if place and split.owner(place - 1) != ranks.index:
            sent += model.state_bytes(chunk.start, batch)  # the gradient of what was received
    return sent
