"""What the report shows of scores in bits per byte: ties, effective context, gains and costs."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from zoo.measurement import is_quantized, plain_numbers
from zoo.report.learned import dead
from zoo.report.noise import Floor, floors_of, is_noise
from zoo.report.protocols import SAME_TOKENS, headline
from zoo.report.rows import SHARE, Cell, Cells, Results, Row, contrast, in_words, same_text
from zoo.report.statistics import finite
from zoo.report.tables import Table, Td, Tied, overlapping
from zoo.report.validity import LEAKS
from zoo.report.words import AT_LEAST, DASH, times

ALIKE = 1.1  # the most by which levels differ that are drawn as one
NEAR = 1024  # tokens: what a text of this length does not show is the distant past
MACHINE = ("device", "threads", "ranks")  # what the numbers of a row should not depend on


@dataclass(frozen=True)
class EffectiveContext:
    """Effective context in tokens, its 95% interval, and whether the tests ended before it did."""

    length: int
    low: int
    high: int
    open_end: bool
    then: str = ""  # why there is no score at the next length
    fewer: str = ""  # "2 of 3 seeds", where those that have a score are fewer than were tried

    def __str__(self) -> str:
        return f"{AT_LEAST + ' ' if self.open_end else ''}{self.length:,}"

    @property
    def ends(self) -> str:
        """Its interval in words, where the scores leave it open."""
        return f" ({self.low:,}{DASH}{self.high:,})" if self.low < self.high else ""


def bigram(results: Results, protocol: str | None = None) -> float | None:
    """Bits per byte of a bigram model of the training text; None where texts differ in it.

    It scores much the same at every length, so that their median is drawn for all.
    """
    rows = results.where(task="perplexity", status="ok")
    rows = [row for row in rows if protocol in (None, row.get("protocol"))]
    found = sorted(row["bigram_bits"] for row in rows if finite(row.get("bigram_bits")))
    if not found or found[-1] > ALIKE * found[0]:
        return None
    return found[len(found) // 2]


def score_noise(results: Results, protocol: str) -> dict[int, Floor]:
    """The noise floors of bits per byte, by length."""
    cells = results.cells("perplexity", "bits_per_byte", protocol=protocol)
    return floors_of(results, cells, "score")


def ties(results: Results, protocol: str) -> Tied:
    """Whether two arms cannot be distinguished at a length.

    That is so where the interval of their difference holds 0 or the seed alone makes as much, or,
    of arms that were not scored on the same text, where the intervals of their scores overlap.
    """
    places = results.places("perplexity", protocol=protocol)
    noise = score_noise(results, protocol)
    overlap = overlapping(results.cells("perplexity", "bits_per_byte", protocol=protocol), noise)

    def tied(label: str, other: str, length: int) -> bool:
        apart = contrast(places[label][length], places[other][length])
        if apart.low is not None and apart.high is not None:
            by_chance = is_noise(apart, noise.get(length), label, other)
            return by_chance or apart.low <= 0 <= apart.high
        return overlap(label, other, length)

    return tied


def effective_context(excess: dict[int, Cell], train: int | None) -> EffectiveContext | None:
    """The largest length up to which no score is worse than it may be.

    `excess` is by how much each is worse than the share allows: `Results.changes` against the
    score at `train` times 1 + share. The interval applies the same rule to both ends of the cells'
    intervals.
    """
    if train is None or train not in excess or excess[train].value is None:
        return None
    lengths = [length for length in sorted(excess) if length > train]

    def last(end: str) -> int:
        def good(length: int) -> bool:
            at = getattr(excess[length], end)
            at = excess[length].value if at is None else at
            return at is not None and at <= 0

        return max(takewhile(good, lengths), default=train)

    point = last("value")
    after = next((excess[length] for length in lengths if length > point), None)
    within = [excess[length] for length in (train, *lengths) if length <= point]
    least = min(within, key=lambda cell: cell.seeds)
    fewer = f"{least.seeds} of {least.tried} seeds" if least.seeds < least.tried else ""
    then = after.reason if after else ""
    return EffectiveContext(point, last("high"), last("low"), after is None, then, fewer)


def context_gains(results: Results, protocol: str) -> Cells:
    """Bits per byte that each arm saves on the same tokens where it reads more than `NEAR` tokens.

    A score that stays level beyond the training length has a gain of 0: the model does not use what
    it reads there. Empty where `NEAR` or nothing beyond it was measured, and of protocols that do
    not score the same tokens at every length. An arm that has not learned has no gain.
    """
    if protocol not in SAME_TOKENS:
        return {}
    places, without = results.places("perplexity", protocol=protocol), dead(results)
    return {
        label: {
            length: Cell(reason=str(without[label]))
            if label in without
            else contrast(mine[NEAR], rows)
            for length, rows in mine.items()
            if length > NEAR
        }
        for label, mine in places.items()
        if NEAR in mine and max(mine) > NEAR
    }


def quantization_costs(results: Results, protocol: str) -> Cells:
    """Bits per byte that fewer bits cost: of each arm whose weights or cache are quantized, less
    those of the same runs in plain numbers at the same length. Empty where there is none.

    A run that was read in plain numbers several times, as by several machines, counts once: as it
    was read most like the row in fewer bits.
    """
    every, found = results.where(task="perplexity", protocol=protocol), {}
    plain = [row for row in every if not is_quantized(row.get("dtype"))]

    def reading(row: Row, dtype: str | None) -> tuple[Any, ...]:
        return row.get("run"), row.get("extension_settings"), dtype

    for label, mine in results.places("perplexity", protocol=protocol).items():
        measured = [row for rows in mine.values() for row in rows]
        if not any(is_quantized(row.get("dtype")) for row in measured):
            continue
        same = {reading(row, plain_numbers(row.get("dtype") or "")) for row in measured}
        base = [one for one in plain if reading(one, one.get("dtype")) in same]
        if base:
            found[label] = {
                length: contrast(rows, _counterparts(rows, base)) for length, rows in mine.items()
            }
    return found


def _counterparts(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Of each run's rows at this length, of which there may be several, one of the same text."""

    def alike(row: Row, other: Row) -> list[bool]:
        return [
            other["status"] == "ok",
            same_text(row, other),
            *(row.get(name) == other.get(name) for name in MACHINE),
        ]

    found = []
    for row in rows:
        same = [one for one in others if all(one.get(k) == row.get(k) for k in ("run", "length"))]
        found += [max(same, key=functools.partial(alike, row))] if same else []
    return found


def effective_contexts(results: Results) -> dict[str, EffectiveContext | None]:
    """Effective context of every arm, from the scores on the same tokens at every length.

    None where there is no score at the training length, or where the arm has not learned: a score
    that no text could make worse stays level at any length.
    """
    protocol, without = headline(results), dead(results)
    excess = results.changes(protocol, 1 + SHARE) if protocol in SAME_TOKENS else {}
    return {
        label: None if label in without else effective_context(mine, results.train_length(label))
        for label, mine in excess.items()
    }


def contexts(results: Results) -> Table | None:
    """Effective context as a table."""
    heads = ("arm", "tokens", "of the training length", "95% interval", "ends because")
    caption = f"Largest length up to which bits per byte stay within {SHARE:.0%} of the arm's own."
    table, without = Table(caption, [(head, "") for head in heads]), dead(results)
    for label, own in effective_contexts(results).items():
        if own is None:
            why = str(without[label]) if label in without else _unscored(results, label)
            kind = LEAKS if why.startswith(LEAKS) else "reason"
            cells = [Td(why, kind=kind, span=4)]
        else:
            why = "it does not: the tests end here" if own.open_end else own.then or "scores rise"
            ends = f"{own.low:,}{DASH}{own.high:,}"
            multiple = times(own.length, results.train_length(label))
            cells = [Td(str(own), own.fewer, "lead"), Td(multiple), Td(ends), Td(why, kind="words")]
        table.rows.append([Td(label), *cells])
    return table if table.rows else None


def _unscored(results: Results, label: str) -> str:
    """Why an arm has no score at its training length."""
    leaks = (in_words(row) for row in results.by_arm[label] if row["status"] == LEAKS)
    return next(leaks, "unknown: no score at the training length")
