"""Parallel Context Windows and Structured Prompting: context as several windows side by side.

Both give a model more context than its trained length. In a stream of text the first `windows` *
`window` tokens are the context, cut every `window` tokens; all that comes after is the task, which
goes on as long as the text does. A prompt that knows its windows says their sizes (`arranged`).

    attention       a token of the context attends to the earlier ones of its own window; one of the
                    task to every window and to the earlier tokens of the task
    positions       those within the window for tokens of the context, from 0 on; the task's go on
                    behind the longest window. Shorter windows begin at 0 (Ratner), or in Structured
                    Prompting end where the longest ends (Hao, section 3.1: right-aligned)
    start tokens    where every window begins with its own, the task attends to the first one's
                    alone, as in Ratner's program

Distances stay within the trained ones while the task has at most original_length - window tokens.
In Structured Prompting each of the task's own keys counts as many times as there are windows, so
that the context does not drown them (section 3.2, rescaled attention: log(windows) added to their
scores). One window, of either, is the model itself.

Source: Ratner 2023, section 3 (arXiv 2212.10947); Hao 2022, section 3 (arXiv 2212.06713).
"""

from collections.abc import Iterator, Sequence
from copy import copy
from itertools import accumulate

import torch

from zoo.attention.key_blocks import KeyBlock, Scaling
from zoo.attention.pattern import AttentionPattern, check_window
from zoo.errors import refuse

MAX_WINDOWS = 2**16  # where each begins is listed


class ParallelWindows(AttentionPattern):
    """Parallel windows over rotary frequencies `scaling`.

    Args:
        original_length: the trained length in tokens.
        windows: how many.
        window: tokens of each; None: 3/4 of the trained length.
        rescaled: count the task's own keys once per window and align windows at their ends, as in
            Structured Prompting.
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
        if not 1 <= windows <= MAX_WINDOWS:
            refuse("windows", windows, f"must be >= 1 and <= {MAX_WINDOWS}")
        self.windows, self.window, self.rescaled = windows, window, rescaled
        self._arrange([window] * windows, begun=False)
        self.steps.append(window)

    @property
    def longest_window(self) -> int:
        return self.context + 1  # the task's tokens see all windows

    def arranged(self, sizes: Sequence[int], *, begun: bool) -> "ParallelWindows":
        """The same for a prompt whose windows have these sizes, in tokens.

        Args:
            sizes: of each window, at most `windows` of at most `window` tokens.
            begun: every window begins with a start token of its own.

        Raises:
            UserError: the prompt has more or larger windows.
        """
        if len(sizes) > self.windows:
            refuse("windows", self.windows, f"must be at least {len(sizes)}, those of the prompt")
        if max(sizes) > self.window:
            refuse("window", self.window, f"must be at least {max(sizes)}, as in the prompt")
        found = copy(self)
        found.steps = self.steps[:-1]
        found._arrange(sizes, begun=begun)
        return found

    def _arrange(self, sizes: Sequence[int], *, begun: bool) -> None:
        self.starts = [0, *accumulate(sizes)]  # of the windows, then of the task
        self.context, self.begun = self.starts[-1], begun
        widest = max(sizes)
        ahead = [widest - size if self.rescaled else 0 for size in sizes]
        self.shifts = [*(more - start for more, start in zip(ahead, self.starts, strict=False)),
                       widest - self.context]  # fmt: skip
        self.own_times = float(len(sizes)) if self.rescaled else 1.0

    def blocks(self, rows: range) -> Iterator[range]:
        inside = [start for start in self.starts if start in rows[1:]]
        for first, last in zip([rows.start, *inside], [*inside, rows.stop], strict=True):
            yield from super().blocks(range(first, last))

    def views(self, rows: range) -> list[KeyBlock]:
        in_context = rows.start < self.context
        first = max(start for start in self.starts if start <= rows.start)
        times = 1.0 if in_context else self.own_times
        views = [KeyBlock(rows, self.placed, self.placed, causal=True, times=times)]
        if first < rows.start:
            views.append(KeyBlock(range(first, rows.start), self.placed, self.placed, times=times))
        if not in_context:
            views += [KeyBlock(keys, self.placed, self.placed) for keys in self._read_by_task()]
        return views

    def _read_by_task(self) -> list[range]:
        """The keys of the context that the task attends to."""
        if not self.begun:
            return [range(self.context)]
        later = zip(self.starts[1:-1], self.starts[2:], strict=True)
        windows = [range(self.starts[1]), *(range(start + 1, stop) for start, stop in later)]
        return [keys for keys in windows if keys]

    def placeable(self, positions: int) -> int:
        return positions - self.shifts[-1]

    def placed(self, positions: torch.Tensor) -> torch.Tensor:
        edges = torch.tensor(self.starts[1:], device=positions.device)
        window = torch.bucketize(positions, edges, right=True)
        return positions + torch.tensor(self.shifts, device=positions.device)[window]
