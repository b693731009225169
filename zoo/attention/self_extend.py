"""Self-Extend (Jin 2024, "LLM Maybe LongLM", section 3) and ReRoPE (Su 2023), its limit.

Keys less than `window` before the query stand at their true distance. Farther ones stand in groups
of G: the query at i // G + w - w // G, the key at j // G, so that distances go on from w in steps
of one per G tokens. With G without bound every far key stands at distance w: ReRoPE.
"""

import torch

from zoo.attention.key_blocks import KeyBlock, Scaling, constant, distant_keys
from zoo.attention.pattern import AttentionPattern


class SelfExtend(AttentionPattern):
    """`window` w, half the trained length unless given; `group` G.

    It reads (original_length - window) * group + window tokens within the trained distances.
    """

    def __init__(
        self, scaling: Scaling, *, original_length: int, group: int, window: int | None = None
    ) -> None:
        super().__init__(scaling)
        window = original_length // 2 if window is None else window
        if group < 1 or not 0 < window <= original_length:
            raise ValueError(
                f"self_extend: group={group} is at least 1, and window={window} between 1 and the "
                f"trained length {original_length}"
            )
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
        self.nearest = self.window = original_length // 2 if window is None else window
        if not 0 < self.window <= original_length:
            raise ValueError(
                f"rerope: window={self.window} lies between 1 and the trained length "
                f"{original_length}"
            )

    def views(self, rows: range) -> list[KeyBlock]:
        return distant_keys(rows, self.window, constant(self.window), constant(0))
