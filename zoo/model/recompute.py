"""Blocks that are computed again in the backward pass, whole or chunk by chunk.

`checkpoint_activations=true` keeps each block's input alone and computes the rest of the block
again in the backward pass (Chen 2016, arXiv 1604.06174). With `checkpoint_activations=<tokens>` a
block reads its input in chunks of so many tokens, each from the state that the chunk before left,
and computes chunk after chunk again: only one chunk's activations are held at a time, those of the
feed-forward among them. For softmax attention this is the Blockwise Parallel Transformer (Liu 2023,
section 3, arXiv 2305.19370), a block of queries at a time; for a recurrence it is the same loop.
Outputs and gradients are those of the whole, because chunks compose (zoo.mixers.base).

What is kept, per layer of T tokens in chunks of C: its input, and the states between chunks. Where
these have a fixed size they are small. Where they grow with the text (keys and values, in one
memory for all chunks) the block is computed again twice: once as a whole for its states, then
chunk by chunk; a step costs 5 forward passes in place of 4, and memory holds the keys and values
of one layer at a time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from zoo.mixers.base import AUXILIARY, CrossLayer, LayerStore
from zoo.mixers.parts import reserve
from zoo.ops.runtime.sizes import ceil_div

Read = Callable[..., Any]  # (x, state) -> output, or (output, state) where a state is given


def _again(read: Read, x: Tensor, state: Any) -> Any:
    """What `read` gives, of which the backward pass keeps x and the state alone.

    Tensors are arguments of their own: of what is inside of others, a checkpoint around this one
    would not let go.
    """
    leaves, structure = tree_flatten(state)

    def flat(x: Tensor, *leaves: Any) -> Any:
        return read(x, tree_unflatten(leaves, structure))

    return checkpoint(flat, x, *leaves, use_reentrant=False)


def chunk_cross_layers(cross_layer: CrossLayer, tokens: int, chunk: int) -> list[CrossLayer]:
    """What layers leave for one another, apart for each chunk: positions are a chunk's own."""
    count = ceil_div(tokens, chunk)
    if count <= 1:
        return [cross_layer]
    found: list[CrossLayer] = [LayerStore(cross_layer) for _ in range(count)]
    if "positions" in cross_layer:
        own_positions, so_far = cross_layer["positions"], cross_layer["key_positions"]
        before = so_far.shape[1] - tokens
        for number, own in enumerate(found):
            end = (number + 1) * chunk
            own["positions"] = own_positions[:, end - chunk : end]
            own["key_positions"] = so_far[:, : before + end]
    return found


def read_again(
    block: nn.Module, x: Tensor, state: Any, cross_layers: Sequence[CrossLayer], chunk: int
) -> Any:
    """What the block gives for x (b, t, width), keeping its input and states alone.

    Args:
        block: of zoo.model.backbone.
        state: before x; None: the block returns its output alone.
        cross_layers: those of the chunks, see `chunk_cross_layers`.
        chunk: tokens that are computed again at a time.
    """
    if len(cross_layers) == 1:
        return _again(partial(block, cross_layer=cross_layers[0]), x, state)
    read = partial(_in_chunks, block, cross_layers, chunk)
    return read(x, state) if block.recurrent else _again(read, x, state)


def _in_chunks(
    block: Any, cross_layers: Sequence[CrossLayer], chunk: int, x: Tensor, state: Any
) -> Any:
    after, outs = state or block.empty_state(len(x)), []
    left = x.shape[1]
    for part, cross_layer in zip(x.split(chunk, 1), cross_layers, strict=True):
        left -= part.shape[1]
        with reserve(left):
            y, after = _again(partial(block, cross_layer=cross_layer), part, after)
        outs.append(y)
    y = torch.cat(outs, 1)
    return y if state is None else (y, after)


def forward_passes(model: Any, tokens: int) -> int:
    """How often a training step over windows of so many tokens computes a block's outputs."""
    chunk = model.checkpoint_activations
    if chunk is False:
        return 1
    whole = chunk is True or chunk >= tokens
    return 2 if whole or model.recurrent else 3


def auxiliary_loss(cross_layers: Sequence[CrossLayer], tokens: int, chunk: int) -> Tensor | None:
    """What layers added to the loss, each chunk's by its share of the tokens."""
    if len(cross_layers) == 1:
        return cross_layers[0].get(AUXILIARY)
    losses = [own[AUXILIARY] for own in cross_layers if AUXILIARY in own]
    if not losses:
        return None
    sizes = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
    return sum(loss * size / tokens for loss, size in zip(losses, sizes, strict=True))  # type: ignore
