"""Tables of what no other part of the report draws: any task's rows, whatever they hold."""

from zoo.report.rows import Cell, Results, Row, finite, summary
from zoo.report.tables import DASH, Table, Td, count, grid

DRAWN = ("perplexity", "passkey", "speed", "stream", None)  # tasks with a part of their own
ABOUT = {  # fields that say what was measured and how, not what came out
    *("seed", "extension_factor", "parameters", "flops_per_token", "train_length", "train_tokens"),
    *("train_steps", "lr", "threads", "seconds", "length", "count", "unit", "units", "documents"),
    *("state_bytes", "uniform_bits", "unigram_bits", "bigram_bits", "nll_sum", "chance"),
}
FIRST = ("value", "bits_per_byte", "accuracy", "score")  # what a task calls its result, if it does


def other_tasks(results: Results) -> list[str]:
    """The tasks in the rows that have no part of their own."""
    return sorted({str(row["task"]) for row in results.rows if row.get("task") not in DRAWN})


def other_tables(results: Results) -> list[Table]:
    """For every such task its results: by length where the rows have lengths."""
    found = []
    for task in other_tasks(results):
        rows = results.where(task=task)
        names = result_fields([row for row in rows if row["status"] == "ok"])
        if any(finite(row.get("length")) for row in rows):
            for name in names[:1] or ["value"]:
                cells = results.cells(task, name, spread=True)
                found.append(grid(results, cells, _title(task, name, rows), count, sure=_ends))
        else:
            found.append(_without_lengths(results, task, names))
    return [table for table in found if table]


def _title(task: str, name: str, rows: list[Row]) -> str:
    """What a table by length shows; beside it what chance alone would give, where rows say so."""
    title = f"{task}." if name == task else f"{task}: {name}."
    chances = sorted({row["chance"] for row in rows if finite(row.get("chance"))})
    if chances and name in ("value", "accuracy", "score"):
        title += f" Chance: {', '.join(f'{chance:.3g}' for chance in chances)}."
    return title


def result_fields(rows: list[Row]) -> list[str]:
    """The fields with a task's results: numbers that the row's question and identity do not hold.

    Those that are named as results come first, and alone where there are any.
    """
    names: dict[str, None] = {}
    for row in rows:
        asked = {*ABOUT, *(row.get("question") or ())}
        names |= dict.fromkeys(
            name
            for name, value in row.items()
            if name not in asked and finite(value) and not isinstance(value, bool)
        )
    return [name for name in FIRST if name in names] or list(names)


def _without_lengths(results: Results, task: str, names: list[str]) -> Table:
    table = Table(f"{task}.", [("arm", ""), *((name, "") for name in names or ["result"])])
    for label in results.arms:
        if rows := results.where(task=task, label=label):
            cells = [summary(rows, name, True) for name in names or ["value"]]
            table.rows.append([Td(label), *(_cell(cell) for cell in cells)])
    return table


def _cell(cell: Cell) -> Td:
    if cell.value is None:
        return Td(cell.reason, kind="reason")
    return Td(count(cell.value), _ends(cell))


def _ends(cell: Cell) -> str:
    """The interval as its two ends: a value of any kind need not be symmetric in it."""
    if cell.low is None or cell.high is None:
        return ""
    return f"{count(cell.low)}{DASH}{count(cell.high)}"
