"""Rows to numbers: which arms there are, what was measured on each, and how sure it is.

An arm is what one line of a figure or table shows: one way to build, train and read a model, over
all of its seeds. Rows are averaged over seeds of one and the same question only: those that share
an arm's name but not its training (rate, size, budget, data, any other option), its extension's
settings or what was asked get longer names, by every setting that differs.
"""

import functools
import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from zoo.measurement import question
from zoo.report.validity import drop_partial_budgets, mark_leaks, spread_leaks

Row = dict[str, Any]

HEADLINE = {
    **{"perplexity": "bits_per_byte", "speed": "tokens_per_second", "passkey": "accuracy"},
    "accuracy": "accuracy",
}

# What splits one arm name into several, and the word that then goes before its value.
TRAINING = {
    **{"size": "size", "extension_factor": "factor", "train_length": "trained at"},
    **{"train_tokens": "train tokens", "lr": "lr", "match": "match", "state_passing": "states"},
    **{"fingerprint": "data", "tokenizer": "tokenizer", "parameters": "parameters"},
}
# What a run's weights were read by and in.
READ = {"device": "on", "dtype": "in", "threads": "threads"}
WORDS = 4  # settings that a label names; of more, a hash
LONG = 24  # characters of a value that a label shows; of more, a hash

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
        found: dict[str, list[Row]] = {label: [] for label in self.arms}
        for row in self.rows:
            found[row["label"]].append(row)
        return found

    @functools.cached_property
    def by_task(self) -> dict[Any, list[Row]]:
        """task -> its rows."""
        found: dict[Any, list[Row]] = defaultdict(list)
        for row in self.rows:
            found[row.get("task")].append(row)
        return {**found}

    def requested(self, label: str) -> bool:
        """Whether an arm was asked for now, where others stand beside it that were not."""
        return label in self.asked_for and len(self.asked_for) < len(self.arms)

    @functools.cached_property
    def asked_for(self) -> set[str]:
        """The arms with a row that was asked for now."""
        return {row["label"] for row in self.rows if row.get("requested", True)}

    def where(self, **equal: Any) -> list[Row]:
        """The rows whose fields have these values."""
        rows = self.rows
        if "task" in equal:
            rows = self.by_task.get(equal["task"], [])
        if "label" in equal:
            rows = min(rows, self.by_arm.get(equal["label"], []), key=len)
        return [row for row in rows if all(row.get(k) == v for k, v in equal.items())]

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
    mark_leaks(records, runs)
    drop_partial_budgets(records, runs)
    for row in records:
        row["status"] = row.get("status") or "ok"
        row["label"] = str(row.get("arm") or row.get("model") or "unnamed")
        value = row.get(HEADLINE.get(str(row.get("task")), ""), 0.0)
        if row["status"] == "ok" and not finite(value):
            row |= {"status": "failed", "reason": f"the result is {value}, not a number"}
    _lengthen(records, runs)
    spread_leaks(records)
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


def _lengthen(rows: Sequence[Row], runs: Sequence[Row]) -> None:
    """Tell apart by their labels the rows that are not one arm's, setting by setting."""
    trained = {run.get("run"): run.get("settings") or {} for run in runs}
    for field, word in (*TRAINING.items(), *READ.items()):
        _split(rows, functools.partial(_named, field=field, word=word))
    _split(rows, lambda row: trained.get(row.get("run"), {}))
    _split(rows, lambda row: row.get("extension_options") or {})
    _split(rows, functools.partial(_named, field="extension_settings", word="settings"))
    _split_questions(rows)
    _split(_repeated(rows), lambda row: {"run": row.get("run")})


def _named(row: Row, field: str, word: str) -> Row:
    """A row's value in that field under the word for it, or nothing."""
    return {} if missing(row.get(field)) else {word: row[field]}


def _split(rows: Iterable[Row], settings: Callable[[Row], Mapping[str, Any]]) -> None:
    """Lengthen the labels under which settings have several values by their names and values."""
    for same in _grouped(rows, lambda row: row["label"]):
        told = [settings(row) for row in same]
        names = _differing([own for own in told if own])
        for row, own in zip(same, told, strict=True):
            if own:  # a row that says nothing of them, as of a run that broke, stays as it is
                row["label"] += _words(names, own)


def _split_questions(rows: Iterable[Row]) -> None:
    """Lengthen the labels whose rows at one length were asked different questions."""
    shown = ("task", "protocol", "phase")
    for same in _grouped(rows, lambda row: (row["label"], *map(row.get, shown))):
        names: dict[str, None] = {}
        for asked in _grouped(same, lambda row: row.get("length")):
            answers = [question(row) for row in asked if row["status"] == "ok"]
            names |= dict.fromkeys(_differing(answers))
        for row in same:
            row["label"] += _words([*names], row)


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return [*groups.values()]


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of those that do not have the same value everywhere; a missing one is None."""
    names = dict.fromkeys(name for own in settings for name in own)
    return [name for name in names if len({_text(own.get(name)) for own in settings}) > 1]


def _words(names: Sequence[str], settings: Mapping[str, Any]) -> str:
    """ " · name value" for each, or for many a hash of all; names without what precedes the dot."""
    if len(names) > WORDS:
        told = json.dumps([settings.get(name) for name in names], sort_keys=True, default=str)
        return f" · {len(names)} options {hashlib.sha256(told.encode()).hexdigest()[:6]}"
    short = [name.rpartition(".")[2] for name in names]
    words = ""
    for name, last in zip(names, short, strict=True):
        value = settings.get(name)
        words += f" · {last if short.count(last) == 1 else name} {_text(value)}"
    return words


def _text(value: Any) -> str:
    """A value as a label has it: thousands apart, long ones cut, 64 hexadecimal digits to 8."""
    if missing(value):
        return "default"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.removesuffix(".0") if isinstance(value, float) else text
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return text[:8]
    cut = hashlib.sha256(text.encode()).hexdigest()[:6]
    return text if len(text) <= LONG else f"{text[: LONG - 8]}..{cut}"


def _repeated(rows: Sequence[Row]) -> list[Row]:
    """The rows of the arms in which one measurement was made twice with one seed."""
    count: dict[tuple[Any, ...], int] = defaultdict(int)
    for row in rows:
        if row["status"] == "ok":
            same = (row.get(name) for name in ("seed", "task", "protocol", "phase", "length"))
            count[row["label"], *same] += 1
    twice = {label for (label, *_), times in count.items() if times > 1}
    return [row for row in rows if row["label"] in twice]
