"""The tables for a terminal: scores by length, what they differ by, and long texts."""

import textwrap

from zoo.report import equal_operations
from zoo.report.caveats import failures, names
from zoo.report.learned import dead
from zoo.report.noise import NOISE_FLOOR, Floor, is_noise
from zoo.report.positions import position_table
from zoo.report.protocols import PROTOCOLS, SAME_TOKENS, headline
from zoo.report.retrieval import both_table
from zoo.report.rows import Cell, Results
from zoo.report.scores import (
    NEAR,
    context_gains,
    effective_contexts,
    quantization_costs,
    score_noise,
)
from zoo.report.sensitivity import rates_table
from zoo.report.tables import (
    APART,
    Table,
    costs,
    grid,
    quantity_table,
    shown_quantities,
    task_tables,
    written,
)
from zoo.report.validity import LEAKS
from zoo.report.verdicts import claims_text
from zoo.report.words import DASH, PLUS_MINUS, score, short, signed, times

IS_NOISE = " ~"  # after a difference below the noise floor
IS_NOISE_EXPLAINED = f"{IS_NOISE.strip()} below the noise floor: seeds of one arm differ by as much"
MAX_WIDTH = 110  # characters of a line with intervals; a wider table is printed without
MARK = " *"  # after the label of an arm that was requested, among others


def as_text(results: Results) -> str:
    """The tables for a terminal: whatever was measured, the claims, and why what failed did."""
    current = {row.get("task") for row in results.rows if row.get("requested", True)}
    first = [task for task in results.tasks if task in current and "perplexity" not in current]
    later = [task for task in results.tasks if task not in first]
    reasons: list[str] = []  # each is printed once, below the first table with it
    said = _tasks_as_text(results, first, reasons)
    said += _scores_as_text(results, reasons)
    said += _tasks_as_text(results, later, reasons)
    tables = [table for shown in costs(results) if (table := quantity_table(results, *shown))]
    apart = position_table(results), both_table(results), rates_table(results)
    tables += [table for table in apart if table]
    tables += equal_operations.tables(results)
    said += [_table_as_text(results, table, reasons) for table in tables]
    said += [
        f"{results.tasks[task].title}, {label}\n{textwrap.indent(text, '    ')}"
        for task in results.tasks
        for label, text in written(results, task)
    ]
    said.append(claims_text(results))
    said = [text for text in said if text] or ["no score measured yet"]
    if any(map(results.requested, results.arms)) and any(said):
        said.append(f"{MARK.strip()} requested now; the other arms were measured before")
    return "\n\n".join([*said, *_failures_as_text(results, "\n".join(said))])


def _tasks_as_text(results: Results, tasks: list[str], reasons: list[str]) -> list[str]:
    """The tables of tasks that have no part of their own."""
    return [
        _table_as_text(results, table, reasons)
        for task in tasks
        if task != "perplexity" and shown_quantities(results, task)
        for table in task_tables(results, task)
    ]


def _failures_as_text(results: Results, said: str) -> list[str]:
    """What has no result, with the reasons that the tables do not show."""
    table = failures(results)
    lines = []
    scored = {
        (row["label"], row.get("task"), row.get("length")) for row in results.where(status="ok")
    }
    arms = {label for label, *_ in scored}
    some: set[tuple[str, str]] = set()  # arm and run without a result where others of it have one
    for row in results.rows:
        place = row["label"], row.get("task"), row.get("length")
        broken = row.get("length") is None and row["label"] in arms
        if row["status"] != "ok" and (broken or place in scored):
            some.add((row["label"], str(row.get("run"))))
    for arm, what, why, run in table.rows if table else ():
        # A printed reason is that of a cell without a number: of one of several seeds it is none.
        if why.text not in said or (arm.text, run.text) in some:
            where = "" if run.text in (DASH, arm.text) else f" ({run.text})"
            lines.append(f"  {arm.text}{where}, {what.text}: {why.text}")
    return ["\n".join(["without a result:", *lines])] if lines else []


def _scores_as_text(results: Results, reasons: list[str]) -> list[str]:
    """The headline tables; `reasons` takes those for which a cell has no number."""
    protocol = headline(results)
    cells = results.cells("perplexity", "bits_per_byte", protocol=protocol) if protocol else {}
    if not protocol or not cells:
        return []
    context_of, without, train = effective_contexts(results), dead(results), results.train_length()
    lengths = list(next(iter(cells.values())))
    every = [cell for mine in cells.values() for cell in mine.values()]
    reasons += dict.fromkeys(cell.reason for cell in every if cell.reason)
    heads = [["", *(f"{n:,}" for n in lengths)], ["arm", *(times(n, train) for n in lengths)]]

    def shown(cell: Cell) -> str:
        return f"({reasons.index(cell.reason) + 1})" if cell.value is None else score(cell.value)

    def known(label: str) -> str:
        own = context_of.get(label)
        if own is None:
            if label not in without:
                return "unknown"
            return "broken" if without[label].broken else "not learned"
        return f"{own}{own.ends}"

    gained = context_gains(results, protocol)
    gain_heads = ["gain from", f"{short(NEAR)} to {short(lengths[-1])}"] if gained else []
    lines = [[*heads[0], "effective", *gain_heads[:1]], [*heads[1], "context", *gain_heads[1:]]]
    for label, mine in cells.items():
        gain = [_signed(gained[label][lengths[-1]])] if gained else []
        lines.append([_marked(results, label), *map(shown, mine.values()), known(label), *gain])
    noise = score_noise(results, protocol)
    if noise:
        floors = (score(noise[n].value) if n in noise else DASH for n in lengths)
        lines.append([NOISE_FLOOR, *floors, "", *([""] if gained else [])])
    title = f"bits per byte by test length, lower is better ({PROTOCOLS[protocol].lower()})"
    notes = [f"({i}) {why}" for i, why in enumerate(reasons, 1)]
    fewer = [
        f"{label} at {n:,} ({cell.seeds} of {cell.tried})"
        for label, mine in cells.items()
        for n, cell in mine.items()
        if 0 < cell.seeds < cell.tried
    ]
    notes += [f"means of the seeds that have a score: {names(fewer)}"] if fewer else []
    if widest := max(cell.half for cell in every):
        notes.append(f"95% intervals of these levels: up to {PLUS_MINUS}{score(widest)}")
    said = "\n".join([title, *aligned(lines), *notes])
    return [said, *_compared_as_text(results, protocol, heads), *_apart(results, protocol, reasons)]


def _apart(results: Results, protocol: str, reasons: list[str]) -> list[str]:
    """The scores of the arms that have none under the headline's protocol, such as encoders."""
    cells = results.cells("perplexity", "bits_per_byte", protocol=protocol)
    left = {label for label, mine in cells.items() if not any(c.seeds for c in mine.values())}
    said = []
    for other in (one for one in PROTOCOLS if one != protocol and left):
        found = results.cells("perplexity", "bits_per_byte", protocol=other)
        own = {k: mine for k, mine in found.items() if any(cell.seeds for cell in mine.values())}
        if shown := {label: mine for label, mine in own.items() if label in left}:
            left -= shown.keys()
            table = grid(results, shown, f"bits per byte ({PROTOCOLS[other].lower()})", score)
            said += [_table_as_text(results, table, reasons)] if table else []
    return said


def _compared_as_text(results: Results, protocol: str, heads: list[list[str]]) -> list[str]:
    """What the scores differ by: from an arm's own at its training length, from the reference's."""
    same = f"difference to {results.reference}, on the same text"
    compared = [(same, results.differences(protocol), score_noise(results, protocol))]
    if protocol in SAME_TOKENS:
        own = "change against the training length"
        compared.insert(0, (own, results.changes(protocol), {}))
    if costs := quantization_costs(results, protocol):
        compared.append(("cost of fewer bits, against the same runs in plain numbers", costs, {}))
    said = []
    for title, cells, noise in compared:
        lines = []
        for label, mine in cells.items():
            pair = (label, results.reference or "")
            shown = (_signed(cell, noise.get(n), *pair) for n, cell in mine.items())
            lines.append([_marked(results, label), *shown])
        marked = any(text.endswith(IS_NOISE) for line in lines for text in line)
        notes = [IS_NOISE_EXPLAINED] if marked else []
        if lines:
            table = aligned([*heads, *lines])
            said.append("\n".join([f"{title} (with 95% interval)", *table, *notes]))
    return said


def _signed(cell: Cell, floor: Floor | None = None, *pair: str) -> str:
    if cell.value is None:
        return DASH
    sure = f" {PLUS_MINUS}{score(cell.half)}" if cell.half else ""
    return signed(cell.value) + sure + IS_NOISE * is_noise(cell, floor, *pair)


def _marked(results: Results, label: str) -> str:
    return label + MARK * (label in results.by_arm and results.requested(label))


def _table_as_text(results: Results, table: Table, reasons: list[str]) -> str:
    """A table, each cell with its note (an interval, mostly) where the lines stay short enough."""
    whys = [cell.text for row in table.rows for cell in row if cell.kind in ("reason", LEAKS)]
    known = len(reasons)
    reasons += [why for why in dict.fromkeys(whys) if why not in reasons]

    def lines_of(noted: bool) -> list[str]:
        lines = [[head for head, _ in table.head]]
        for arm, *cells in table.rows:
            texts = []
            for cell in cells:
                why = f"({reasons.index(cell.text) + 1})" if cell.text in reasons else cell.text
                texts += [f"{why} {cell.note}" if noted and cell.note else why] * cell.span
            why = f" ({arm.note})" if arm.kind == APART else ""
            lines.append([_marked(results, arm.text) + why, *texts])
        return aligned(lines)

    lines = lines_of(noted=True)
    if max(map(len, lines)) > MAX_WIDTH:
        lines = lines_of(noted=False)
    notes = [f"({i}) {why}" for i, why in enumerate(reasons[known:], known + 1)]
    return "\n".join([table.caption, *lines, *notes])


def aligned(lines: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
