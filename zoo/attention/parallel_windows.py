"""Parallel Context Windows (Ratner 2023, section 3) and Structured Prompting (Hao 2022, section 3).

Both give a model more context than its trained length as several windows encoded side by side. For
a stream of text that means: the first `windows` * `window` tokens are the context, cut every
`window` tokens; all that comes after is the task, which goes on as long as the text does.

    who sees whom   a token of the context the earlier tokens of its own window and no other; one of
                    the task every window and the earlier tokens of the task
    positions       token j of the context stands at j mod window, the same in every window; token i
                    of the task goes on behind the longest, at window + i - windows * window

No distance is longer than trained while the task has original_length - window tokens or fewer;
longer ones run on as rotary positions do. In Structured Prompting each of the task's own keys
counts as many times as there are windows, so that the context does not drown them (section 3.2,
rescaled attention: log(windows) added to their scores). One window, of either, is the model itself.

Not here: the start token that PCW keeps of one window alone (no tokeniser of the zoo has one), and
windows of unequal length, which the papers align at one end.
"""

import torch

from zoo.attention.key_blocks import KeyBlock, Scaling
from zoo.attention.pattern import AttentionPattern, check_window
from zoo.errors import refuse


class ParallelWindows(AttentionPattern):
    """`windows` of `window` tokens, 3/4 of the trained length unless given.

    `rescaled`: the task's own keys count `windows` times, as in Structured Prompting.
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
