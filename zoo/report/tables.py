"""Tables: any task's numbers by length, and what every arm was given."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from zoo.measurement import Declaration, Quantity
from zoo.report.noise import NOISE, NOISE_FLOOR, Floor, floors_of, is_noise
from zoo.report.rows import Cell, Cells, Results, by_run, summary
from zoo.report.statistics import finite, missing
from zoo.report.timings import incomparable
from zoo.report.validity import LEAKS
from zoo.report.words import DASH, FORMS, caption, count, plain, plus_minus, times

APART = "apart"  # the kind of an arm's name where a table does not rank its numbers
Tied = Callable[[str, str, int], bool]  # two arms and a length


@dataclass(frozen=True)
class Td:
    """A table cell: text, a smaller note under it, and its kind (best, tie, noise, reason)."""

    text: str
    note: str = ""
    kind: str = ""
    span: int = 1


@dataclass(frozen=True)
class Table:
    """A table whose first column names arms; a head is (text, note)."""

    caption: str
    head: list[tuple[str, str]]
    rows: list[list[Td]] = field(default_factory=list)


Shown = tuple[str, Quantity]  # a task and one of its quantities


def lengths_of(results: Results, task: str) -> list[int]:
    """The lengths at which a task was measured, failures included."""
    return sorted({row["length"] for row in results.where(task=task) if finite(row.get("length"))})


def shown_quantities(results: Results, task: str) -> list[Quantity]:
    """The quantities of a task that are shown with it; costs have a part of their own."""
    return [quantity for quantity in results.tasks[task].quantities if not quantity.cost]


def costs(results: Results) -> list[Shown]:
    """The costs that any task has seen; of several tasks that see one, the first with values."""
    found: dict[str, Shown] = {}
    for task, said in results.tasks.items():
        for quantity in said.quantities:
            cells = results.measured(task, quantity) if quantity.cost else {}
            if any(cell.seeds for mine in cells.values() for cell in mine.values()):
                found.setdefault(quantity.name, (task, quantity))
    return [*found.values()]


def task_tables(results: Results, task: str) -> list[Table]:
    """A table for each quantity by length; of several at one length or none, one for all."""
    shown, lengths = shown_quantities(results, task), lengths_of(results, task)
    if len(lengths) > 1 or (lengths and len(shown) == 1):
        tables = [quantity_table(results, task, quantity) for quantity in shown]
    else:
        tables = [_without_lengths(results, task, results.tasks[task], shown)]
    return [table for table in tables if table]


def written(results: Results, task: str) -> list[tuple[str, str]]:
    """(arm, text) of a task whose rows hold texts; an arm with several is named with the prompt."""
    said = results.tasks[task]
    rows = results.where(task=task, status="ok") if said.text else []
    found = [row for row in rows if not missing(row.get(said.text))]
    several = len({row.get(said.prompt) for row in found}) > 1
    prompts = [f", after {row.get(said.prompt)!r}" if several else "" for row in found]
    pairs = zip(found, prompts, strict=True)
    return [(f"{row['label']}{prompt}", str(row[said.text])) for row, prompt in pairs]


def quantity_table(results: Results, task: str, quantity: Quantity) -> Table | None:
    """One quantity by length, the best arm of each column marked."""
    cells, words = results.measured(task, quantity), FORMS[quantity.form]
    chances = ", ".join(map(words.text, results.chances(task, quantity)))
    said = f"{caption(quantity)}." + (f" Chance: {chances}." if chances else "")
    said += _over_prompts(results, task)
    if guesses := results.guesses(task, quantity):
        ends = dict.fromkeys(words.text(value) for value in (guesses[0], guesses[-1]))
        said += f" A guess without association: {DASH.join(ends)}."
    best = {"lower": min, "higher": max, None: None}[quantity.better]
    noise = floors_of(results, cells, quantity.form)
    apart = incomparable(results, task, quantity)
    tied = overlapping(cells, noise)
    return grid(results, cells, said, words.text, best, tied, words.sure, noise, apart)


def overlapping(cells: Cells, noise: Mapping[int, Floor]) -> Tied:
    """Whether the intervals of two arms at a length overlap, or the seed alone makes as much."""

    def tied(label: str, other: str, length: int) -> bool:
        one, two = cells[label][length], cells[other][length]
        if one.value is not None and two.value is not None:
            apart = Cell(one.value - two.value, seeds=min(one.seeds, two.seeds))
            if is_noise(apart, noise.get(length), label, other):
                return True
        ends = (one.low, two.high), (two.low, one.high)
        return all(low is not None and high is not None and low <= high for low, high in ends)

    return tied


def _without_lengths(
    results: Results, task: str, said: Declaration, shown: list[Quantity]
) -> Table | None:
    """Arms down, quantities across."""
    at = [f" at {length:,} tokens" for length in lengths_of(results, task)]
    heads = [(caption(quantity).partition(" (")[0], "") for quantity in shown]
    title = f"{said.title}{''.join(at)}.{_over_prompts(results, task)}"
    table, found = Table(title, [("arm", ""), *heads]), False
    apart: dict[str, str] = {}
    for quantity in shown:
        apart |= incomparable(results, task, quantity)
    for label in results.arms:
        if results.where(task=task, label=label):
            cells = [_over_runs(results, task, label, each) for each in shown]
            found = found or any(cell.seeds for cell in cells)
            name = Td(label, apart[label], APART) if label in apart else Td(label)
            table.rows.append([name, *_across(cells, shown)])
    return table if found else None


def _over_prompts(results: Results, task: str) -> str:
    """Says of how many prompts the values of a task are the means, where they are of several."""
    field = results.tasks[task].prompt
    rows = results.where(task=task, status="ok") if field else []
    prompts = len({str(row[field]) for row in rows if not missing(row.get(field))})
    return f" Means over {prompts} prompts." if prompts > 1 else ""


def _over_runs(results: Results, task: str, label: str, quantity: Quantity) -> Cell:
    """A quantity of an arm whatever its lengths, each run counted once."""
    rows = results.where(task=task, label=label, **quantity.where)
    return summary(by_run(rows, quantity.field), quantity.field, quantity.interval)


def _across(cells: list[Cell], shown: list[Quantity]) -> list[Td]:
    """The cells of one arm; of one without any number, the reason once."""
    if not any(cell.seeds for cell in cells):
        return [_reason(cells[0].reason, len(cells))]
    found, every = [], {cell.seeds for cell in cells if cell.seeds}
    for cell, quantity in zip(cells, shown, strict=True):
        words = FORMS[quantity.form]
        if cell.value is None:
            found.append(Td(DASH))
        else:
            note = f"{words.sure(cell)} {_seeds(cell, every)}".strip()
            found.append(Td(words.text(cell.value), note))
    return found


def _reason(reason: str, span: int) -> Td:
    return Td(reason, kind=LEAKS if reason.startswith(LEAKS) else "reason", span=span)


def grid(
    results: Results,
    cells: Cells,
    caption: str,
    text: Callable[[float], str],
    best: Callable[[Iterable[float]], float] | None = None,
    tied: Tied | None = None,
    sure: Callable[[Cell], str] = plus_minus,
    noise: Mapping[int, Floor] | None = None,
    apart: Mapping[str, str] | None = None,
    *,
    differences: bool = False,
) -> Table | None:
    """Arms down, lengths across: the best of a column marked, and what does not differ from it.

    Where a noise floor is given it is the last row; where values are `differences` to the reference
    arm, those below the floor are marked as noise. `apart` has the arms that are not compared with
    the others, each with the note that says why.
    """
    if not cells:
        return None
    lengths = list(next(iter(cells.values())))
    head = [(f"{length:,}", times(length, results.train_length())) for length in lengths]
    seeds = {cell.seeds for mine in cells.values() for cell in mine.values() if cell.seeds}
    if seeds == {2}:
        caption += " Two seeds each."
    table, noise, apart = Table(caption, [("arm", ""), *head]), noise or {}, apart or {}
    ranked = {label: mine for label, mine in cells.items() if label not in apart}
    first = {length: winner(ranked, length, best) if best else None for length in lengths}
    for label, mine in cells.items():
        note = "requested now" if results.requested(label) else ""
        row = [Td(label, apart[label], APART) if label in apart else Td(label, note)]
        pair = (label, results.reference or "")
        for reason, group in groupby(mine, key=lambda length: mine[length].reason):
            same = list(group)
            if reason:
                row.append(_reason(reason, len(same)))
                continue
            for length in same:
                top, kind = None if label in apart else first[length], ""
                if top and mine[length].value == cells[top][length].value:
                    kind = "best"
                elif top and tied and tied(label, top, length):
                    kind = "tie"
                elif differences and is_noise(mine[length], noise.get(length), *pair):
                    kind = NOISE
                row.append(_value(mine[length], text, kind, sure, seeds))
        table.rows.append(row)
    if noise:
        table.rows.append(_floors([noise.get(length) for length in lengths], text))
    return table


def _floors(floors: list[Floor | None], text: Callable[[float], str]) -> list[Td]:
    """The noise floor by length, and what it rests on: once where that is the same throughout."""
    sources = {one.source for one in floors if one}
    once = sources.pop() if len(sources) == 1 else ""
    cells = (
        Td(text(one.value).lstrip("+"), "" if once else one.source) if one else Td(DASH)
        for one in floors
    )
    return [Td(NOISE_FLOOR, once), *cells]


def winner(cells: Cells, length: int, best: Callable[[Iterable[float]], float]) -> str | None:
    """The best arm of a column; None unless two arms have different values there."""
    column = {mine[length].value: label for label, mine in cells.items()}
    values = [value for value in column if value is not None]
    return column[best(values)] if len(values) > 1 else None


def _value(
    cell: Cell,
    text: Callable[[float], str],
    kind: str,
    sure: Callable[[Cell], str],
    seeds: Collection[int],
) -> Td:
    assert cell.value is not None
    return Td(text(cell.value), f"{sure(cell)} {_seeds(cell, seeds)}".strip(), kind)


def _seeds(cell: Cell, every: Collection[int]) -> str:
    """How many seeds a mean has, where that is fewer than were tried, or than `every` cell has, and
    of two, whose interval is wide, unless all have two."""
    if cell.seeds < cell.tried:
        return f"{cell.seeds} of {cell.tried} seeds"
    few = cell.seeds < max(every) or (cell.seeds == 2 and {*every} != {2})
    return f"{cell.seeds} seed{'s' if cell.seeds > 1 else ''}" if few else ""


BUDGET = {  # (column, line below it) -> their fields
    ("FLOPs/token", ""): ("flops_per_token", ""),
    ("train tokens", "steps"): ("train_tokens", "train_steps"),
    ("train length", ""): ("train_length", ""),
    ("learning rate", "seeds"): ("lr", "seed"),
    ("match", "states"): ("match", "state_passing"),
    ("data", "tokenizer"): ("data", "tokenizer"),
    ("fingerprint", "commit"): ("fingerprint", "commit"),
    ("device", "dtype"): ("device", "dtype"),
    ("audited for leaks to", "tokens"): ("audited_tokens", ""),
}


def budgets(results: Results) -> Table:
    """What every arm was given: equal but for what is being compared."""
    heads = [("arm", ""), ("parameters", "vs reference"), *BUDGET]
    table = Table("What each arm was given.", heads)
    base = results.known(results.reference, "parameters") if results.reference else None
    for label in results.arms:
        own = results.known(label, "parameters")
        apart = f"{own / base - 1:+.2%}" if finite(own) and finite(base) and base else ""
        row = [Td(label), Td(plain(own), "reference" if label == results.reference else apart)]
        for name, below in BUDGET.values():
            row.append(Td(_values(results, label, name), below and _values(results, label, below)))
        table.rows.append(row)
    return table


def _values(results: Results, label: str, name: str) -> str:
    """All values a field has over an arm's rows; hashes are cut."""
    rows = results.by_arm[label]
    values = dict.fromkeys(row[name] for row in rows if not missing(row.get(name)))
    words = [count(v) if isinstance(v, float) and v > 100 else plain(v) for v in values]
    return ", ".join(w[:8] if name in ("fingerprint", "commit") else w for w in words) or DASH
