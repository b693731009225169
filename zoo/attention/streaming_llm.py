"""StreamingLLM: a cache of attention sinks and a window, with positions inside the cache.

Only the first `sinks` tokens and the last `window - sinks` are cached. Recent keys have their true
distance, sinks the one they have inside the cache, right before the window. The context does not
grow: what left the window is gone. With `sinks=0` this is the plain window, which the paper shows
to collapse.

Source: Xiao 2023, "Efficient Streaming Language Models with Attention Sinks", section 3 (arXiv
2309.17453).
"""

import torch

from zoo.attention.key_blocks import KeyBlock, Scaling, distant_keys, identity
from zoo.attention.pattern import MAX_BLOCK_QUERIES, AttentionPattern, check_window
from zoo.errors import refuse
from zoo.ops.runtime.dispatch import without_values


class StreamingLLM(AttentionPattern):
    """StreamingLLM over rotary frequencies `scaling`.

    Args:
        original_length: the trained length in tokens.
        window: tokens in the cache, sinks included; None: the trained length.
        sinks: first tokens of the text that stay in the cache.
    """

    def __init__(
        self, scaling: Scaling, *, original_length: int, window: int | None = None, sinks: int = 4
    ) -> None:
        super().__init__(scaling)
        window = original_length if window is None else window
        check_window(window, original_length)
        if not 0 <= sinks < window:
            refuse("sinks", sinks, f"must be from 0 to {window - 1}, less than window={window}")
        self.window, self.sinks = window, sinks
        self.nearest = self.recent = window - sinks
        self.steps = [MAX_BLOCK_QUERIES]

    def views(self, rows: range) -> list[KeyBlock]:
        return distant_keys(
            rows, self.window - self.sinks, self.queries_at, identity, last=self.sinks
        )

    def queries_at(self, positions: torch.Tensor) -> torch.Tensor:
        at = positions.clamp(max=self.window - 1)
        return at if without_values() or at[0] != at[-1] else at[:1]
