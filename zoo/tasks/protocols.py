"""Perplexity protocols: which windows of a text are read, and which of their tokens are scored.

    blocks       the text cut into windows of `length`, every token scored: the mean over positions
                 1 .. length, early ones included (Press 2022, tables 2-5)
    half_tail    windows of `length` that end every `length` / 2 tokens, of which the last half is
                 scored: what a token costs given `length` / 2 to `length` tokens before it
    stride_tail  windows of `length` of which the last `stride` tokens are scored: what a token
                 costs given nearly `length` tokens before it (Peng 2023, YaRN)
    window_mean  windows of `length` that start every `stride` tokens, the mean of their means
                 (Chen 2023, LongLoRA); as windows are equally long this is the sum over the count
                 once more, tokens that several windows cover counting several times.
                 Needs stretches longer than the longest length
    masked       the windows of `blocks` read both ways: the tokens that were hidden, chosen once
                 for all lengths (Devlin 2019, section 3.1). What a model trained with
                 objective=masked is measured by; a causal model is not

Scores of two protocols cannot be compared. At every length the same text is read: `units` disjoint
stretches, as long as the longest length or longer; but of a stretch that `blocks` of a length do
not divide, the first tokens are left out at that length (`masked` refuses it). Both tails score
the same tokens at every length, `stride_tail` the last `stride` of a stretch, `half_tail` its whole
last half: a stride that grows with the length reads two tokens for each it scores, where 256 at a
length of 16384 reads 64, so that one budget scores 32 times as many.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

CAUSAL, MASKED = ("half_tail", "blocks", "stride_tail", "window_mean"), ("masked",)


def windows(
    protocol: str, unit: int, length: int, stride: int, overlap: int | None = None
) -> dict[int, slice]:
    """Where windows start in a stretch of `unit` tokens -> which of its predictions are scored."""
    if protocol in ("blocks", "masked"):
        return {at: slice(0, length) for at in range(unit % length, unit - length + 1, length)}
    if protocol == "stride_tail":
        return {unit - length: slice(length - stride, length)}
    if protocol == "half_tail":
        half, scored = (length + 1) // 2, {}
        first = unit - (unit + 1) // 2  # of all that are scored
        for end in range(unit, first, -half):
            start = max(0, end - length)
            scored[start] = slice(max(end - half, first) - start, end - start)
        return scored
    every = range(0, unit - length + 1, stride)
    count = len(every) if overlap is None else min(len(every), overlap * unit // length)
    places = np.linspace(0, len(every) - 1, count).round().astype(int)
    return {every[i]: slice(0, length) for i in places}


@dataclass
class Tally:
    """Sums over the windows of one protocol at one length, by position and by unit."""

    length: int
    windows: dict[int, slice]
    units: int
    position_sums: Float[np.ndarray, " length"] = field(init=False)
    position_counts: Int[np.ndarray, " length"] = field(init=False)
    position_bytes: Int[np.ndarray, " length"] = field(init=False)
    unit_sums: Float[np.ndarray, " units"] = field(init=False)
    unit_bytes: Int[np.ndarray, " units"] = field(init=False)

    def __post_init__(self) -> None:
        self.position_sums, self.unit_sums = np.zeros(self.length), np.zeros(self.units)
        self.position_counts = np.zeros(self.length, np.int64)
        self.position_bytes = np.zeros(self.length, np.int64)
        self.unit_bytes = np.zeros(self.units, np.int64)

    def add(
        self,
        unit: int,
        start: int,
        nll: Float[np.ndarray, " t"],
        wanted: Bool[np.ndarray, " t"],
        sizes: Int[np.ndarray, " t"],
    ) -> None:
        """Take what is scored of a window that starts there, `length` tokens or longer.

        By predicted token: its cost (nats), whether it counts, and its bytes of text.
        """
        if (scored := self.windows.get(start)) is not None:
            self.position_sums[scored] += nll[scored]
            self.position_counts[scored] += wanted[scored]
            self.position_bytes[scored] += wanted[scored] * sizes[scored]
            self.unit_sums[unit] += nll[scored].sum()
            self.unit_bytes[unit] += sizes[scored][wanted[scored]].sum()
