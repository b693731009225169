"""Parallel Context Windows and Structured Prompting: context as several windows side by side.

Both give a model more context than its trained length. In a stream of text the first `windows` *
`window` tokens are the context, cut every `window` tokens; all that comes after is the task, which
goes on as long as the text does.

    attention       a token of the context attends to the earlier ones of its own window; one of the
                    task to every window and to the earlier tokens of the task
    positions       j mod window for token j of the context; window + i - windows * window for token
                    i of the task, right behind the windows

Distances stay within the trained ones while the task has at most original_length - window tokens.
In Structured Prompting each of the task's own keys counts as many times as there are windows, so
that the context does not drown them (section 3.2, rescaled attention: log(windows) added to their
scores). One window, of either, is the model itself.

Departures: no start token, of which PCW keeps that of one window (no tokeniser here has one), and
no windows of unequal length, which the papers align at one end.

Source: Ratner 2023, section 3 (arXiv 2212.10947); Hao 2022, section 3 (arXiv 2212.06713).
"""

import torch

from zoo.attention.key_blocks import KeyBlock, Scaling
from zoo.attention.pattern import AttentionPattern, check_window
from zoo.errors import refuse


class ParallelWindows(AttentionPattern):
    """Parallel windows over rotary frequencies `scaling`.

    Args:
        original_length: the trained length in tokens.
        windows: how many.
        window: tokens of each; None: 3/4 of the trained length.
        rescaled: count the task's own keys `windows` times, as in Structured Prompting.
        bucket: see `AttentionPattern`.
    """

    def __init__(
        self,
        scaling: Scaling,
        *,
        original_length: int,
        windows: int,
        window: int | None = None,
        rescaled: bool = False,
        bucket: int | None = None,
    ) -> None:
        super().__init__(scaling, bucket=bucket)
        window = 3 * original_length // 4 if window is None else window
        if original_length < 2:
            refuse("original_length", original_length, "must be >= 2, as windows are shorter")
        check_window(window, original_length - 1)
        if windows < 1:
            refuse("windows", windows, "must be >= 1")
        self.window, self.context = window, windows * window
        self.steps.append(window)  # no block of queries lies in two windows
        self.own_times = float(windows) if rescaled else 1.0

    def views(self, rows: range) -> list[KeyBlock]:
        in_context = rows.start < self.context
        first = rows.start - rows.start % self.window if in_context else self.context
        times = 1.0 if in_context else self.own_times
        views = [KeyBlock(rows, self.placed, self.placed, causal=True, times=times)]
        if first < rows.start:
            views.append(KeyBlock(range(first, rows.start), self.placed, self.placed, times=times))
        if not in_context:
            views.append(KeyBlock(range(self.context), self.placed, self.placed))
        return views

    def placed(self, positions: torch.Tensor) -> torch.Tensor:
        task = positions - self.context + self.window
        return torch.where(positions < self.context, positions % self.window, task)
