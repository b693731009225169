"""Texts of different lengths, read one token further together.

What a layer keeps of each text has the text's own length. Where it has a fixed size and no position
in it (a recurrence), the rows of one tensor are texts, as in any batch. Elsewhere each text's state
stays apart (zoo.mixers.base.RowStates): softmax attention projects all texts at once and attends
for each, other layers read text by text. Norms, feed-forwards and the head read all at once, so the
weights, which are most of what a token reads from memory, are read once for all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from zoo.mixers.base import ROW_CROSS_LAYERS, LayerStore, Mixer, RowStates
from zoo.model.backbone import Backbone, BackboneState
from zoo.model.block import BlockState

FAR = 2**20  # tokens: a state that is no larger after so many has a fixed size


def joins(layer: Mixer) -> bool:
    """Whether states of texts of any lengths are rows of one state."""
    leaves = tree_leaves(layer.empty_state(1))
    tensors = all(isinstance(x, Tensor) and len(x) == 1 for x in leaves)
    return tensors and layer.recurrent and layer.state_bytes(1) == layer.state_bytes(FAR)


class RowBatch:
    """States of texts that are read together.

    Attributes:
        tokens_seen: of each text.
    """

    def __init__(self, model: Backbone, states: Sequence[BackboneState]) -> None:
        """Join states, of one text each that has begun. They stay as they are."""
        self.model = model
        self.tokens_seen = [state.tokens_seen for state in states]
        blocks = zip(model.layers, *(state.blocks for state in states), strict=True)
        joined = (_joined(block.named_sublayers(), rows) for block, *rows in blocks)
        self.blocks = [*joined] if states else []

    def __len__(self) -> int:
        return len(self.tokens_seen)

    def split(self) -> list[BackboneState]:
        """The state of each text."""
        rows = [
            tuple(BlockState(*(_row(part, row) for part in block)) for block in self.blocks)
            for row in range(len(self))
        ]
        return [BackboneState(*one) for one in zip(rows, self.tokens_seen, strict=True)]

    def hidden(self, tokens: Int[Tensor, "b 1"]) -> Float[Tensor, "b 1 width"]:
        """What the head reads of one more token of each text."""
        model = self.model
        texts = zip(tokens.split(1), self.tokens_seen, strict=True)
        x = torch.cat([model.embed(token, start)[0] for token, start in texts])
        apart: Any = [LayerStore() for _ in self.tokens_seen]
        cross_layer = LayerStore({ROW_CROSS_LAYERS: apart})
        for index, block in enumerate(model.layers):
            x, self.blocks[index] = block(x, self.blocks[index], cross_layer)
        self.tokens_seen = [count + 1 for count in self.tokens_seen]
        return model.norm(x)


def _joined(layers: dict[str, Mixer], rows: Sequence[BlockState]) -> BlockState:
    parts: dict[str, Any] = {"mixer": ()}
    for name, layer in layers.items():
        states = [getattr(row, name) for row in rows]
        parts[name] = RowStates(states)
        if joins(layer):
            parts[name] = tree_map(lambda *leaves: torch.cat(leaves), *states)
    return BlockState(**parts)


def _row(state: Any, row: int) -> Any:
    if isinstance(state, RowStates):
        return state.rows[row]
    return tree_map_only(Tensor, lambda x: x[row : row + 1], state)
