"""Dual chunk attention (An 2024, "Training-Free Long-Context Scaling of LLMs", section 3).

Text is cut into chunks of s tokens, shorter than the trained length c. Keys stand at j mod s.
A query of the same chunk sees them at i mod s (intra-chunk, eq. 2); one of the next chunk at
min(s + i mod s, c - 1) if it is among the chunk's first w tokens, which keeps the distances of
neighbours true, and at c - 1 otherwise (successive-chunk, eq. 4); any later one at c - 1
(inter-chunk, eq. 3). No distance exceeds c - 1, whatever the length.
"""

import torch

from zoo.attention.reach import Reach, Scaling, View


class DualChunk(Reach):
    """`original_length` c; `chunk` s, 3/4 of c unless given; `local` w, c - s unless given.

    The authors' program differs from the paper: s = 5c/8, and the far position 3c/4 instead of
    c - 1. `far_position` and `chunk` give that form.
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
        if not (0 < s < c and 0 <= w <= c - s):
            raise ValueError(
                f"dual chunk attention: 0 < chunk={s} < {c} and 0 <= local={w} <= {c - s}"
            )
        self.chunk, self.local = s, w
        self.last = c - 1 if far_position is None else far_position
        if not s <= self.last < c:
            raise ValueError(f"dual chunk attention: chunk={s} <= far_position={self.last} < {c}")
        self.steps = [s, *self.steps[1:]]

    def views(self, rows: range) -> list[View]:
        s, own = self.chunk, rows.start // self.chunk * self.chunk
        at = torch.arange(rows.start, rows.stop) - own
        far_at = torch.full_like(at, self.last)
        views = [View(rows, at, self.in_chunk, causal=True)]
        if own < rows.start:  # intra-chunk keys of blocks before this one
            views.append(View(range(own, rows.start), at, self.in_chunk))
        if own:
            next_at = torch.where(at < self.local, (s + at).clamp(max=self.last), far_at)
            views.append(View(range(own - s, own), next_at, self.in_chunk))
        if own > s:
            views.append(View(range(own - s), far_at, self.in_chunk))
        return views

    def in_chunk(self, positions: torch.Tensor) -> torch.Tensor:
        return positions % self.chunk
