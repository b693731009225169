"""StreamingLLM: attention sinks and a window (Xiao 2023, "Efficient Streaming Language Models").

Only the first `sinks` tokens and the last `window - sinks` are kept. Distances are those inside
this cache: recent keys at their true distance, sinks as if they stood right before the window. The
context does not grow: what left the window is gone. With `sinks=0` this is the plain window that
the paper shows to collapse.
"""

import torch

from zoo.attention.reach import Reach, Scaling, View, distance, near, plain


class StreamingLLM(Reach):
    """`window` is the size of the cache, at most the trained length, sinks included."""

    def __init__(
        self, scaling: Scaling, *, original_length: int, window: int | None = None, sinks: int = 4
    ) -> None:
        super().__init__(scaling)
        window = original_length if window is None else window
        if not 0 <= sinks < window <= original_length:
            raise ValueError(
                f"streaming: 0 <= sinks={sinks} < window={window} <= the trained length "
                f"{original_length}"
            )
        self.window, self.sinks, self.recent = window, sinks, window - sinks

    def views(self, rows: range) -> list[View]:
        views = near(rows, self.window - self.sinks, first=self.sinks)
        if self.sinks:
            at = torch.arange(rows.start, rows.stop).clamp(max=self.window - 1)
            keys = range(min(self.sinks, rows.stop))
            mask = distance(rows, keys) >= 0 if rows.start < self.sinks else None
            views.append(View(keys, at, plain, mask))
        return views
