"""The tables for a terminal: scores by length, what they differ by, and long texts."""

from zoo.report.caveats import failures
from zoo.report.claims import judge, told
from zoo.report.others import other_tables
from zoo.report.rows import Cell, Results
from zoo.report.tables import (
    ANSWERS,
    DASH,
    PLUS_MINUS,
    PROTOCOLS,
    SAME_TOKENS,
    Table,
    dead,
    found,
    headline,
    reaches,
    score,
    signed,
    speeds,
    streams,
    times,
)
from zoo.report.validity import LEAKS

MARK = " *"  # after the label of an arm that was asked for, among others


def as_text(results: Results) -> str:
    """The tables for a terminal: whatever was measured, the claims, and why what failed did."""
    tables = [*(found(results, answer) for answer in ANSWERS), *speeds(results), streams(results)]
    shown = [_table_as_text(results, table) for table in (*tables, *other_tables(results))]
    said = [*_scores_as_text(results), *shown, _claims_as_text(results)]
    said = [text for text in said if text] or ["no score measured yet"]
    if any(map(results.requested, results.arms)) and any(said):
        said.append(f"{MARK.strip()} asked for now; the others stand beside it as measured before")
    return "\n\n".join([*said, *_failures_as_text(results, "\n".join(said))])


def _failures_as_text(results: Results, said: str) -> list[str]:
    """What has no result, with the reasons that the tables have not told."""
    table = failures(results)
    lines = []
    for arm, what, why, run in table.rows if table else ():
        if why.text not in said:
            where = "" if run.text in (DASH, arm.text) else f" ({run.text})"
            lines.append(f"  {arm.text}{where}, {what.text}: {why.text}")
    return ["\n".join(["without a result:", *lines])] if lines else []


def _claims_as_text(results: Results) -> str:
    """Each claim's verdict, and below it what was compared."""
    lines = []
    for own in judge(results):
        why = f" ({own.why})" if own.why else ""
        lines.append(f"claim {own.claim.number} {own.verdict}{why}: {own.claim.words}")
        lines += [f"    {line}" for line in told(own)]
    return "\n".join(lines)


def _scores_as_text(results: Results) -> list[str]:
    """The headline tables; reasons are numbered and spelt out below the first."""
    protocol = headline(results)
    equal = {"spread": True, "protocol": protocol}
    cells = results.cells("perplexity", "bits_per_byte", **equal) if protocol else {}
    if not protocol or not cells:
        return []
    reach_of, without, train = reaches(results), dead(results), results.train_length()
    lengths = list(next(iter(cells.values())))
    every = [cell for mine in cells.values() for cell in mine.values()]
    reasons = list(dict.fromkeys(cell.reason for cell in every if cell.reason))
    heads = [["", *(f"{n:,}" for n in lengths)], ["arm", *(times(n, train) for n in lengths)]]

    def shown(cell: Cell) -> str:
        return f"({reasons.index(cell.reason) + 1})" if cell.value is None else score(cell.value)

    def known(label: str) -> str:
        own = reach_of.get(label)
        if own is None:
            return "not learned" if label in without else "unknown"
        return f"{own}{own.ends}"

    lines = [[*heads[0], "effective"], [*heads[1], "context"]]
    for label, mine in cells.items():
        lines.append([_marked(results, label), *map(shown, mine.values()), known(label)])
    title = f"bits per byte by test length, lower is better ({PROTOCOLS[protocol].lower()})"
    notes = [f"({i}) {why}" for i, why in enumerate(reasons, 1)]
    if widest := max(cell.half for cell in every):
        notes.append(f"95% intervals of these levels: up to {PLUS_MINUS}{score(widest)}")
    said = ["\n".join([title, *_aligned(lines), *notes])]
    more = {f"difference to {results.reference}, on the same text": results.differences(protocol)}
    if protocol in SAME_TOKENS:
        more = {"change against the training length": results.changes(protocol)} | more
    for title, signs in more.items():
        lines = [
            [_marked(results, label), *map(_signed, mine.values())] for label, mine in signs.items()
        ]
        if lines:
            said.append("\n".join([f"{title} (with 95% interval)", *_aligned([*heads, *lines])]))
    return said


def _signed(cell: Cell) -> str:
    if cell.value is None:
        return DASH
    return signed(cell.value) + (f" {PLUS_MINUS}{score(cell.half)}" if cell.half else "")


def _marked(results: Results, label: str) -> str:
    return label + MARK * (label in results.by_arm and results.requested(label))


def _table_as_text(results: Results, table: Table | None) -> str:
    if table is None:
        return ""
    lines = [[head for head, _ in table.head]]
    whys = [cell.text for row in table.rows for cell in row if cell.kind in ("reason", LEAKS)]
    reasons = list(dict.fromkeys(whys))
    for arm, *cells in table.rows:
        texts = []
        for cell in cells:
            why = f"({reasons.index(cell.text) + 1})" if cell.text in reasons else cell.text
            texts += [why] * cell.span
        lines.append([_marked(results, arm.text), *texts])
    notes = [f"({i}) {why}" for i, why in enumerate(reasons, 1)]
    return "\n".join([table.caption, *_aligned(lines), *notes])


def _aligned(lines: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
