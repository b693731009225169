"""Blockwise causal attention under xPos (Sun 2022, LeX Transformer, sections 3.2 and 3.3).

Text is cut into blocks of half the training length. Each query sees its own block up to itself and
the block before, so that within the training length every key is seen and beyond it no distance is
new. Pairs of channels fade with the distance as in `zoo.positions.xpos`.

Of more tokens than a block has, all blocks are read at once, folded into the batch: each over its
own keys, and each over the keys of the one before. (One after the other, the gradient of every
block would fill a tensor as long as the text.)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.pattern import Reach, Scaling, View, plain
from zoo.ops.attention import Part, attend
from zoo.ops.merge import Partial, merge
from zoo.positions.rope import apply_rope
from zoo.positions.xpos import apply_xpos_decay

LONGEST = 4096  # tokens of blocks that are read at once


class BlockwiseXPos(Reach):
    """`block` tokens per block; 2 block - 1 keys are kept, what the next query may see."""

    def __init__(self, scaling: Scaling, *, block: int) -> None:
        super().__init__(scaling)
        if block < 1:
            raise ValueError(f"blockwise causal attention takes blocks of 1 token or more: {block}")
        self.block, self.recent = block, 2 * block - 1
        self.steps = [*self.steps, block]

    def views(self, rows: range) -> list[View]:
        first = max(rows.start // self.block - 1, 0) * self.block
        views = [View(rows, plain, plain, causal=True)]
        if first < rows.start:
            views.append(View(range(first, rows.start), plain, plain))
        return views

    def scored(self, q: Tensor, k: Tensor, origin: int) -> tuple[Tensor, Tensor]:
        return apply_xpos_decay(q, k, origin)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: int,
        backend: str = "auto",
        always: Sequence[Part] = (),
    ) -> Tensor:
        tokens, size = q.shape[1], self.block
        ahead = start % size  # tokens of the first block that were read before
        first = int(start < size)  # 1 where the first block has none before it
        end, keys = start + tokens, ahead + tokens + (1 - first) * size
        if tokens <= size or size > LONGEST or k.shape[1] < keys:
            return super().__call__(q, k, v, start, backend, always)
        inv_freq, factor = self.scaling(end)
        q = apply_rope(q, inv_freq, torch.arange(start, end), factor)
        k = apply_rope(k[:, -keys:], inv_freq, torch.arange(end - keys, end), factor)
        q = F.pad(q, (0, 0, 0, 0, ahead, 0))
        q, k, v = (_blocks(x, size) for x in (q, k, v[:, -keys:]))
        own = _each(q, k[:, 1 - first :], v[:, 1 - first :], 0, backend)
        before = _each(q[:, first:], k[:, :-1], v[:, :-1], size, backend)
        if first:
            out, lse = before
            pad = (0, 0) * (out.dim() - 2)
            before = F.pad(out, (*pad, 1, 0)), F.pad(lse, (*pad[2:], 1, 0), value=-torch.inf)
        out, lse = (x.flatten(1, 2)[:, ahead:][:, :tokens] for x in merge([own, before]))
        return merge([(out, lse), attend(always, backend=backend)])[0] if always else out


def _blocks(x: Tensor, size: int) -> Tensor:
    """(b, t, h, d) -> (b, blocks, size, h, d), the last filled up with zeros, which none sees."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _each(q: Tensor, k: Tensor, v: Tensor, origin: int, backend: str) -> Partial:
    """Each block of queries over its block of keys, of which the first query is number `origin`."""
    b, blocks = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    q, k = apply_xpos_decay(q, k, origin)
    out, lse = attend([Part(q, k, v, causal=origin == 0)], backend=backend)
    return out.unflatten(0, (b, blocks)), lse.unflatten(0, (b, blocks))
