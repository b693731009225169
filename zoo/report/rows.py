"""Rows to numbers: which arms there are, what was measured on each, and how sure it is.

An arm is what one line of a figure or table shows: one way to build and train a model, over all of
its seeds. Rows that share an arm's name but not its training (rate, size, budget, data, ...) are
never averaged: the name is lengthened by what differs.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Row = dict[str, Any]

HEADLINE = {"perplexity": "bits_per_byte", "speed": "tokens_per_second"}

# What splits one arm name into several, and the word that then goes before its value.
TRAINING = {
    **{"size": "size", "extension_factor": "factor", "train_length": "trained at"},
    **{"train_tokens": "train tokens", "lr": "lr", "match": "match", "state_passing": "states"},
    **{"fingerprint": "data", "tokenizer": "tokenizer", "parameters": "parameters"},
}
# What tells apart repeated measurements of one arm with one seed: they are not two seeds.
REPEATS = {"run": "run", "device": "on", "dtype": "in", "threads": "threads"}

# Student's t, 97.5 %, by degrees of freedom: few seeds deserve wide intervals.
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


Cells = dict[str, dict[int, Cell]]


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

    def cells(self, task: str, field: str, *, spread: bool = False, **equal: Any) -> Cells:
        """label -> length -> `Cell`: every arm at every length any arm was asked for.

        `spread` adds intervals: over seeds where there are several, otherwise the row's own.
        """
        groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
        for row in self.where(task=task, **equal):
            if finite(row.get("length")):
                groups[row["label"], row["length"]].append(row)
        lengths = sorted({length for _, length in groups})
        table: Cells = {label: {} for label in self.arms} if lengths else {}
        for label, measured in table.items():
            # A row without a length (a run that broke) speaks for every length not measured.
            broken = [
                row
                for row in self.by_arm[label]
                if row.get("task") in (None, task) and row["status"] != "ok"
                if missing(row.get("length"))
            ]
            for length in lengths:
                rows = groups.get((label, length), broken)
                measured[length] = summary(rows, field, spread)
        return table


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


def summary(rows: Sequence[Row], field: str, spread: bool) -> Cell:
    """The mean over the seeds that have a value, with its interval, or the reason for none."""
    fine = [row for row in rows if row["status"] == "ok" and finite(row.get(field))]
    if not fine:
        bad = [row for row in rows if row["status"] != "ok"]
        reason = in_words(bad[0]) if bad else "not recorded" if rows else "not measured"
        return Cell(tried=len(rows), reason=reason)
    values = [float(row[field]) for row in fine]
    low, high = interval(values, fine[0].get("interval")) if spread else (None, None)
    return Cell(sum(values) / len(values), low, high, len(values), len(rows), "")


def interval(values: Sequence[float], own: Any) -> tuple[float | None, float | None]:
    """95% interval of the mean over seeds (Student's t); of one seed, the row's `own`."""
    count = len(values)
    if count == 1:
        right = isinstance(own, Sequence) and len(own) == 2 and all(map(finite, own))
        return (float(own[0]), float(own[1])) if right else (None, None)
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    student = STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96
    half = student * deviation / math.sqrt(count)
    return mean - half, mean + half


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
