"""Rows to numbers: which arms there are, what was measured on each, and how sure it is.

An arm is what one line of a figure or table shows: one way to build, train and read a model, over
all of its seeds. Rows are averaged over seeds of one and the same question only (see labels).
"""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zoo.measurement import Declaration, Quantity, declared, is_quantized, panel
from zoo.report.labels import lengthen
from zoo.report.rates import Rate, choose_rates
from zoo.report.statistics import deviation, finite, interval, missing
from zoo.report.validity import (
    NOT_AUDITED,
    audited_tokens,
    drop_partial_budgets,
    mark_audits,
    spread_leaks,
)

Row = dict[str, Any]

SAME_TEXT = ("fingerprint", "split", "documents", "unit", "units", "count")
SHARE = 0.05  # scores that are worse by more than at the training length have broken
RESULTS = ("value", "bits_per_byte", "accuracy", "score")  # of a task that declares nothing
STATUS = {"out_of_memory": "out of memory", "not_applicable": "n/a", NOT_AUDITED: "not audited"}
STATUS["ambiguous"] = "no single value"


@dataclass(frozen=True)
class Cell:
    """One measurement of one arm at one length: a value with its 95% interval, or the reason."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0  # with a value
    tried: int = 0
    reason: str = "not measured"
    spread: float | None = None  # standard deviation over seeds, of two or more
    values: Mapping[Any, float] = dataclasses.field(default_factory=dict)  # of each run and seed

    @property
    def trainings(self) -> frozenset[Any]:
        """Run and seed of each value, where they are known."""
        return frozenset(one for one in self.values if one[0])

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
    rates: tuple[Rate, ...] = ()  # all that were tried, of arms with several

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
        """Whether an arm was requested now, where others that were not are beside it."""
        return label in self.all_requested and len(self.all_requested) < len(self.arms)

    @functools.cached_property
    def all_requested(self) -> set[str]:
        """The arms with a row that was requested now."""
        return {row["label"] for row in self.rows if row.get("requested", True)}

    @functools.cached_property
    def tasks(self) -> dict[str, Declaration]:
        """task -> what it declares, as far as its rows have it."""
        found: dict[str, Declaration] = {}
        for task, rows in self.by_task.items():
            if task is None:
                continue
            said = [one for row in rows if (one := declared(row))] or [_undeclared(task, rows)]
            every: dict[tuple[str, str], Quantity] = {}
            for q in (q for one in said for q in one.quantities):
                before = every.setdefault((q.field, q.name), q)
                # Rows of an older version may lack what later ones have, whichever come first.
                every[q.field, q.name] = replace(q, guess=q.guess or before.guess)
            found[task] = replace(said[0], quantities=tuple(every.values()))
        return found

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
        """label -> length -> rows: every arm at every length that any arm has."""
        groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
        for row in self.where(task=task, **equal):
            if finite(row.get("length")):
                groups[row["label"], row["length"]].append(row)
        lengths = sorted({length for _, length in groups})
        table: Places = {label: {} for label in self.arms} if lengths else {}
        for label, measured in table.items():
            # A row without a length (a run that broke) speaks for every length: no other of its
            # run may have been measured there.
            broken = [
                row
                for row in self.by_arm[label]
                if row.get("task") in (None, task) and row["status"] != "ok"
                if missing(row.get("length"))
            ]
            for length in lengths:
                own = groups.get((label, length), [])
                runs = {row.get("run") for row in own}
                measured[length] = own + [row for row in broken if row.get("run") not in runs]
        return table

    def cells(self, task: str, field: str, *, own: str | None = "interval", **equal: Any) -> Cells:
        """label -> length -> `Cell`.

        Intervals are over seeds where there are several, otherwise those that rows have as `own`.
        """
        return {
            label: {length: summary(rows, field, own) for length, rows in mine.items()}
            for label, mine in self.places(task, **equal).items()
        }

    def measured(self, task: str, quantity: Quantity) -> Cells:
        """label -> length -> `Cell` of a quantity; a run with several rows of it counts once."""
        found: Cells = {}
        for label, mine in self.places(task, **quantity.where).items():
            once = {length: by_run(rows, quantity.field) for length, rows in mine.items()}
            found[label] = {
                length: summary(rows, quantity.field, quantity.interval)
                for length, rows in once.items()
            }
        return found

    def chances(self, task: str, quantity: Quantity) -> list[float]:
        """What guessing would give, each value that rows have for it."""
        rows = self.where(task=task, status="ok", **quantity.where)
        return sorted({v for row in rows if finite(v := row.get(quantity.chance or ""))})

    def guesses(self, task: str, quantity: Quantity) -> list[float]:
        """What rules that associate nothing would give, each value that rows have for it."""
        rows = self.where(task=task, status="ok", **quantity.where)
        return sorted({v for row in rows if finite(v := row.get(quantity.guess or ""))})

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


def in_words(row: Mapping[str, Any]) -> str:
    """Why a row has no number: "n/a: learned positions end at 512"."""
    word = STATUS.get(row["status"], str(row["status"]))
    return word if missing(row.get("reason")) else f"{word}: {row['reason']}"


def fine(rows: Sequence[Row], field: str) -> list[Row]:
    """The rows that have a value."""
    return [row for row in rows if row["status"] == "ok" and finite(row.get(field))]


def summary(rows: Sequence[Row], field: str, own: str | None = None) -> Cell:
    """The mean over the seeds that have a value, with its interval, or the reason for none.

    The interval is over seeds, or of one seed, and of seeds that agree to the last digit, what a
    row has in the field `own`.
    """
    good = fine(rows, field)
    if not good:
        bad = [row for row in rows if row["status"] != "ok"]
        reason = in_words(bad[0]) if bad else "not recorded" if rows else "not measured"
        return Cell(tried=len(rows), reason=reason)
    values = [float(row[field]) for row in good]
    alike = len({*values}) == 1  # seeds with one value say nothing of how sure it is
    over_seeds = None if alike else interval(values)
    low, high = over_seeds or _ends(good[0].get(own or "")) or interval(values) or (None, None)
    mean, spread = sum(values) / len(values), deviation(values)
    own_values = {(row.get("run"), row.get("seed")): float(row[field]) for row in good}
    return Cell(mean, low, high, len(values), len(rows), "", spread, own_values)


def same_text(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows were scored on the same tokens, each as often in both.

    The windows of window_mean start every `stride` tokens: as many of them may be others.
    """
    by_stride = "window_mean" in (row.get("protocol"), other.get("protocol"))
    names = (*SAME_TEXT, "stride") if by_stride else SAME_TEXT
    return all(row.get(name) == other.get(name) for name in names)


def contrast(rows: Sequence[Row], others: Sequence[Row], times: float = 1.0) -> Cell:
    """Bits per byte of the rows less `times` those of the others, seed by seed, on the same text.

    The interval is that of the differences: over seeds where several are paired, otherwise over
    the stretches of text. What all texts have in common, easy or hard, is not in it.
    """
    good, against = fine(rows, "bits_per_byte"), fine(others, "bits_per_byte")
    if not good:
        return summary(rows, "bits_per_byte")
    pairs = [
        (one, other)
        for one, other in itertools.product(good, against)
        if one.get("seed") == other.get("seed") and same_text(one, other)
    ]
    if not pairs:
        other = "no seed scored the same text" if against else "it has no score"
        return Cell(tried=len(rows), reason=f"nothing to compare with: {other}")
    values = [one["bits_per_byte"] - times * other["bits_per_byte"] for one, other in pairs]
    low, high = interval(values) or _over_stretches(*pairs[0], times) or (None, None)
    return Cell(sum(values) / len(values), low, high, len(values), len(rows), "")


def _over_stretches(one: Row, other: Row, times: float) -> tuple[float, float] | None:
    """The interval of what two scores of the same text differ by, over its stretches.

    A stretch weighs as many bytes as it has; in rows of before these were kept, all weigh alike.
    """
    units = [row.get("unit_bits") or [] for row in (one, other)]
    sizes = one.get("unit_bytes") or other.get("unit_bytes") or [1] * len(units[0])
    both = [both for both in zip(*units, sizes, strict=False) if None not in both]
    return interval([a - times * b for a, b, _ in both], [size for *_, size in both])


def _undeclared(task: str, rows: Sequence[Row]) -> Declaration:
    """What can be shown of a task of which no row carries a declaration."""
    field = next((n for n in RESULTS if any(finite(row.get(n)) for row in rows)), "value")
    name = task if field == task else f"{task}: {field}"
    result = Quantity(field=field, name=name, better=None, interval="interval", chance="chance")
    return Declaration(title=task, about="", quantities=(result,))


def by_run(rows: Sequence[Row], field: str) -> list[Row]:
    """One row of each seed of each run: of several prompts with the mean of their values, of
    several protocols or data sets, which are several numbers, without one unless it is the same.
    """
    every: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        every[row.get("run"), row.get("seed")].append(row)
    return [_as_one(fine(own, field) or own, field) for own in every.values()]


def _as_one(rows: Sequence[Row], field: str) -> Row:
    """A row with the mean of several, of which no single interval is that of the mean."""
    if len(rows) == 1 or not fine(rows[:1], field):
        return rows[0]
    if (names := _kinds(rows)) and len({row[field] for row in rows}) > 1:
        return rows[0] | {"status": "ambiguous", "reason": f"it differs by {', '.join(names)}"}
    known = {key: value for key, value in rows[0].items() if all(r.get(key) == value for r in rows)}
    return known | {"status": "ok", field: sum(row[field] for row in rows) / len(rows)}


def _kinds(rows: Sequence[Row]) -> list[str]:
    """The fields in which rows of a task are of several kinds, but for their prompts."""
    said = declared(rows[0])
    places = [panel(row) for row in rows]
    names = dict.fromkeys(name for place in places for name in place)
    several = [name for name in names if len({str(place.get(name)) for place in places}) > 1]
    return [name for name in several if said is None or name != said.prompt]


def _ends(own: Any) -> tuple[float, float] | None:
    """An interval as a row has it, or None."""
    right = isinstance(own, Sequence) and len(own) == 2 and all(map(finite, own))
    return (float(own[0]), float(own[1])) if right else None


def gather(rows: Iterable[Mapping[str, Any]], runs: Iterable[Mapping[str, Any]]) -> Results:
    """Read rows and run records; a run that left no row keeps its place with the reason."""
    records: list[Row] = [dict(row) for row in rows]
    runs = [dict(run) for run in runs]
    records, runs, rates = choose_rates(records, runs)
    measured = {row.get("run") for row in records}
    records += [_run_row(run) for run in runs if run.get("run") not in measured]
    mark_audits(records, runs)
    drop_partial_budgets(records, runs)
    for row in records:
        row["status"] = row.get("status") or "ok"
        row["audited_tokens"] = audited_tokens(row)
        row["label"] = str(row.get("arm") or row.get("model") or "unnamed")
        said = declared(row)
        value = row.get(said.quantities[0].field) if said and said.quantities else 0.0
        if row["status"] == "ok" and not finite(value):
            row |= {"status": "failed", "reason": f"the result is {value}, not a number"}
    lengthen(records, runs)
    spread_leaks(records)
    arms = list(dict.fromkeys(row["label"] for row in records))
    return Results(records, runs, arms, reference_arm(records), tuple(rates))


def reference_arm(rows: Sequence[Row]) -> str | None:
    """The label of the arm that others are compared with: the transformer as it was trained, of
    several that in plain numbers, and that which was not tuned; without one the first arm."""
    plain = [
        row
        for row in rows
        if row.get("model") == "transformer" and row.get("extension") in (None, "none")
    ]

    def departs(row: Row) -> tuple[bool, bool]:
        name = str(row.get("arm") or "transformer").partition(" (published")[0]
        return name != "transformer", is_quantized(row.get("dtype"))

    return min(plain, key=departs)["label"] if plain else next((r["label"] for r in rows), None)


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
    about["data"] = (run.get("settings") or {}).get("data.name")  # a record's own says more
    return run | about | {"status": "failed" if failed else "unfinished", "reason": reason}
