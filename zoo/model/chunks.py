"""A window split over ranks: a rank's chunks of it, its part of the loss, and what it sends."""

import itertools

from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.data.synthetic import NO_LABEL
from zoo.model.backbone import Backbone, BackboneState
from zoo.model.block import BlockState
from zoo.parallel.hand_over import HEADER_BYTES, HandOver
from zoo.parallel.ranks import Ranks, Split


def split_over(model: Backbone, ranks: Ranks, tokens: int, in_order: bool = False) -> Split:
    """How a text is split: in zigzag where a later token costs more, as it reads more keys.

    `in_order`: a chunk for each rank, so that all ranks call the blocks in one order.
    """
    return Split.of(ranks, tokens, zigzag=not model.recurrent and not in_order)


def state_before(
    model: Backbone, split: Split, place: int, empty: BackboneState | None = None
) -> BackboneState:
    """The state before the chunk at a place.

    It serves one pass: what a layer keeps is received when the layer is called, and what it leaves
    is sent on. `empty` is the model's empty state, where the model's weights are not here now.
    """
    blocks, numbers = [], itertools.count()
    for block in (empty or model.empty_state(1)).blocks:
        keeps = (
            HandOver(split, place, next(numbers)) if tree_leaves(own) else own for own in block
        )
        blocks.append(BlockState(*keeps))
    return BackboneState(tuple(blocks), split.chunks()[place].start)


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

    Of two chunks the later one is some blocks behind the earlier. All ranks take the blocks of all
    chunks in one order, by the sum of a block's number and its chunk's place, the order in which a
    state could reach them at the earliest: so nobody waits for a rank that waits for him.
    """
    split = split_over(model, ranks, tokens.shape[1], in_order=empty is not None)
    readings, parts = {}, []
    for place, chunk in split.chunks().items():
        state = state_before(model, split, place, empty)
        readings[place] = model.hidden_by_block(tokens[:, chunk], state, positions)
    count = (labels != NO_LABEL).sum().clamp(min=1)
    steps = itertools.product(range(len(model.blocks) + 1), readings)
    for _, place in sorted(steps, key=lambda step: (sum(step), -step[1])):
        try:
            next(readings[place])
        except StopIteration as end:
            chunk = split.chunks()[place]
            nll = model.summed_nll(end.value[0], labels[:, chunk]) / count * weight
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
