"""Quality against what a prompt costs: what is computed before a model answers.

Arms that differ in nothing but the operations that they were given (compress.flops, or the rate)
are one family, and one line over them. A table has families at equal operations: in the column of
a budget those that were given it, and those that read whole prompts within it. Beside a score is
what a family used of the budget, where that is less than nine tenths.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from zoo.measurement import Quantity
from zoo.report.axes import Axis
from zoo.report.charts import Style, styles
from zoo.report.figures import Lines, axis, bits_axis
from zoo.report.rows import Cell, Results, Row, fine, summary
from zoo.report.statistics import finite
from zoo.report.tables import Table, Td, shown_quantities
from zoo.report.words import DASH, FORMS, caption, operations

FIELD, BUDGET, FAMILY = "prompt_flops", "compression_flops", "compression_family"
WITHIN = 1.02  # times a budget: what reads a whole prompt for as much is in its column
USED = 0.9  # of a budget: a family that used less says how much


@dataclass(frozen=True)
class Point:
    """What a family scores at one number of operations per prompt."""

    cell: Cell
    operations: float
    budget: float | None  # None: the whole prompt is read


Families = dict[str, list[Point]]


def compared(results: Results) -> Iterator[tuple[str, Quantity, int]]:
    """The tasks with compressed prompts, a quality of each, and their longest length."""
    for task in results.tasks:
        rows = fine(results.where(task=task), FIELD)
        lengths = [row["length"] for row in rows if row.get(FAMILY) and finite(row.get("length"))]
        for quantity in shown_quantities(results, task) if lengths else ():
            if any(quantity.of(row) for row in rows if row.get(FAMILY)):
                yield task, quantity, max(lengths)
                break


def families(results: Results, task: str, quantity: Quantity, length: int) -> Families:
    """Family -> its points, by their operations."""
    found: dict[tuple[str, float | None], list[Row]] = defaultdict(list)
    for row in fine(results.where(task=task, length=length, **quantity.where), FIELD):
        budget = row.get(BUDGET) if row.get(FAMILY) else None
        if budget is None and row.get(FAMILY):
            budget = round(row[FIELD], -3)  # of a rate: what it came to
        found[_family(row), budget].append(row)
    points: Families = {}
    for (family, budget), rows in found.items():
        cell = summary(rows, quantity.field, quantity.interval)
        spent = sum(row[FIELD] for row in rows) / len(rows)
        if cell.seeds:
            points.setdefault(family, []).append(Point(cell, spent, budget))
    return {name: sorted(own, key=lambda one: one.operations) for name, own in points.items()}


def _family(row: Row) -> str:
    if not row.get(FAMILY):
        return str(row["label"])
    return row[FAMILY] + str(row["label"]).removeprefix(str(row["arm"]))


def look_of(results: Results) -> dict[str, Style]:
    """How each family is drawn."""
    rows = [row | {"label": _family(row)} for row in results.rows if finite(row.get(FIELD))]
    arms = [*dict.fromkeys(row["label"] for row in rows)]
    return styles(replace(results, rows=rows, arms=arms))


def figures(results: Results) -> list[Lines]:
    """For each task its quality against operations, one line per family."""
    found = []
    for task, quantity, length in compared(results):
        words, points = FORMS[quantity.form], []
        for family, own in families(results, task, quantity, length).items():
            for one in own:
                cell = one.cell
                assert cell.value is not None
                low, high = cell.low, cell.high
                if quantity.form == "share" and low is not None and high is not None:
                    low, high = max(0.0, low), min(1.0, high)
                about = {quantity.name: words.text(cell.value), "95% interval": words.sure(cell)}
                about |= {"operations": operations(one.operations), "seeds": str(cell.seeds)}
                where = {"x": one.operations, "y": cell.value, "low": low, "high": high}
                points.append({"arm": family, **where, **about})
        chances = results.chances(task, quantity)
        level = chances[0] if len(chances) == 1 else None
        title = f"{caption(quantity)}, prompts of {length:,} tokens"
        y = axis(quantity.form, title, [point["y"] for point in points])
        y = replace(bits_axis(None), title=title) if quantity.form == "score" else y
        x = Axis("operations per prompt, compression included", operations, log_from=1.2, most=6)
        said = (
            f"{title}, against the operations per prompt, one line per way to shorten or read it."
        )
        found.append(Lines(f"operations-{task}-{quantity.field}", points, x, y, said, (), level))
    return found


def tables(results: Results) -> list[Table]:
    """For each task its quality at equal operations, families down, budgets across."""
    return [_table(results, *which) for which in compared(results)]


def _table(results: Results, task: str, quantity: Quantity, length: int) -> Table:
    own = families(results, task, quantity, length)
    budgets = sorted({one.budget for points in own.values() for one in points if one.budget})
    said = f"{caption(quantity)}, at equal operations per prompt of {length:,} tokens."
    head = [("arm", ""), *((operations(n), "") for n in budgets), ("whole prompt", "operations")]
    table = Table(said, head)
    columns: list[float | None] = [*budgets, None]
    shown = {name: [_at(points, budget) for budget in columns] for name, points in own.items()}
    best = [_best(column, quantity) for column in zip(*shown.values(), strict=True)]
    for name, points in shown.items():
        cells = [
            _cell(point, budget, quantity, first)
            for point, budget, first in zip(points, columns, best, strict=True)
        ]
        table.rows.append([Td(name), *cells])
    return table


def _at(points: list[Point], budget: float | None) -> Point | None:
    """The point of a family in the column of a budget."""
    given = [one for one in points if one.budget == budget]
    whole = [one for one in points if one.budget is None]
    if not given and budget is not None:
        given = [one for one in whole if one.operations <= WITHIN * budget]
    return given[0] if given else None


def _best(column: tuple[Point | None, ...], quantity: Quantity) -> float | None:
    """The best value of a column of several."""
    values = [one.cell.value for one in column if one and one.cell.value is not None]
    if len({*values}) < 2 or quantity.better is None:
        return None
    return min(values) if quantity.better == "lower" else max(values)


def _cell(point: Point | None, budget: float | None, quantity: Quantity, best: float | None) -> Td:
    if point is None or point.cell.value is None:
        return Td(DASH)
    words = FORMS[quantity.form]
    note = words.sure(point.cell)
    if budget is None:
        note += f" {operations(point.operations)}"
    elif point.operations < USED * budget:
        note += f" {point.operations / budget:.0%} of it"
    kind = "best" if point.cell.value == best else ""
    return Td(words.text(point.cell.value), note.strip(), kind)
