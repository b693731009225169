"""A window split over ranks: a rank's state and part of the loss, and what it sends."""

import itertools

from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.data.synthetic import NO_LABEL
from zoo.model.backbone import Backbone, BackboneState
from zoo.model.block import BlockState
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


def chunk_loss(
    model: Backbone,
    ranks: Ranks,
    tokens: Int[Tensor, "b t"],
    labels: Int[Tensor, "b t"],
    positions: Tensor | None = None,
) -> Tensor:
    """This rank's part of the mean loss over windows that all ranks are given whole.

    Its labels count by their share in all labels, what layers add by its share in the tokens.
    """
    chunk = ranks.chunk(tokens.shape[1])
    state, own = state_before(model, ranks, chunk.start), labels[:, chunk]
    nll = model.labels_nll(tokens[:, chunk], own, positions, state)
    nll = nll * (own != NO_LABEL).sum() / (labels != NO_LABEL).sum().clamp(min=1)
    return model.with_auxiliary(nll, (chunk.stop - chunk.start) / tokens.shape[1])


def bytes_sent(model: Backbone, ranks: Ranks, tokens: int, batch: int = 1) -> int:
    """Bytes this rank sends in a forward and a backward pass over texts of so many tokens."""
    chunk, sent = ranks.chunk(tokens), 0
    if ranks.index < ranks.size - 1:
        headers = HEADER_BYTES * len(tree_leaves(model.empty_state(1).blocks))
        sent += model.state_bytes(chunk.stop, batch) + headers
    if ranks.index:
        sent += model.state_bytes(chunk.start, batch)  # the gradient of what was received
    return sent
