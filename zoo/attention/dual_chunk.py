"""Dual chunk attention: no distance exceeds the trained ones, and every key is attended to.

Text is cut into chunks of s tokens, shorter than the trained length c. Key j has position j mod s.
The position of query i depends on the key's chunk:

    the same chunk          i mod s                                             (intra, eq. 2)
    the one before          min(s + i mod s, c - 1) for the chunk's first w tokens, which keeps the
                            distances of neighbours true; c - 1 for the others  (successive, eq. 4)
    any earlier one         c - 1                                               (inter, eq. 3)

Source: An 2024, "Training-Free Long-Context Scaling of Large Language Models", section 3 (arXiv
2402.17463).
"""

import torch

from zoo.attention.key_blocks import KeyBlock, Scaling, constant
from zoo.attention.pattern import BLOCK_QUERIES, AttentionPattern
from zoo.errors import refuse
from zoo.ops.runtime.sizes import ceil_div


class DualChunk(AttentionPattern):
    """Dual chunk attention over rotary frequencies `scaling`.

    Args:
        original_length: c, the trained length in tokens.
        chunk: s; None: 3/4 of c. The authors' program has 5/8 of c.
        local: w; None: c - s.
        far_position: of queries for keys of earlier chunks; None: c - 1, as in the paper. The
            authors' program has 3/4 of c.
        bucket: see `AttentionPattern`.
    """

    def __init__(
        self,
        scaling: Scaling,
        *,
        original_length: int,
        chunk: int | None = None,
        local: int | None = None,
        far_position: int | None = None,
        bucket: int | None = None,
    ) -> None:
        super().__init__(scaling, bucket=bucket)
        c = original_length
        s = 3 * c // 4 if chunk is None else chunk
        w = c - s if local is None else local
        if c < 2:
            refuse("original_length", c, "must be >= 2, as chunks are shorter")
        if not 0 < s < c:
            refuse("chunk", s, f"must be from 1 to {c - 1}, less than the trained length")
        if not 0 <= w <= c - s:
            refuse("local", w, f"must be from 0 to {c - s}, the trained length less chunk={s}")
        self.chunk, self.local = s, w
        self.last = c - 1 if far_position is None else far_position
        if not s <= self.last < c:
            rule = f"must be from chunk={s} to {c - 1}, less than the trained length"
            refuse("far_position", self.last, rule)
        self.steps[0] = ceil_div(BLOCK_QUERIES, s) * s

    def views(self, rows: range) -> list[KeyBlock]:
        s, far, first = self.chunk, constant(self.last), rows.start // self.chunk * self.chunk
        views = [KeyBlock(range(first - s), far, self.intra)] if first > s else []
        for own in range(first, rows.stop, s):
            mine = range(max(own, rows.start), min(own + s, rows.stop))
            views.append(KeyBlock(mine, self.intra, self.intra, mine, causal=True))
            if own < mine.start:  # keys of the same chunk before this block
                views.append(KeyBlock(range(own, mine.start), self.intra, self.intra, mine))
            if own:
                views.append(KeyBlock(range(own - s, own), self.next, self.intra, mine))
            if own - s > max(first - s, 0):  # earlier for this chunk, not for the whole block
                between = range(max(first - s, 0), own - s)
                views.append(KeyBlock(between, far, self.intra, mine))
        return views

    def intra(self, positions: torch.Tensor) -> torch.Tensor:
        return positions % self.chunk

    def next(self, positions: torch.Tensor) -> torch.Tensor:
        inside = positions % self.chunk
        near = (self.chunk + inside).clamp(max=self.last)
        return torch.where(inside < self.local, near, self.last)
