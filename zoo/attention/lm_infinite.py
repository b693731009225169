"""LM-Infinite: a Lambda-shaped mask and bounded distances.

Each query attends to the last `window` keys at their true distance, and to the first `sinks` keys
at min(distance, window). Unlike StreamingLLM's, positions are those in the text, not in the cache.

Source: Han 2023, "LM-Infinite", section 4 (arXiv 2308.16137).
"""

from zoo.attention.key_blocks import KeyBlock, Scaling, constant, distant_keys
from zoo.attention.pattern import MAX_BLOCK_QUERIES, AttentionPattern, check_window
from zoo.errors import refuse


class LMInfinite(AttentionPattern):
    """LM-Infinite over rotary frequencies `scaling`.

    Args:
        original_length: the trained length in tokens.
        window: in tokens; None: the trained length.
        sinks: first keys that are always attended to, 10 to 100 in the paper.
    """

    def __init__(
        self, scaling: Scaling, *, original_length: int, window: int | None = None, sinks: int = 10
    ) -> None:
        super().__init__(scaling)
        window = original_length if window is None else window
        check_window(window, original_length)
        if not 0 <= sinks < window:
            refuse("sinks", sinks, f"must be from 0 to {window - 1}, less than window={window}")
        self.nearest = self.recent = self.window = window
        self.sinks, self.steps = sinks, [MAX_BLOCK_QUERIES]

    def views(self, rows: range) -> list[KeyBlock]:
        return distant_keys(rows, self.window, constant(self.window), constant(0), last=self.sinks)
