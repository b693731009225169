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
    masked       the windows of `blocks` read both ways: the tokens that were hidden, chosen once
                 for all lengths (Devlin 2019, section 3.1). What a model trained with
                 objective=masked is measured by; a causal model is not

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
from math import exp, log
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.data.loader import evaluation_bytes, evaluation_text
from zoo.data.masking import mask_windows
from zoo.errors import choose
from zoo.report.rows import interval
from zoo.runs.files import replacing
from zoo.tasks.context import (
    EvalContext,
    NotApplicableError,
    Row,
    bits_per_byte,
    check_counts,
    check_length,
    check_lengths,
    chunk_tokens,
    fill,
    in_buckets,
    position_edges,
    run_guarded,
    score,
)

CAUSAL, MASKED = ("half_tail", "blocks", "stride_tail", "window_mean"), ("masked",)
TIMES = (1, 2, 4, 8, 16, 32)  # the training length
BATCH_TOKENS = 16384  # short windows are read together, up to so many tokens


def measure(
    context: EvalContext,
    *,
    lengths: Sequence[int] | None = None,
    protocols: Sequence[str] | None = None,
    units: int = 8,
    stride: int = 256,
    overlap: int | None = 2,
    chunk: int = 4096,
) -> Iterator[Row]:
    """One row per length and protocol, the longest first; each names its scores by stretch.

    `lengths` are 1, 2 .. 32 times the training length unless given, `protocols` half_tail and
    blocks, or masked where that was the objective. `stride` is at most the shortest length. Each
    length reads at most units * longest tokens, for `window_mean` `overlap` times as many, its
    windows evenly spread over those that start every `stride` tokens (None: all of them, as
    published, at a cost of longest * length / stride tokens per unit). Text is read `chunk` tokens
    at a time, with the state between. `seconds` is the time of what a length had to read beyond
    what longer windows had covered, for all its protocols.
    """
    lengths = [*(lengths or (times * context.train_length for times in TIMES))]
    lengths = check_lengths("perplexity", lengths)
    check_counts("perplexity", stride=stride, units=units, chunk=chunk)
    protocols = protocols or (CAUSAL[:2] if context.model.causal else MASKED)
    protocols = [choose("protocol", protocol, CAUSAL + MASKED) for protocol in protocols]
    unit, stride = lengths[-1], min(stride, lengths[0])
    documents = context.corpus.eval_documents
    found = run_guarded(lambda: evaluation_text(context.store, unit, units, documents))
    if not found.ok:  # no stretch is long enough
        yield from ({"protocol": p, "length": n} | found.row for n in lengths for p in protocols)
        return
    text, sizes = found.value, evaluation_bytes(context.store, unit, units, documents)
    shared = {"split": context.split, "documents": documents, "unit": unit, "units": len(text)}
    tallies: dict[int, list[Tally]] = {}
    for length in reversed(lengths):
        for protocol in protocols:
            scored = windows(protocol, unit, length, stride, overlap)
            key = shared | {"stride": stride, "protocol": protocol, "length": length}
            key |= {"windows": len(text) * len(scored)}
            suits = run_guarded(partial(_check_protocol, context, protocol))
            if not suits.ok:
                yield key | suits.row
            elif not context.measured(key):
                tallies.setdefault(length, []).append(Tally(key, scored, len(text)))
    read: set[tuple[int, int]] = set()
    guesses = {"unigram": entropy(text)}
    if context.model.causal:
        guesses["bigram"] = float(context.corpus.bigrams.nats(text).mean())
    hidden = None
    if not context.model.causal:
        mask = context.model.vocab_size - 1  # the last token of an encoder's vocabulary
        hidden = mask_windows(text[:, :-1], mask, [(unit,) for unit in range(len(text))])
    for length, wanted in tallies.items():
        outcome = run_guarded(
            partial(_read, context, Text(text, sizes), length, tallies, read, hidden, chunk)
        )
        for tally in wanted:
            found = _describe(context, tally, outcome.value, guesses) if outcome.ok else {}
            yield tally.key | outcome.row | found


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

    key: Row
    windows: dict[int, slice]
    units: int
    position_sums: Float[np.ndarray, " length"] = field(init=False)
    position_counts: Int[np.ndarray, " length"] = field(init=False)
    position_bytes: Int[np.ndarray, " length"] = field(init=False)
    unit_sums: Float[np.ndarray, " units"] = field(init=False)
    unit_bytes: Int[np.ndarray, " units"] = field(init=False)

    def __post_init__(self) -> None:
        length = self.key["length"]
        self.position_sums, self.unit_sums = np.zeros(length), np.zeros(self.units)
        self.position_counts = np.zeros(length, np.int64)
        self.position_bytes = np.zeros(length, np.int64)
        self.unit_bytes = np.zeros(self.units, np.int64)

    def add(
        self,
        unit: int,
        start: int,
        nll: Float[np.ndarray, " t"],
        asked: Bool[np.ndarray, " t"],
        sizes: Int[np.ndarray, " t"],
    ) -> None:
        """Take what is scored of a window that starts there, `length` tokens or longer.

        By predicted token: its cost (nats), whether it was asked for, and its bytes of text.
        """
        if (scored := self.windows.get(start)) is not None:
            self.position_sums[scored] += nll[scored]
            self.position_counts[scored] += asked[scored]
            self.position_bytes[scored] += asked[scored] * sizes[scored]
            self.unit_sums[unit] += nll[scored].sum()
            self.unit_bytes[unit] += sizes[scored][asked[scored]].sum()


class Text(NamedTuple):
    """The stretches that are read, and the bytes of each token."""

    tokens: Int[np.ndarray, "units t"]
    sizes: Int[np.ndarray, "units t"]


def _check_protocol(context: EvalContext, protocol: str) -> None:
    causal = context.model.causal
    if causal == (protocol in MASKED):
        reads, other = ("what is behind", CAUSAL) if causal else ("both ways", MASKED)
        raise NotApplicableError(
            f"protocol {protocol}: the model was trained to read {reads}, which "
            f"{' | '.join(other)} measures"
        )


def _read(
    context: EvalContext,
    text: Text,
    length: int,
    tallies: dict[int, list[Tally]],
    read: set[tuple[int, int]],
    hidden: tuple[Int[np.ndarray, "units t"], Bool[np.ndarray, "units t"]] | None,
    chunk: int,
) -> int | None:
    """Read the windows of `length` that no longer one began with; returns the state's bytes.

    They go into the tallies of that length and of the shorter, and their places into `read`.
    `hidden` is what an encoder is shown of the text, and where it is asked; it keeps no state.
    """
    check_length(context.model, length)
    if hidden is not None:  # an encoder minds how much follows
        takers = tallies[length]
        read = set()
    else:
        takers = [tally for n, some in tallies.items() if n <= length for tally in some]
    starts = sorted({start for tally in tallies[length] for start in tally.windows})
    places = [(unit, start) for unit in range(len(text.tokens)) for start in starts]
    places = [place for place in places if place not in read]
    rows = max(1, chunk_tokens(context, BATCH_TOKENS) // length)
    context.progress.begin(f"perplexity at {length}", len(places) * length)
    with context.arithmetic():
        for first in range(0, len(places), rows):
            batch = places[first : first + rows]
            tokens = np.stack([text.tokens[unit, at : at + length + 1] for unit, at in batch])
            if hidden is None:
                nll, _ = score(context, tokens, chunk=chunk_tokens(context, chunk))
                asked = np.ones(nll.shape, bool)
            else:
                shown, asked = (
                    np.stack([part[unit, at : at + length] for unit, at in batch])
                    for part in hidden
                )
                nll = fill(context, shown, tokens[:, :-1], asked)
            ahead = hidden is None  # a causal model predicts the token after each it reads
            for (unit, at), costs, wanted in zip(batch, nll, asked, strict=True):
                told = slice(at + ahead, at + ahead + length)
                about = text.sizes[unit, told]
                for tally in takers:
                    tally.add(unit, at, costs, wanted, about)
                read.add((unit, at))
        return context.model.state_bytes(length) if hidden is None else None


def entropy(tokens: Int[np.ndarray, "..."]) -> float:
    """Nats per token of the best model that knows their frequencies and no context."""
    counts = np.unique(tokens, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _describe(
    context: EvalContext, tally: Tally, state_bytes: int | None, guesses: dict[str, float]
) -> Row:
    """The row's numbers; the arrays they come from go to a file beside the run's rows.

    `guesses` are what simple models score on the same stretches, in nats per token.
    """
    key, size = tally.key, int(tally.position_bytes.sum())
    nll_sum, count = float(tally.position_sums.sum()), int(tally.position_counts.sum())
    units = bits_per_byte(tally.unit_sums, tally.unit_bytes)
    name = f"perplexity-{key['protocol']}-{key['length']}-{context.extension}.npz"
    path = context.folder / "results" / name
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
        "bytes": size,
        "bits_per_byte": bits_per_byte(nll_sum, size),
        "perplexity": exp(nll_sum / count) if nll_sum / count < 700 else None,  # beyond a float
        **{f"{name}_bits": bits_per_byte(n * count, size) for name, n in guesses.items()},
        "uniform_bits": bits_per_byte(count * log(context.model.vocab_size), size),
        "unit_bits": units,
        "interval": interval(units),
        "state_bytes": state_bytes,
        "positions_file": path.relative_to(context.folder).as_posix(),
    }
    if key["protocol"] == "blocks":
        edges = position_edges(key["length"])
        sums = in_buckets(tally.position_sums, edges)
        counts = in_buckets(tally.position_counts, edges)
        sizes = in_buckets(tally.position_bytes, edges)
        row["curve"] = {
            "edges": edges.tolist(),
            "bits_per_byte": bits_per_byte(sums, sizes),
            "count": counts.tolist(),
        }
    return row
