"""Self-Extend, and ReRoPE, its limit for groups without bound.

Keys less than w = `window` before the query have their true distance. Farther ones are grouped by
G: the query has position i // G + w - w // G, the key j // G, so that distances go on from w and
grow by one per G tokens. In ReRoPE all farther keys have distance w; in its leaky form one of true
distance d has w + leak (d - w).

Source: Jin 2024, "LLM Maybe LongLM", section 3 (arXiv 2401.01325); Su 2023, "Rectified Rotary
Position Embeddings", the author's note.
"""

from typing import Annotated

import torch

from zoo.attention.key_blocks import KeyBlock, Scaling, constant, distant_keys
from zoo.attention.pattern import AttentionPattern, check_window
from zoo.config.domains import Range
from zoo.errors import refuse


class SelfExtend(AttentionPattern):
    """Self-Extend over rotary frequencies `scaling`.

    It reads (original_length - window) * group + window tokens within the trained distances.

    Args:
        original_length: the trained length in tokens.
        group: G, tokens that share a distance beyond the window.
        window: w in tokens; None: half the trained length.
    """

    def __init__(
        self, scaling: Scaling, *, original_length: int, group: int, window: int | None = None
    ) -> None:
        super().__init__(scaling)
        window = max(original_length // 2, 1) if window is None else window
        check_window(window, original_length)
        if group < 1:
            refuse("group", group, "must be >= 1")
        self.nearest = self.window = window
        self.group = group

    def views(self, rows: range) -> list[KeyBlock]:
        return distant_keys(rows, self.window, self.queries_at, self.grouped)

    def queries_at(self, positions: torch.Tensor) -> torch.Tensor:
        return positions // self.group + self.window - self.window // self.group

    def grouped(self, positions: torch.Tensor) -> torch.Tensor:
        return positions // self.group


class ReRoPE(AttentionPattern):
    """ReRoPE over rotary frequencies `scaling`: no distance exceeds `window`, but by the leak.

    Args:
        original_length: the trained length in tokens.
        window: w in tokens; None: half the trained length.
        leak: steps of distance per token beyond the window; 0: none.
    """

    def __init__(
        self,
        scaling: Scaling,
        *,
        original_length: int,
        window: int | None = None,
        leak: Annotated[float, Range(0, 1)] = 0.0,
    ) -> None:
        super().__init__(scaling)
        window = max(original_length // 2, 1) if window is None else window
        check_window(window, original_length)
        if not 0 <= leak <= 1:
            refuse("leak", leak, "must be a number from 0 to 1")
        self.nearest = self.window = window
        self.leak = leak

    def views(self, rows: range) -> list[KeyBlock]:
        if not self.leak:
            return distant_keys(rows, self.window, constant(self.window), constant(0))
        return distant_keys(rows, self.window, self.queries_at, self.leaked)

    def queries_at(self, positions: torch.Tensor) -> torch.Tensor:
        return self.leaked(positions) + self.window * (1 - self.leak)

    def leaked(self, positions: torch.Tensor) -> torch.Tensor:
        return positions.double() * self.leak
