"""Blockwise causal attention under xPos (Sun 2022, LeX Transformer, sections 3.2 and 3.3).

Text is cut into blocks of half the training length. Each query sees its own block up to itself and
the block before, so that within the training length every key is seen and beyond it no distance is
new. Pairs of channels fade with the distance as in `zoo.positions.xpos`.
"""

import torch
from torch import Tensor

from zoo.attention.reach import Reach, Scaling, View, plain
from zoo.positions.xpos import fade


class BlockwiseXPos(Reach):
    """`block` tokens per block; 2 block - 1 keys are kept, what the next query may see."""

    def __init__(self, scaling: Scaling, *, block: int) -> None:
        super().__init__(scaling)
        if block < 1:
            raise ValueError(f"blockwise causal attention takes blocks of 1 token or more: {block}")
        self.block, self.recent = block, 2 * block - 1
        self.steps = [*self.steps, block]

    def views(self, rows: range) -> list[View]:
        at = torch.arange(rows.start, rows.stop)
        first = max(rows.start // self.block - 1, 0) * self.block
        views = [View(rows, at, plain, causal=True)]
        return [*views, View(range(first, rows.start), at, plain)] if first < rows.start else views

    def scored(self, q: Tensor, k: Tensor, origin: int) -> tuple[Tensor, Tensor]:
        return fade(q, k, origin)
