"""Rows to numbers: which arms there are, what was measured on each, and how sure it is.

An arm is what one line of a figure or table shows: one way to build and train a model, over all of
its seeds. Rows that share an arm's name but not its training (rate, size, budget, data, ...) are
never averaged: the name is lengthened by what differs.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Row = dict[str, Any]

HEADLINE = {
    **{"perplexity": "bits_per_byte", "speed": "tokens_per_second", "passkey": "accuracy"},
}

# What splits one arm name into several, and the word that then goes before its value.
TRAINING = {
    **{"size": "size", "extension_factor": "factor", "train_length": "trained at"},
    **{"train_tokens": "train tokens", "lr": "lr", "match": "match", "state_passing": "states"},
    **{"fingerprint": "data", "tokenizer": "tokenizer", "parameters": "parameters"},
}
# What tells apart repeated measurements of one arm with one seed: they are not two seeds.
REPEATS = {"run": "run", "device": "on", "dtype": "in", "threads": "threads"}

# Rows that agree in these were scored on the same tokens.
SAME_TEXT = ("fingerprint", "split", "documents", "unit", "units", "count")

# Student's t, 97.5 %, by degrees of freedom: few seeds or stretches deserve wide intervals.
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

STATUS = {"out_of_memory": "out of memory", "not_applicable": "n/a"}


@dataclass(frozen=True)
class Cell:
    """One measurement of one arm at one length: a value with its 95% interval, or the reason."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0  # with a value
    tried: int = 0
    reason: str = "not measured"

    @property
    def half(self) -> float:
        """Half the interval's width; 0 where there is none."""
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2


Cells = dict[str, dict[int, Cell]]
Places = dict[str, dict[int, list[Row]]]  # the rows of each arm at each length


@dataclass(frozen=True)
class Results:
    """All rows, each with its arm's `label`; `arms` are the labels in order of appearance."""

    rows: list[Row]
    runs: list[Row]
    arms: list[str]
    reference: str | None

    @functools.cached_property
    def by_arm(self) -> dict[str, list[Row]]:
        """label -> its rows."""
        return {label: self.where(label=label) for label in self.arms}

    def where(self, **equal: Any) -> list[Row]:
        """The rows whose fields have these values."""
        return [row for row in self.rows if all(row.get(k) == v for k, v in equal.items())]

    def known(self, label: str, field: str) -> Any:
        """What an arm's rows say of it: the first value that is there."""
        values = (row.get(field) for row in self.by_arm[label])
        return next((value for value in values if not missing(value)), None)

    def train_length(self, label: str | None = None) -> int | None:
        """The training length of an arm, by default of the reference arm."""
        label = label or self.reference
        length = self.known(label, "train_length") if label else None
        return int(length) if finite(length) else None

    def places(self, task: str, **equal: Any) -> Places:
        """label -> length -> rows: every arm at every length any arm was asked for."""
        groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
        for row in self.where(task=task, **equal):
            if finite(row.get("length")):
                groups[row["label"], row["length"]].append(row)
        lengths = sorted({length for _, length in groups})
        table: Places = {label: {} for label in self.arms} if lengths else {}
        for label, measured in table.items():
            # A row without a length (a run that broke) speaks for every length not measured.
            broken = [
                row
                for row in self.by_arm[label]
                if row.get("task") in (None, task) and row["status"] != "ok"
                if missing(row.get("length"))
            ]
            measured |= {length: groups.get((label, length), broken) for length in lengths}
        return table

    def cells(self, task: str, field: str, *, spread: bool = False, **equal: Any) -> Cells:
        """label -> length -> `Cell`.

        `spread` adds intervals: over seeds where there are several, otherwise the row's own.
        """
        return {
            label: {length: summary(rows, field, spread) for length, rows in mine.items()}
            for label, mine in self.places(task, **equal).items()
        }

    def changes(self, protocol: str, times: float = 1.0) -> Cells:
        """Each arm's bits per byte less `times` its own at its training length."""
        return {
            label: {
                length: contrast(rows, mine.get(self.train_length(label) or 0, []), times)
                for length, rows in mine.items()
            }
            for label, mine in self.places("perplexity", protocol=protocol).items()
        }

    def differences(self, protocol: str) -> Cells:
        """Each other arm's bits per byte less the reference arm's at the same length."""
        places = self.places("perplexity", protocol=protocol)
        base = places.pop(self.reference or "", {})
        return {
            label: {length: contrast(rows, base[length]) for length, rows in mine.items()}
            for label, mine in places.items()
        }


def missing(value: Any) -> bool:
    """True for None and NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def finite(value: Any) -> TypeGuard[float]:
    """True for an ordinary number."""
    return isinstance(value, int | float) and math.isfinite(value)


def in_words(row: Mapping[str, Any]) -> str:
    """Why a row has no number: "n/a: learned positions end at 512"."""
    word = STATUS.get(row["status"], str(row["status"]))
    return word if missing(row.get("reason")) else f"{word}: {row['reason']}"


def fine(rows: Sequence[Row], field: str) -> list[Row]:
    """The rows that have a value."""
    return [row for row in rows if row["status"] == "ok" and finite(row.get(field))]


def summary(rows: Sequence[Row], field: str, spread: bool) -> Cell:
    """The mean over the seeds that have a value, with its interval, or the reason for none."""
    good = fine(rows, field)
    if not good:
        bad = [row for row in rows if row["status"] != "ok"]
        reason = in_words(bad[0]) if bad else "not recorded" if rows else "not measured"
        return Cell(tried=len(rows), reason=reason)
    values = [float(row[field]) for row in good]
    own = good[0].get(f"{field}_interval", good[0].get("interval"))
    low, high = (interval(values) or _ends(own) or (None, None)) if spread else (None, None)
    return Cell(sum(values) / len(values), low, high, len(values), len(rows), "")


def contrast(rows: Sequence[Row], others: Sequence[Row], times: float = 1.0) -> Cell:
    """Bits per byte of the rows less `times` those of the others, seed by seed, on the same text.

    The interval is that of the differences: over seeds where several are paired, otherwise over
    the stretches of text. What all texts have in common, easy or hard, is not in it.
    """
    good, against = fine(rows, "bits_per_byte"), fine(others, "bits_per_byte")
    if not good:
        return summary(rows, "bits_per_byte", False)
    pairs = [
        (one, other)
        for one, other in itertools.product(good, against)
        if all(one.get(name) == other.get(name) for name in ("seed", *SAME_TEXT))
    ]
    if not pairs:
        other = "no seed scored the same text" if against else "it has no score"
        return Cell(tried=len(rows), reason=f"nothing to compare with: {other}")
    values = [one["bits_per_byte"] - times * other["bits_per_byte"] for one, other in pairs]
    units = ((row.get("unit_bits") or []) for row in pairs[0])
    own = [one - times * other for one, other in zip(*units, strict=False)]
    low, high = interval(values) or interval(own) or (None, None)
    return Cell(sum(values) / len(values), low, high, len(values), len(rows), "")


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% interval (Student's t) of the mean of independent values; None of fewer than two."""
    freedom = len(values) - 1
    if freedom < 1:
        return None
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / freedom)
    beyond = 1.96 + 2.37 / freedom + 2.8 / freedom**2
    student = STUDENT[freedom - 1] if freedom <= len(STUDENT) else beyond
    half = student * deviation / math.sqrt(len(values))
    return mean - half, mean + half


def wilson(right: int, count: int) -> tuple[float, float]:
    """95% interval of a share that was `right` out of `count` (Wilson 1927)."""
    z = 1.959964
    middle = (right + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(right * (count - right) / count + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def _ends(own: Any) -> tuple[float, float] | None:
    """An interval as a row has it, or None."""
    right = isinstance(own, Sequence) and len(own) == 2 and all(map(finite, own))
    return (float(own[0]), float(own[1])) if right else None


def gather(rows: Iterable[Mapping[str, Any]], runs: Iterable[Mapping[str, Any]]) -> Results:
    """Read rows and run records; a run that left no row keeps its place with the reason."""
    records: list[Row] = [dict(row) for row in rows]
    runs = [dict(run) for run in runs]
    measured = {row.get("run") for row in records}
    records += [_run_row(run) for run in runs if run.get("run") not in measured]
    for row in records:
        row["status"] = row.get("status") or "ok"
        row["label"] = str(row.get("arm") or row.get("model") or "unnamed")
        value = row.get(HEADLINE.get(str(row.get("task")), ""), 0.0)
        if row["status"] == "ok" and not finite(value):
            row |= {"status": "failed", "reason": f"the result is {value}, not a number"}
    for field, word in TRAINING.items():
        _split(records, field, word)
    for field, word in REPEATS.items():
        _split(_repeated(records), field, word)
    arms = list(dict.fromkeys(row["label"] for row in records))
    plain = [
        row["label"]
        for row in records
        if row.get("model") == "transformer" and row.get("extension") in (None, "none")
    ]
    return Results(records, runs, arms, next(iter(plain or arms), None))


def unfinished(run: Mapping[str, Any]) -> str | None:
    """Why a run has not finished, in words; None when it has."""
    if run.get("status") == "done":
        return None
    step = f" at step {run['step']:,}" if finite(run.get("step")) else ""
    reason = "" if missing(run.get("reason")) else f": {run['reason']}"
    return f"{run.get('status') or 'no status'}{step}{reason}"


def _run_row(run: Row) -> Row:
    """A row without a measurement, so that a run that left none still shows."""
    failed = run.get("status") == "failed"
    reason = run.get("reason") if failed else unfinished(run) or "trained, not measured yet"
    about = {"arm": run.get("arm") or run.get("model") or run.get("run"), "task": None}
    return run | about | {"status": "failed" if failed else "unfinished", "reason": reason}


def _split(rows: Sequence[Row], field: str, word: str) -> None:
    """Lengthen the labels under which `field` has several values by "word value"."""
    values = defaultdict(set)
    for row in rows:
        if not missing(row.get(field)):
            values[row["label"]].add(str(row[field]))
    for row in rows:
        if len(values[row["label"]]) > 1 and not missing(row.get(field)):
            value = row[field]
            short = str(value)[:8] if field == "fingerprint" else value
            row["label"] += (
                f" · {word} {short:,}" if isinstance(short, int) else f" · {word} {short}"
            )


def _repeated(rows: Sequence[Row]) -> list[Row]:
    """The rows of the arms in which one measurement was made twice with one seed."""
    count: dict[tuple[Any, ...], int] = defaultdict(int)
    for row in rows:
        if row["status"] == "ok":
            same = (row.get(name) for name in ("seed", "task", "protocol", "phase", "length"))
            count[row["label"], *same] += 1
    twice = {label for (label, *_), times in count.items() if times > 1}
    return [row for row in rows if row["label"] in twice]
