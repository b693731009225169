"""Perplexity by length and position, under the three protocols of the literature.

    blocks       the text cut into windows of `length`, every token scored: the mean over positions
                 1 .. length, early ones included (Press 2022, tables 2-5)
    stride_tail  windows of `length` of which the last `stride` tokens are scored: what a token
                 costs given nearly `length` tokens before it (Peng 2023, YaRN)
    window_mean  windows of `length` that start every `stride` tokens, the mean of their means
                 (Chen 2023, LongLoRA); as windows are equally long this is the sum over the count
                 once more, tokens that several windows cover counting several times

Numbers of two protocols do not compare. At every length the same text is read: `units` disjoint
stretches of the longest length. Blocks are cut from a stretch's end, so the last is also the
window whose tail is scored; a window that several protocols ask for is read once. A stretch gives
one tail, the same tokens at every length; more tails are more units, which are also what the
interval resamples, windows of one stretch not being independent.
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
from zoo.tasks.score import (
    Row,
    Subject,
    attempt,
    bits_per_byte,
    bootstrap,
    check_length,
    chunk_tokens,
    in_buckets,
    position_edges,
    score,
)

PROTOCOLS = ("blocks", "stride_tail", "window_mean")
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
    """One row per length and protocol; `seconds` is the reading its protocols shared.

    `lengths` are 1, 2 .. 32 times the training length unless given. `stride` is at most the
    shortest of them. Each length reads units * longest tokens, and for `window_mean` at most
    `overlap` times as many, its windows evenly spread over those that start every `stride` tokens
    (None: all of them, as published, at a cost of longest * length / stride tokens per unit).
    Text is read `chunk` tokens at a time, with the state between.
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
    shared = {"split": subject.split, "unit": unit, "units": len(text), "stride": stride}
    for length in lengths:
        tallies = {}
        for protocol in protocols:
            key = shared | {"protocol": protocol, "length": length}
            starts, first = windows(protocol, unit, length, stride, overlap)
            key["windows"] = len(text) * len(starts)
            if not subject.measured(key):
                tallies[protocol] = Tally(key, set(starts), first, len(text))
        if not tallies:
            continue
        outcome = attempt(partial(_read, subject, text, length, list(tallies.values()), chunk))
        for tally in tallies.values():
            found = _describe(subject, tally, outcome.value) if outcome.ok else {}
            yield tally.key | outcome.row | found


def windows(
    protocol: str, unit: int, length: int, stride: int, overlap: int | None = None
) -> tuple[list[int], int]:
    """Where the windows start in a stretch of `unit` tokens, and the first token each scores."""
    if protocol == "blocks":
        return list(range(unit % length, unit - length + 1, length)), 0
    if protocol == "stride_tail":
        return [unit - length], length - stride
    every = range(0, unit - length + 1, stride)
    count = len(every) if overlap is None else min(len(every), overlap * unit // length)
    return [every[i] for i in np.linspace(0, len(every) - 1, count).round().astype(int)], 0


@dataclass
class Tally:
    """Sums over the windows of one protocol at one length, by position and by unit."""

    key: Row
    starts: set[int]
    first: int
    units: int
    position_sums: Float[np.ndarray, " length"] = field(init=False)
    position_counts: Int[np.ndarray, " length"] = field(init=False)
    unit_sums: Float[np.ndarray, " units"] = field(init=False)
    unit_counts: Int[np.ndarray, " units"] = field(init=False)

    def __post_init__(self) -> None:
        length = self.key["length"]
        self.position_sums, self.unit_sums = np.zeros(length), np.zeros(self.units)
        self.position_counts = np.zeros(length, np.int64)
        self.unit_counts = np.zeros(self.units, np.int64)

    def add(self, unit: int, nll: Float[np.ndarray, " length"]) -> None:
        scored = nll[self.first :]
        self.position_sums[self.first :] += scored
        self.position_counts[self.first :] += 1
        self.unit_sums[unit] += scored.sum()
        self.unit_counts[unit] += len(scored)


def _read(
    subject: Subject,
    text: Int[np.ndarray, "units t"],
    length: int,
    tallies: list[Tally],
    chunk: int,
) -> int:
    """Read every window some protocol asks for, once, into the tallies; returns state bytes."""
    check_length(subject.model, length)
    starts = sorted({start for tally in tallies for start in tally.starts})
    places = [(unit, start) for unit in range(len(text)) for start in starts]
    rows = max(1, chunk_tokens(subject, BATCH_TOKENS) // length)
    subject.progress.begin(f"perplexity at {length}", len(places) * length)
    with subject.arithmetic():
        for first in range(0, len(places), rows):
            batch = places[first : first + rows]
            tokens = np.stack([text[unit, at : at + length + 1] for unit, at in batch])
            nll, _ = score(subject, tokens, chunk=chunk_tokens(subject, chunk))
            for (unit, start), values in zip(batch, nll, strict=True):
                for tally in tallies:
                    if start in tally.starts:
                        tally.add(unit, values)
        return subject.model.state_bytes(length)


def _describe(subject: Subject, tally: Tally, state_bytes: int) -> Row:
    """The row's numbers; the arrays they come from go to a file beside the run's rows."""
    key, size = tally.key, subject.store.bytes_per_token
    nll_sum, count = float(tally.position_sums.sum()), int(tally.position_counts.sum())
    interval = bootstrap(tally.unit_sums, tally.unit_counts)
    name = f"perplexity-{key['protocol']}-{key['length']}-{subject.extension}.npz"
    path = subject.folder / "results" / name
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        np.savez(
            file,
            nll_sum=tally.position_sums,
            count=tally.position_counts,
            unit_nll_sum=tally.unit_sums,
            unit_count=tally.unit_counts,
        )
    row = {
        "nll_sum": nll_sum,
        "count": count,
        "bits_per_byte": bits_per_byte(nll_sum, count, size),
        "perplexity": exp(nll_sum / count) if nll_sum / count < 700 else None,  # beyond a float
        "interval": interval and [bits_per_byte(end, 1, size) for end in interval],
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
