"""Results to tables: scores by length, effective context, speed, streams, budgets, plain text."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby, takewhile

from zoo.report.rows import Cell, Cells, Results, finite, in_words, missing

PROTOCOLS = {
    "stride_tail": "Same tokens at every length",
    "blocks": "Average over whole blocks",
    "window_mean": "Mean over sliding windows",
}
EXPLAINED = {
    "stride_tail": "Every length scores the same last tokens, each with as much text before it as "
    "the length allows: along a line only the model's view of the past changes.",
    "blocks": "The text is cut into blocks of this length and every token is scored. The first "
    "tokens of a block know little of their past, and longer blocks have fewer of them: lines "
    "fall even where nothing is gained from far text.",
    "window_mean": "A window of this length slides over the text; every token in it is scored.",
}
SHARE = 0.05  # effective context: how much worse than at the training length still counts
TIMES, DASH, AT_LEAST = "\u00d7", "\u2013", "\u2265"


@dataclass(frozen=True)
class Td:
    """A table cell: text, a smaller note under it, and what kind it is (best, tie, reason)."""

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


@dataclass(frozen=True)
class Reach:
    """Effective context in tokens, its 95% interval, and whether the tests ended before it did."""

    length: int
    low: int
    high: int
    open_end: bool
    then: str = ""  # why there is no score at the next length

    def __str__(self) -> str:
        return f"{AT_LEAST + ' ' if self.open_end else ''}{self.length:,}"


def short(number: float) -> str:
    """1024 -> "1k", 2**20 -> "1M": lengths, which are mostly powers of two."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if number >= unit and number % (unit / 4) == 0:
            return f"{number / unit:g}{letter}"
    return f"{number:,.0f}"


def count(number: float) -> str:
    """Three significant digits with thousands: 12345.6 -> "12,300", 0.1234 -> "0.123"."""
    digits = f"{number:.3g}"
    return f"{float(digits):,.0f}" if abs(number) >= 100 else digits


def size(number: float) -> str:
    """Bytes for people: 3 * 2**20 -> "3 MiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((i for i in range(4) if number < 1000 * 1024**i), 4)
    return f"{count(number / 1024**power)} {units[power]}"


def score(number: float) -> str:
    """Bits per byte."""
    return f"{number:.3f}"


def plain(value: object) -> str:
    """A value as it is, with thousands; a dash for none."""
    if missing(value):
        return DASH
    return f"{value:,}" if isinstance(value, int) else str(value)


def times(length: float, train: int | None) -> str:
    """A length as a multiple of the training length: "4×"."""
    return f"{length / train:.3g}{TIMES}" if train else ""


def grid(
    results: Results,
    cells: Cells,
    caption: str,
    text: Callable[[float], str],
    best: Callable[[Iterable[float]], float] | None = None,
) -> Table | None:
    """Arms down, lengths across: the best of a column marked, and what it cannot be told from."""
    if not cells:
        return None
    lengths = list(next(iter(cells.values())))
    head = [(f"{length:,}", times(length, results.train_length())) for length in lengths]
    table = Table(caption, [("arm", ""), *head])
    for label, mine in cells.items():
        row = [Td(label)]
        for reason, group in groupby(mine, key=lambda length: mine[length].reason):
            same = list(group)
            if reason:
                row.append(Td(reason, kind="reason", span=len(same)))
            else:
                row += [
                    _value(mine[n], text, winner(cells, n, best) if best else None) for n in same
                ]
        table.rows.append(row)
    return table


def winner(cells: Cells, length: int, best: Callable[[Iterable[float]], float]) -> Cell | None:
    """The best cell of a column; None unless two arms have different values there."""
    column = {mine[length].value: mine[length] for mine in cells.values()}
    values = [value for value in column if value is not None]
    return column[best(values)] if len(values) > 1 else None


def overlap(one: Cell, other: Cell) -> bool:
    """Whether two intervals overlap; False where one has none."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low <= other.high and other.low <= one.high


def _value(cell: Cell, text: Callable[[float], str], first: Cell | None) -> Td:
    assert cell.value is not None
    notes = [] if cell.low is None or cell.high is None else [text(cell.low), text(cell.high)]
    note = DASH.join(notes)
    if cell.seeds < cell.tried:
        note = f"{note} {cell.seeds} of {cell.tried} seeds".strip()
    kind = "best" if cell == first else "tie" if first and overlap(cell, first) else ""
    return Td(text(cell.value), note, kind)


def reach(mine: dict[int, Cell], train: int | None, share: float = SHARE) -> Reach | None:
    """The largest length up to which every score is within `share` of the one at `train`.

    The interval asks the same of the upper and of the lower ends of the scores' intervals; the
    score at `train` counts as exact, because the same text is scored at every length.
    """
    own = mine[train].value if train in mine else None
    if own is None or train is None:
        return None
    lengths = [length for length in sorted(mine) if length > train]

    def last(score_of: Callable[[Cell], float | None]) -> int:
        def good(length: int) -> bool:
            cell = mine[length]
            return cell.value is not None and (score_of(cell) or cell.value) <= own * (1 + share)

        return max(takewhile(good, lengths), default=train)

    point = last(lambda cell: cell.value)
    after = next((mine[length] for length in lengths if length > point), None)
    low, high = last(lambda cell: cell.high), last(lambda cell: cell.low)
    return Reach(point, low, high, after is None, after.reason if after else "")


def reaches(results: Results) -> dict[str, Reach | None]:
    """Effective context of every arm, from the scores on the same tokens at every length."""
    cells = results.cells("perplexity", "bits_per_byte", spread=True, protocol="stride_tail")
    return {label: reach(mine, results.train_length(label)) for label, mine in cells.items()}


def contexts(results: Results) -> Table | None:
    """Effective context as a table."""
    heads = ("arm", "tokens", "of the training length", "95% interval", "ends because")
    caption = f"Largest length up to which bits per byte stay within {SHARE:.0%} of the arm's own."
    table = Table(caption, [(head, "") for head in heads])
    for label, own in reaches(results).items():
        if own is None:
            cells = [Td("unknown: no score at the training length", kind="reason", span=4)]
        else:
            why = "it does not: the tests end here" if own.open_end else own.then or "scores rise"
            ends = f"{own.low:,}{DASH}{own.high:,}"
            multiple = times(own.length, results.train_length(label))
            cells = [Td(str(own), kind="lead"), Td(multiple), Td(ends), Td(why, kind="words")]
        table.rows.append([Td(label), *cells])
    return table if table.rows else None


BUDGET = {  # (column, line below it) -> their fields
    ("FLOPs/token", ""): ("flops_per_token", ""),
    ("train tokens", "steps"): ("train_tokens", "train_steps"),
    ("train length", ""): ("train_length", ""),
    ("learning rate", "seeds"): ("lr", "seed"),
    ("match", "states"): ("match", "state_passing"),
    ("data", "tokenizer"): ("data", "tokenizer"),
    ("fingerprint", "commit"): ("fingerprint", "commit"),
    ("device", "dtype"): ("device", "dtype"),
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
            row.append(Td(_told(results, label, name), below and _told(results, label, below)))
        table.rows.append(row)
    return table


def _told(results: Results, label: str, name: str) -> str:
    """All values a field has over an arm's rows; hashes are cut."""
    rows = results.by_arm[label]
    values = dict.fromkeys(row[name] for row in rows if not missing(row.get(name)))
    words = [count(v) if isinstance(v, float) and v > 100 else plain(v) for v in values]
    return ", ".join(w[:8] if name in ("fingerprint", "commit") else w for w in words) or DASH


def streams(results: Results) -> Table | None:
    """One reading of a very long text: how far, how fast, in how much memory."""
    heads = ["arm", "tokens read", "tokens/s", "peak memory", "state"]
    table = Table("One pass over one long text, the state carried on.", [(h, "") for h in heads])
    columns = {"length": plain, "tokens_per_second": count, "peak_bytes": size, "state_bytes": size}
    for row in results.where(task="stream"):
        if row["status"] == "ok":
            texts = [f(row[k]) if finite(row.get(k)) else DASH for k, f in columns.items()]
            table.rows.append([Td(row["label"]), *map(Td, texts)])
        else:
            table.rows.append([Td(row["label"]), Td(in_words(row), kind="reason", span=4)])
    return table if table.rows else None


def as_text(results: Results) -> str:
    """The tables for a terminal: scores by length, and long texts read in one pass."""
    found = [_scores_as_text(results), _table_as_text(streams(results))]
    return "\n\n".join(text for text in found if text) or "no score measured yet"


def _scores_as_text(results: Results) -> str:
    """The headline table; reasons are numbered and spelt out below it."""
    have = [name for name in PROTOCOLS if results.where(task="perplexity", protocol=name)]
    cells = results.cells("perplexity", "bits_per_byte", protocol=have[0]) if have else {}
    if not cells:
        return ""
    reach_of, train = reaches(results), results.train_length()
    lengths = list(next(iter(cells.values())))
    reasons = list(
        dict.fromkeys(c.reason for mine in cells.values() for c in mine.values() if c.reason)
    )

    def shown(cell: Cell) -> str:
        return f"({reasons.index(cell.reason) + 1})" if cell.value is None else score(cell.value)

    lines = [["", *(f"{length:,}" for length in lengths), "effective"]]
    lines.append(["arm", *(times(length, train) for length in lengths), "context"])
    for label, mine in cells.items():
        lines.append([label, *map(shown, mine.values()), str(reach_of.get(label) or "unknown")])
    title = f"bits per byte by test length, lower is better ({PROTOCOLS[have[0]].lower()})"
    notes = [f"({i}) {why}" for i, why in enumerate(reasons, 1)]
    return "\n".join([title, *_aligned(lines), *notes])


def _table_as_text(table: Table | None) -> str:
    if table is None:
        return ""
    lines = [[head for head, _ in table.head], *([cell.text for cell in row] for row in table.rows)]
    width = max(map(len, lines))
    return "\n".join(
        [table.caption, *_aligned([line + [""] * (width - len(line)) for line in lines])]
    )


def _aligned(lines: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
