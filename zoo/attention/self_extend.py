"""Self-Extend (Jin 2024, "LLM Maybe LongLM", section 3) and ReRoPE (Su 2023), its limit.

Keys less than `window` before the query stand at their true distance. Farther ones stand in groups
of G: the query at i // G + w - w // G, the key at j // G, so that distances go on from w in steps
of one per G tokens. With G without bound every far key stands at distance w: ReRoPE.
"""

import torch

from zoo.attention.key_blocks import KeyBlock, Scaling, constant, distant_keys
from zoo.attention.pattern import AttentionPattern, check_window
from zoo.errors import refuse


class SelfExtend(AttentionPattern):
    """`window` w, half the trained length unless given; `group` G.

    It reads (original_length - window) * group + window tokens within the trained distances.
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
    """`window` w, half the trained length unless given: no distance exceeds it."""

    def __init__(
        self, scaling: Scaling, *, original_length: int, window: int | None = None
    ) -> None:
        super().__init__(scaling)
        window = max(original_length // 2, 1) if window is None else window
        check_window(window, original_length)
        self.nearest = self.window = window

    def views(self, rows: range) -> list[KeyBlock]:
        return distant_keys(rows, self.window, constant(self.window), constant(0))
