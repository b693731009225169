"""Do other held-out questions rank the arms alike? Rank correlations between two measurements.

Rows of one task that differ in a field, such as the part of the corpus (`split`) or the seed of the
examples, are two measurements of the same models. Of each length and quantity

    correlation   Spearman's, of the arms' means over their trainings; ties share their mean rank
    interval      95% by bootstrap over trainings: each arm's seeds are drawn anew, the same for
                  both measurements, `DRAWS` times from a fixed generator (Efron 1979); none where
                  every arm has one seed
    swapped       pairs of arms that the two order in opposite ways, and how many of these are
                  further apart in both than the noise floor (zoo.report.noise): what a choice of
                  held-out questions would decide
"""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from zoo.measurement import Quantity
from zoo.report.noise import Floor, floors_of
from zoo.report.rows import Results, Row, by_run, fine, gather
from zoo.report.tables import shown_quantities
from zoo.report.text import aligned
from zoo.report.words import DASH, caption

DRAWS = 2000
MIN_ARMS = 3  # of two any order is all or nothing

Scores = dict[str, dict[Any, float]]  # arm -> its run -> the value


@dataclass(frozen=True)
class Agreement:
    """How two measurements rank the arms at one length."""

    quantity: str
    length: int
    arms: int
    correlation: float | None  # None where all arms are equal in one of them
    interval: tuple[float, float] | None
    swapped: list[tuple[str, str]]
    beyond_noise: list[tuple[str, str]]


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1; equal ones have the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one side has no order at all."""
    if len({*one}) < 2 or len({*other}) < 2:
        return None
    return statistics.correlation(ranks(one), ranks(other))


def agreements(one: Results, other: Results, task: str) -> list[Agreement]:
    """How two measurements of a task rank the arms that both have, by quantity and length."""
    found = []
    for quantity in shown_quantities(one, task):
        if quantity.better is None:
            continue
        floors = [
            floors_of(part, part.measured(task, quantity), quantity.form) for part in (one, other)
        ]
        values = [_values(part, task, quantity) for part in (one, other)]
        for length in sorted(values[0].keys() & values[1].keys()):
            first, second = (side[length] for side in values)
            arms = [arm for arm in first if first[arm].keys() & second.get(arm, {}).keys()]
            if len(arms) >= MIN_ARMS:
                noise = [floor.get(length) for floor in floors]
                shared = [_shared(first, second, arms), _shared(second, first, arms)]
                found.append(_agreement(caption(quantity), length, shared, noise))
    return found


def _values(results: Results, task: str, quantity: Quantity) -> dict[int, Scores]:
    """length -> arm -> run -> value."""
    found: dict[int, Scores] = {}
    for arm, mine in results.places(task, **quantity.where).items():
        for length, rows in mine.items():
            runs = fine(by_run(rows, quantity.field), quantity.field)
            if runs:
                values = {row.get("run"): float(row[quantity.field]) for row in runs}
                found.setdefault(length, {})[arm] = values
    return found


def _shared(one: Scores, other: Scores, arms: Sequence[str]) -> Scores:
    """The values of the runs that both have."""
    return {arm: {run: v for run, v in one[arm].items() if run in other[arm]} for arm in arms}


def _agreement(
    name: str, length: int, both: Sequence[Scores], noise: Sequence[Floor | None]
) -> Agreement:
    arms = [*both[0]]
    means = [{arm: statistics.fmean(side[arm].values()) for arm in arms} for side in both]
    swapped, beyond = [], []
    for pair in combinations(arms, 2):
        apart = [side[pair[0]] - side[pair[1]] for side in means]
        if apart[0] * apart[1] < 0:
            swapped.append(pair)
            seeds = min(len(both[0][arm]) for arm in pair)
            sure = (
                floor and abs(gap) > floor.of(seeds, *pair)
                for gap, floor in zip(apart, noise, strict=True)
            )
            if all(sure):
                beyond.append(pair)
    correlation = spearman([*means[0].values()], [*means[1].values()])
    return Agreement(name, length, len(arms), correlation, _interval(both), swapped, beyond)


def _interval(both: Sequence[Scores]) -> tuple[float, float] | None:
    """By drawing each arm's trainings anew, the same for both sides."""
    if all(len(runs) < 2 for runs in both[0].values()):
        return None
    draw, found = random.Random(0), []
    for _ in range(DRAWS):
        chosen = {arm: draw.choices([*runs], k=len(runs)) for arm, runs in both[0].items()}
        sides = (
            [statistics.fmean(side[arm][run] for run in runs) for arm, runs in chosen.items()]
            for side in both
        )
        value = spearman(*sides)
        found += [] if value is None else [value]
    if len(found) < DRAWS / 2:
        return None
    cuts = statistics.quantiles(found, n=40, method="inclusive")
    return cuts[0], cuts[-1]


def compare(rows: Sequence[Row], runs: Sequence[Mapping[str, Any]], task: str, by: str) -> str:
    """The table: how each two values of the field `by` rank the arms of a task.

    Raises ValueError where the rows have fewer than two values of it, or too few arms in common.
    """
    own = [row for row in rows if row.get("task") == task and by in row]
    values = sorted({row[by] for row in own}, key=str)
    if len(values) < 2:
        shown = ", ".join(map(str, values)) or "none"
        raise ValueError(f"the rows of the task have no two values of it ({shown})")
    parts = {value: gather([r for r in own if r[by] == value], runs) for value in values}
    lines = [["", "length", "arms", "correlation", "95% interval", "pairs swapped", "beyond noise"]]
    said = []
    for one, other in combinations(values, 2):
        for found in agreements(parts[one], parts[other], task):
            head = f"{found.quantity.partition(' (')[0]}: {one} and {other}"
            lines.append([head, *_cells(found)])
            for pair in found.beyond_noise:
                said.append(f"{head}, at {found.length:,}: {pair[0]} and {pair[1]} change places")
    if len(lines) == 1:
        raise ValueError(f"no length has {MIN_ARMS} arms in two of its values")
    verdict = said or ["no two arms change places by more than the noise floor"]
    return "\n".join([f"rank correlation of arms by {by}", *aligned(lines), *verdict])


def _cells(found: Agreement) -> list[str]:
    sure = found.interval
    return [
        *(f"{found.length:,}", str(found.arms)),
        DASH if found.correlation is None else f"{found.correlation:+.2f}",
        f"{sure[0]:+.2f} to {sure[1]:+.2f}" if sure else DASH,
        f"{len(found.swapped)} of {found.arms * (found.arms - 1) // 2}",
        str(len(found.beyond_noise)),
    ]
