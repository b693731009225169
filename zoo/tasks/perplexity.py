"""Perplexity by length and position, under the protocols of zoo.tasks.protocols.

Intervals are over stretches of text, the tokens of one not being independent.

A causal model's outputs do not depend on what comes after, so a window is read once for all the
lengths and protocols that have windows which start there: from the longest length to the shortest.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import exp, isqrt, log
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.config.domains import MAX_LENGTH, Count, Lengths, Range, Several
from zoo.data.loader import evaluation_bytes, evaluation_text
from zoo.data.masking import mask_windows
from zoo.errors import refuse
from zoo.measurement import Declaration, Quantity
from zoo.model.backbone import Backbone
from zoo.report.statistics import interval
from zoo.runs.files import replacing
from zoo.tasks.context import (
    EvalContext,
    NotApplicableError,
    Outcome,
    Row,
    bits_per_byte,
    check_length,
    chunk_tokens,
    fill,
    in_buckets,
    position_edges,
    run_guarded,
)
from zoo.tasks.memory import check_memory
from zoo.tasks.protocols import CAUSAL, MASKED, Tally, windows
from zoo.tasks.readers import score_text
from zoo.tasks.task import PROMPT_FLOPS, STATE, Task, lengths_of

PROMPTED = ("half_tail", "stride_tail")  # protocols that score the end of a text
TIMES = (1, 2, 4, 8, 16, 32)  # the training length
BATCH_TOKENS = 16384  # short windows are read together, up to so many tokens
TOKEN_BYTES = 32  # of the stretches: a token and its bytes of text in int64, and the sums

Hidden = tuple[Int[np.ndarray, "units t"], Bool[np.ndarray, "units t"]]


@dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
    """One row per length and protocol, the longest first; each names its scores by stretch.

    `protocols` are half_tail and blocks by default, or masked where that was the objective.
    `stride` is at most the shortest length. Stretches have `unit` tokens, by default the longest
    length: window_mean needs longer ones to slide over, and masked lengths that divide it, so that
    all of them score the same tokens. Each length reads at most units * unit tokens, for
    `window_mean` `overlap` times as many, its windows evenly spread over those that start every
    `stride` tokens (None: all of them, as published, at a cost of unit * length / stride tokens
    per unit). Text is read `chunk` tokens at a time, with the state between. `seconds` is the time
    of what a length had to read beyond what longer windows had covered, for all its protocols.
    """

    declares = Declaration(
        title="Bits per byte",
        about="How many bits the model needs, on average, to write down the next byte of a text "
        "that it has not seen.",
        quantities=(
            *(
                Quantity(
                    field="bits_per_byte",
                    name=f"bits per byte, {protocol}",
                    better="lower",
                    form="score",
                    interval="interval",
                    where={"protocol": protocol},
                )
                for protocol in CAUSAL + MASKED
            ),
            STATE,
            *(
                replace(PROMPT_FLOPS, name=f"{PROMPT_FLOPS.name}, {one}", where={"protocol": one})
                for one in PROMPTED
            ),
        ),
    )
    # A question has these.
    unidentifying = ("lengths", "protocols", "units", "unit", "stride", "chunk")
    compresses: ClassVar[bool] = True
    both_ways: ClassVar[bool] = True
    reads_together: ClassVar[bool] = True
    lengths: Lengths | None = None
    protocols: (
        Annotated[
            Sequence[Literal["half_tail", "blocks", "stride_tail", "window_mean", "masked"]],
            Several,
        ]
        | None
    ) = None
    units: Count = 8
    unit: Annotated[int, Range(1, MAX_LENGTH)] | None = None
    stride: Count = 256
    overlap: Annotated[int, Range(1, 1024)] | None = 2
    chunk: Count = 4096

    def check(self) -> None:
        if self.lengths:
            self._check_unit(sorted({*self.lengths}), self.protocols or ())
        size = self.unit or max(self.lengths or [0])
        option = f"task.perplexity.{'unit' if self.unit else 'lengths'}={size}"
        check_memory(option, self.units * size * TOKEN_BYTES, f"{self.units} stretches")

    def _check_unit(self, lengths: Sequence[int], protocols: Sequence[str]) -> None:
        """Refuse stretches in which a protocol's definition does not hold at all these lengths."""
        longest, option, value = lengths[-1], "task.perplexity.unit", self.unit or "null"
        unit = self.unit or longest
        if unit < longest:
            refuse(option, value, f"must be at least the longest length ({longest})")
        least = longest + min(self.stride, lengths[0])
        if "window_mean" in protocols and unit < least:
            rule = f"protocol window_mean slides windows over more than {longest} tokens"
            refuse(option, value, rule, f"Use at least {least}")
        other = [length for length in lengths if unit % length]
        if "masked" in protocols and other:
            rule = f"protocol masked scores the same tokens only at lengths that divide {unit}"
            advice = f"Use {', '.join(map(str, _divisors(unit, lengths[0])))}"
            refuse("task.perplexity.lengths", str([*lengths]).replace(" ", ""), rule, advice)

    def check_model(self, model: Backbone) -> None:
        super().check_model(model)
        reasons = [_unsuited(model.causal, protocol) for protocol in self.protocols or ()]
        if reasons and all(reasons):
            raise NotApplicableError(reasons[0])

    def questions(self, context: EvalContext) -> Iterator[Row]:
        lengths = lengths_of(self.lengths, context, TIMES)
        protocols = self.protocols or (CAUSAL[:2] if context.model.causal else MASKED)
        self._check_unit(lengths, protocols)
        unit, stride = self.unit or lengths[-1], min(self.stride, lengths[0])
        documents = context.corpus.eval_documents
        found = run_guarded(lambda: evaluation_text(context.store, unit, self.units, documents))
        units = len(found.value) if found.ok else 0
        shared = {"split": context.split, "documents": documents, "unit": unit, "units": units}
        for length in reversed(lengths):
            for protocol in protocols:
                yield shared | {"stride": stride, "protocol": protocol, "length": length}

    def answers(self, context: EvalContext, wanted: Sequence[Row]) -> Iterator[tuple[Row, Outcome]]:
        if not wanted:
            return
        if context.compress and len(wanted) > 1:  # what one reads is not what another does
            for question in wanted:
                yield from self.answers(context, [question])
            return
        reading = run_guarded(partial(self._reading, context, wanted[0]))
        if not reading.ok:  # no stretch is long enough
            yield from ((question, reading) for question in wanted)
            return
        for question in wanted:
            suits = run_guarded(partial(_check_protocol, context, question["protocol"]))
            if suits.ok:
                reading.value.add(question, self.overlap)
            else:
                yield question, suits
        for length, tallies in reading.value.tallies.items():
            outcome = run_guarded(partial(reading.value.read, length, self.chunk))
            for question, tally in tallies:
                row = outcome.ok and reading.value.describe(question, tally, outcome.value)
                yield question, outcome._replace(value=row or None)

    def _reading(self, context: EvalContext, question: Row) -> "Reading":
        """The stretches of text that all questions read."""
        which = context.store, question["unit"], self.units, question["documents"]
        text, sizes, hidden = evaluation_text(*which), evaluation_bytes(*which), None
        if not context.model.causal:
            mask = context.model.vocab_size - 1  # the last token of an encoder's vocabulary
            keys = [(unit,) for unit in range(len(text))]
            hidden = mask_windows(text[:, :-1], mask, keys)
        if hidden is None:
            guesses = {"unigram": unigram(text)[:, 1:], "bigram": context.corpus.bigrams.nats(text)}
        else:
            guesses = {"unigram": np.where(hidden[1], unigram(text)[:, :-1], 0.0)}
        return Reading(context, text, sizes, hidden, guesses)


def _divisors(unit: int, least: int) -> list[int]:
    """The lengths that divide a unit, from the one at or below `least` on, at most eight."""
    small = [n for n in range(1, isqrt(unit) + 1) if unit % n == 0]
    every = sorted({*small, *(unit // n for n in small)})
    below = [n for n in every if n <= least][-1:]
    return [*below, *(n for n in every if n > least)][:8]


def _check_protocol(context: EvalContext, protocol: str) -> None:
    if context.compress and protocol not in PROMPTED:
        raise NotApplicableError(
            f"protocol {protocol} scores a text from its first token on: there is nothing before "
            "it to compress, as half_tail and stride_tail have"
        )
    if why := _unsuited(context.model.causal, protocol):
        raise NotApplicableError(why)


def _unsuited(causal: bool, protocol: str) -> str:
    """Why a protocol does not measure how a model reads, or nothing."""
    if causal != (protocol in MASKED):
        return ""
    reads, other = ("what is behind", CAUSAL) if causal else ("both ways", MASKED)
    measured = f"{' | '.join(other)} measures"
    return f"protocol {protocol}: the model was trained to read {reads}, which {measured}"


class Window(NamedTuple):
    """Where a window starts: in which stretch, at which of its tokens."""

    unit: int
    start: int


@dataclass
class Reading:
    """One reading of the stretches, by the windows of several lengths and protocols.

    `hidden` is what an encoder is shown of the text, and which tokens are hidden. `guesses` are
    nats of simple models, of each token that this one's outputs predict.
    """

    context: EvalContext
    text: Int[np.ndarray, "units t"]
    sizes: Int[np.ndarray, "units t"]  # bytes of each token
    hidden: Hidden | None
    guesses: dict[str, Float[np.ndarray, "units t"]]
    tallies: dict[int, list[tuple[Row, Tally]]] = field(default_factory=dict)  # by length
    done: set[Window] = field(default_factory=set)
    held: int = 0  # tokens of the longest window as it was read: under compression fewer

    def add(self, question: Row, overlap: int | None) -> None:
        """Keep a tally for a question."""
        protocol, unit, length = (question[name] for name in ("protocol", "unit", "length"))
        scored = windows(protocol, unit, length, question["stride"], overlap)
        tally = Tally(length, scored, len(self.text))
        self.tallies.setdefault(length, []).append((question, tally))

    def read(self, length: int, chunk: int) -> int | None:
        """Read the windows of `length` that no longer one began with; returns the state's bytes.

        Their costs go into the tallies of that length and of the shorter ones. An encoder reads
        every window by itself, as its outputs depend on what follows, and keeps no state.
        """
        context = self.context
        check_length(context.model, length)
        takers = self._takers(length)
        todo = self._windows(length)
        rows = max(1, chunk_tokens(context, BATCH_TOKENS) // length) if not context.compress else 1
        self.held = 0 if context.compress else length
        context.progress.begin(f"perplexity at {length}", len(todo) * length)
        with context.arithmetic():
            for first in range(0, len(todo), rows):
                batch = todo[first : first + rows]
                costs, scored = self._costs(batch, length, chunk)
                self._count(batch, length, costs, scored, takers)
            return context.model.state_bytes(self.held) if self.hidden is None else None

    def _takers(self, length: int) -> list[Tally]:
        shorter = [n for n in self.tallies if n == length or (n < length and not self.hidden)]
        return [tally for n in shorter for _, tally in self.tallies[n]]

    def _windows(self, length: int) -> list[Window]:
        starts = sorted({start for _, tally in self.tallies[length] for start in tally.windows})
        every = [Window(unit, start) for unit in range(len(self.text)) for start in starts]
        return every if self.hidden else [window for window in every if window not in self.done]

    def _costs(
        self, batch: Sequence[Window], length: int, chunk: int
    ) -> tuple[Float[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
        """Nats of each predicted token of the windows, and which of them count."""
        context = self.context
        if context.compress:
            return self._after_compressed(batch[0], length, chunk)
        tokens = np.stack([self.text[unit, at : at + length + 1] for unit, at in batch])
        if self.hidden is None:
            nll = score_text(context, tokens, chunk_tokens(context, chunk))
            return nll, np.ones(nll.shape, bool)
        shown, masked = (
            np.stack([part[unit, at : at + length] for unit, at in batch]) for part in self.hidden
        )
        return fill(context, shown, tokens[:, :-1], masked), masked

    def _after_compressed(
        self, window: Window, length: int, chunk: int
    ) -> tuple[Float[np.ndarray, "1 t"], Bool[np.ndarray, "1 t"]]:
        """Nats of what is scored of a window, after what is left of the tokens before it."""
        context, (unit, at) = self.context, window
        ((_, tally),) = self.tallies[length]
        assert context.compress is not None
        scored = tally.windows[at]
        before = self.text[unit, at : at + scored.start + 1]
        left = np.asarray(context.compress(before.tolist()))
        then = self.text[unit, at + scored.start + 1 : at + scored.stop + 1]
        whole = np.concatenate([left, then])[None]
        found = score_text(context, whole, chunk_tokens(context, chunk))
        self.held = max(self.held, found.shape[1])
        nll = np.zeros((1, length))
        nll[0, scored] = found[0, len(left) - 1 :]
        wanted = np.zeros((1, length), bool)
        wanted[0, scored] = True
        return nll, wanted

    def _count(
        self,
        batch: Sequence[Window],
        length: int,
        costs: Float[np.ndarray, "b t"],
        scored: Bool[np.ndarray, "b t"],
        takers: Sequence[Tally],
    ) -> None:
        ahead = self.hidden is None  # a causal model predicts the token after each it reads
        for window, nll, wanted in zip(batch, costs, scored, strict=True):
            unit, start = window
            sizes = self.sizes[unit, start + ahead : start + ahead + length]
            for tally in takers:
                tally.add(unit, start, nll, wanted, sizes)
            self.done.add(window)

    def describe(self, question: Row, tally: Tally, state_bytes: int | None) -> Row:
        """The row's numbers; the arrays they come from go to a file beside the run's rows."""
        length, size = tally.length, int(tally.position_bytes.sum())
        nll_sum, count = float(tally.position_sums.sum()), int(tally.position_counts.sum())
        units = bits_per_byte(tally.unit_sums, tally.unit_bytes)
        weighed = [pair for pair in zip(units, tally.unit_bytes.tolist(), strict=True) if pair[1]]
        guesses = {name: _scored(nats, tally) for name, nats in self.guesses.items()}
        arrays: dict[str, Any] = {
            "nll_sum": tally.position_sums,
            "count": tally.position_counts,
            "unit_nll_sum": tally.unit_sums,
        }
        name = f"perplexity-{question['protocol']}-{length}-{_digest(arrays.values())}.npz"
        path = self.context.folder / "results" / name
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            np.savez(file, **arrays)
        row = {
            "windows": len(self.text) * len(tally.windows),
            "nll_sum": nll_sum,
            "count": count,
            "bytes": size,
            "bits_per_byte": bits_per_byte(nll_sum, size),
            "perplexity": exp(nll_sum / count) if nll_sum / count < 700 else None,  # beyond a float
            **{f"{name}_bits": bits_per_byte(nats, size) for name, nats in guesses.items()},
            "uniform_bits": bits_per_byte(count * log(self.context.model.vocab_size), size),
            "unit_bits": units,
            "unit_bytes": tally.unit_bytes.tolist(),
            "interval": interval([bits for bits, _ in weighed], [size for _, size in weighed]),
            "state_bytes": state_bytes,
            "positions_file": path.relative_to(self.context.folder).as_posix(),
        }
        if question["protocol"] in PROMPTED:
            row |= self.context.prompt_row([one.start + 1 for one in tally.windows.values()])
        if question["protocol"] == "blocks":
            row["curve"] = _curve(tally)
        return row


def _digest(arrays: Iterable[np.ndarray]) -> str:
    """Of their numbers: a row's file keeps its name as long as it has these, and no other row of
    another split, text or form of the weights writes over it."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:12]


def unigram(tokens: Int[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Nats of each token under the best model that knows their frequencies and no context."""
    _, places, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    return -np.log(counts / tokens.size)[places].reshape(tokens.shape)


def _scored(nats: Float[np.ndarray, "units t"], tally: Tally) -> float:
    """The sum over the tokens that a protocol scores, each as often as it does."""
    every = tally.windows.items()
    return float(sum(nats[:, at + own.start : at + own.stop].sum() for at, own in every))


def _curve(tally: Tally) -> Row:
    """The scores by position: log-spaced buckets, the score, tokens and bytes of each."""
    edges = position_edges(tally.length)
    sums = in_buckets(tally.position_sums, edges)
    counts = in_buckets(tally.position_counts, edges)
    sizes = in_buckets(tally.position_bytes, edges)
    return {
        "edges": edges.tolist(),
        "bits_per_byte": bits_per_byte(sums, sizes),
        "count": counts.tolist(),
        "bytes": sizes.tolist(),
    }
