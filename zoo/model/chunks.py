"""A window split over ranks: the state that a rank's chunk is read from, and what is sent."""

import itertools

from torch.utils._pytree import tree_leaves

from zoo.model.backbone import Backbone, BackboneState, BlockState
from zoo.parallel.hand_over import HEADER_BYTES, HandOver, Ranks


def state_before(model: Backbone, ranks: Ranks, tokens: int) -> BackboneState:
    """The state before this rank's chunk, which begins after so many tokens of a text.

    It serves one pass: what a layer keeps is received when the layer is called, and what it leaves
    is sent on.
    """
    blocks, numbers = [], itertools.count()
    for block in model.empty_state(1).blocks:
        keeps = (HandOver(ranks, next(numbers)) if tree_leaves(own) else own for own in block)
        blocks.append(BlockState(*keeps))
    return BackboneState(tuple(blocks), tokens)


def bytes_sent(model: Backbone, ranks: Ranks, tokens: int, batch: int = 1) -> int:
    """Bytes this rank sends in a forward and a backward pass over texts of so many tokens."""
    chunk, sent = ranks.chunk(tokens), 0
    if ranks.index < ranks.size - 1:
        headers = HEADER_BYTES * len(tree_leaves(model.empty_state(1).blocks))
        sent += model.state_bytes(chunk.stop, batch) + headers
    if ranks.index:
        sent += model.state_bytes(chunk.start, batch)  # the gradient of what was received
    return sent
