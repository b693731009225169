"""Perplexity by length and position, under the protocols of the literature and one of our own.

    blocks       the text cut into windows of `length`, every token scored: the mean over positions
                 1 .. length, early ones included (Press 2022, tables 2-5)
    half_tail    windows of `length` that end every `length` / 2 tokens, of which the last half is
                 scored: what a token costs given `length` / 2 to `length` tokens before it
    stride_tail  windows of `length` of which the last `stride` tokens are scored: what a token
                 costs given nearly `length` tokens before it (Peng 2023, YaRN)
    window_mean  windows of `length` that start every `stride` tokens, the mean of their means
                 (Chen 2023, LongLoRA); as windows are equally long this is the sum over the count
                 once more, tokens that several windows cover counting several times

Numbers of two protocols do not compare. At every length the same text is read: `units` disjoint
stretches of the longest length. Both tails score the same tokens at every length, `stride_tail` the
last `stride` of a stretch, `half_tail` its whole last half: a stride that grows with the length
reads two tokens for each it scores, where 256 at a length of 16384 reads 64, so that one budget
scores 32 times as many. Intervals are over stretches, the tokens of one not being independent.

A causal model's outputs do not depend on what comes after, so a window is read once for all the
lengths and protocols that have windows which start there: from the longest length to the shortest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import exp

import numpy as np
from jaxtyping import Float, Int

from zoo.data.loader import evaluation_text
from zoo.errors import UserError, choose
from zoo.files import replacing
from zoo.report.rows import interval
from zoo.tasks.score import (
    Row,
    Subject,
    attempt,
    bits_per_byte,
    check_length,
    chunk_tokens,
    in_buckets,
    position_edges,
    score,
)

PROTOCOLS = ("half_tail", "blocks", "stride_tail", "window_mean")
TIMES = (1, 2, 4, 8, 16, 32)  # the training length
BATCH_TOKENS = 16384  # short windows are read together, up to so many tokens


def measure(
    subject: Subject,
    *,
    lengths: Sequence[int] | None = None,
    protocols: Sequence[str] = PROTOCOLS[:2],
    units: int = 8,
    stride: int = 256,
    overlap: int | None = 2,
    chunk: int = 4096,
) -> Iterator[Row]:
    """One row per length and protocol, the longest first; each names its scores by stretch.

    `lengths` are 1, 2 .. 32 times the training length unless given. `stride` is at most the
    shortest of them. Each length reads at most units * longest tokens, for `window_mean` `overlap`
    times as many, its windows evenly spread over those that start every `stride` tokens (None: all
    of them, as published, at a cost of longest * length / stride tokens per unit). Text is read
    `chunk` tokens at a time, with the state between. `seconds` is the time of what a length had to
    read beyond what longer windows had covered, for all its protocols.
    """
    lengths = sorted(set(lengths or (times * subject.train_length for times in TIMES)))
    protocols = [choose("protocol", protocol, PROTOCOLS) for protocol in protocols]
    if lengths[0] < 1 or min(stride, units, chunk) < 1:
        raise UserError("perplexity wants lengths, stride, units and chunk of at least 1")
    unit, stride = lengths[-1], min(stride, lengths[0])
    documents = subject.corpus.eval_documents
    found = attempt(lambda: evaluation_text(subject.store, unit, units, documents))
    if not found.ok:  # no stretch is long enough
        yield from ({"protocol": p, "length": n} | found.row for n in lengths for p in protocols)
        return
    text = found.value
    shared = {"split": subject.split, "documents": documents, "unit": unit, "units": len(text)}
    tallies: dict[int, list[Tally]] = {}
    for length in reversed(lengths):
        for protocol in protocols:
            scored = windows(protocol, unit, length, stride, overlap)
            key = shared | {"stride": stride, "protocol": protocol, "length": length}
            key |= {"windows": len(text) * len(scored)}
            if not subject.measured(key):
                tallies.setdefault(length, []).append(Tally(key, scored, len(text)))
    read: set[tuple[int, int]] = set()
    for length, wanted in tallies.items():
        outcome = attempt(partial(_read, subject, text, length, tallies, read, chunk))
        for tally in wanted:
            found = _describe(subject, tally, outcome.value) if outcome.ok else {}
            yield tally.key | outcome.row | found


def windows(
    protocol: str, unit: int, length: int, stride: int, overlap: int | None = None
) -> dict[int, slice]:
    """Where windows start in a stretch of `unit` tokens -> which of its predictions are scored."""
    if protocol == "blocks":
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

    key: Row
    windows: dict[int, slice]
    units: int
    position_sums: Float[np.ndarray, " length"] = field(init=False)
    position_counts: Int[np.ndarray, " length"] = field(init=False)
    unit_sums: Float[np.ndarray, " units"] = field(init=False)  # of equally many tokens each

    def __post_init__(self) -> None:
        length = self.key["length"]
        self.position_sums, self.unit_sums = np.zeros(length), np.zeros(self.units)
        self.position_counts = np.zeros(length, np.int64)

    def add(self, unit: int, start: int, nll: Float[np.ndarray, " t"]) -> None:
        """Take what is scored of a window that starts there, `length` tokens or longer."""
        if (scored := self.windows.get(start)) is not None:
            self.position_sums[scored] += nll[scored]
            self.position_counts[scored] += 1
            self.unit_sums[unit] += nll[scored].sum()


def _read(
    subject: Subject,
    text: Int[np.ndarray, "units t"],
    length: int,
    tallies: dict[int, list[Tally]],
    read: set[tuple[int, int]],
    chunk: int,
) -> int:
    """Read the windows of `length` that no longer one began with; returns the state's bytes.

    They go into the tallies of that length and of the shorter, and their places into `read`.
    """
    check_length(subject.model, length)
    if any(half.length_dependent for half in subject.model.halves()):
        takers = tallies[length]
        read = set()
    else:
        takers = [tally for n, some in tallies.items() if n <= length for tally in some]
    starts = sorted({start for tally in tallies[length] for start in tally.windows})
    places = [(unit, start) for unit in range(len(text)) for start in starts]
    places = [place for place in places if place not in read]
    rows = max(1, chunk_tokens(subject, BATCH_TOKENS) // length)
    subject.progress.begin(f"perplexity at {length}", len(places) * length)
    with subject.arithmetic():
        for first in range(0, len(places), rows):
            batch = places[first : first + rows]
            tokens = np.stack([text[unit, at : at + length + 1] for unit, at in batch])
            nll, _ = score(subject, tokens, chunk=chunk_tokens(subject, chunk))
            for place, values in zip(batch, nll, strict=True):
                for tally in takers:
                    tally.add(*place, values)
                read.add(place)
        return subject.model.state_bytes(length)


def _describe(subject: Subject, tally: Tally, state_bytes: int) -> Row:
    """The row's numbers; the arrays they come from go to a file beside the run's rows."""
    key, size = tally.key, subject.store.bytes_per_token
    nll_sum, count = float(tally.position_sums.sum()), int(tally.position_counts.sum())
    units = bits_per_byte(tally.unit_sums, count / len(tally.unit_sums), size).tolist()
    name = f"perplexity-{key['protocol']}-{key['length']}-{subject.extension}.npz"
    path = subject.folder / "results" / name
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        np.savez(
            file,
            nll_sum=tally.position_sums,
            count=tally.position_counts,
            unit_nll_sum=tally.unit_sums,
        )
    row = {
        "nll_sum": nll_sum,
        "count": count,
        "bits_per_byte": bits_per_byte(nll_sum, count, size),
        "perplexity": exp(nll_sum / count) if nll_sum / count < 700 else None,  # beyond a float
        "unit_bits": units,
        "interval": interval(units),
        "state_bytes": state_bytes,
        "positions_file": path.relative_to(subject.folder).as_posix(),
    }
    if key["protocol"] == "blocks":
        edges = position_edges(key["length"])
        sums = in_buckets(tally.position_sums, edges)
        counts = in_buckets(tally.position_counts, edges)
        row["curve"] = {
            "edges": edges.tolist(),
            "bits_per_byte": bits_per_byte(sums, counts, size).tolist(),
            "count": counts.tolist(),
        }
    return row
