"""Results to tables: scores by length, effective context, speed, streams, budgets."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby, takewhile

from zoo.report.rows import Cell, Cells, Results, contrast, finite, in_words, missing
from zoo.report.validity import LEAKS, unlearned

Tied = Callable[[str, str, int], bool]  # two arms and a length

PROTOCOLS = {  # the first that was measured is the headline
    "half_tail": "Same tokens at every length",
    "stride_tail": "Same few tokens, full windows",
    "blocks": "Average over whole blocks",
    "window_mean": "Mean over sliding windows",
    "masked": "Masked tokens, read from both sides",
}
EXPLAINED = {
    "half_tail": "Every length scores the same tokens, each with at least half that length of text "
    "before it: along a line only the model's view of the past changes.",
    "stride_tail": "Every length scores the same last tokens, each with nearly that length of text "
    "before it: along a line only the model's view of the past changes.",
    "blocks": "The text is cut into blocks of this length and every token is scored. The first "
    "tokens of a block know little of their past, and longer blocks have fewer of them: lines "
    "fall even where nothing is gained from far text.",
    "window_mean": "A window of this length slides over the text; every token in it is scored.",
    "masked": "For encoders. The text is cut into blocks of this length, and at every length the "
    "same hidden tokens are scored. Not comparable with models that read from one side.",
}
ANSWERS = {"accuracy": "forced choice", "exact": "exact match"}  # to a passkey
# A length's score and another's are of the same tokens.
SAME_TOKENS = ("half_tail", "stride_tail", "masked")
SHARE = 0.05  # effective context: how much worse than at the training length still counts
TIMES, DASH, AT_LEAST, PLUS_MINUS = "\u00d7", "\u2013", "\u2265", "\u00b1"


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

    @property
    def ends(self) -> str:
        """Its interval in words, where the scores leave it open."""
        return f" ({self.low:,}{DASH}{self.high:,})" if self.low < self.high else ""


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


def signed(number: float) -> str:
    """A change or difference in bits per byte."""
    return f"{number:+.3f}"


def share(number: float) -> str:
    """0.1 -> "10%", 0.0001 -> "0.01%"."""
    return f"{100 * number:.0f}%" if number >= 0.01 or not number else f"{100 * number:.2g}%"


def plain(value: object) -> str:
    """A value as it is, with thousands; a dash for none."""
    if missing(value):
        return DASH
    return f"{value:,}" if isinstance(value, int) else str(value)


def times(length: float, train: int | None) -> str:
    """A length as a multiple of the training length: "4×"."""
    return f"{length / train:.3g}{TIMES}" if train else ""


def headline(results: Results) -> str | None:
    """The protocol whose scores stand first."""
    return next((p for p in PROTOCOLS if results.where(task="perplexity", protocol=p)), None)


def plus_minus(cell: Cell) -> str:
    """The interval of bits per byte."""
    return f"{PLUS_MINUS}{score(cell.half)}" if cell.half else ""


def from_to(cell: Cell) -> str:
    """The interval of a share, which is not symmetric."""
    if cell.low is None or cell.high is None:
        return ""
    return f"{share(max(0.0, cell.low))}{DASH}{share(min(1.0, cell.high))}"


def chance(results: Results, answer: str) -> float | None:
    """What guessing would find; None where the rows differ in it."""
    name = "chance" if answer == "accuracy" else f"{answer}_chance"
    found = {row.get(name) for row in results.where(task="passkey", status="ok")}
    return found.pop() if len(found) == 1 else None


def found(results: Results, answer: str) -> Table | None:
    """Passkeys found, by test length."""
    luck = chance(results, answer)
    guessed = f" Chance: {share(luck)}." if luck else ""
    caption = f"Passkeys found, {ANSWERS[answer]}.{guessed}"
    cells = results.cells("passkey", answer, spread=True)
    return grid(results, cells, caption, share, sure=from_to)


def grid(
    results: Results,
    cells: Cells,
    caption: str,
    text: Callable[[float], str],
    best: Callable[[Iterable[float]], float] | None = None,
    tied: Tied | None = None,
    sure: Callable[[Cell], str] = plus_minus,
) -> Table | None:
    """Arms down, lengths across: the best of a column marked, and what it cannot be told from."""
    if not cells:
        return None
    lengths = list(next(iter(cells.values())))
    head = [(f"{length:,}", times(length, results.train_length())) for length in lengths]
    table = Table(caption, [("arm", ""), *head])
    first = {length: winner(cells, length, best) if best else None for length in lengths}
    for label, mine in cells.items():
        row = [Td(label, "asked for now" if results.requested(label) else "")]
        for reason, group in groupby(mine, key=lambda length: mine[length].reason):
            same = list(group)
            if reason:
                kind = LEAKS if reason.startswith(LEAKS) else "reason"
                row.append(Td(reason, kind=kind, span=len(same)))
                continue
            for length in same:
                top, kind = first[length], ""
                if top and mine[length].value == cells[top][length].value:
                    kind = "best"
                elif top and tied and tied(label, top, length):
                    kind = "tie"
                row.append(_value(mine[length], text, kind, sure))
        table.rows.append(row)
    return table


def winner(cells: Cells, length: int, best: Callable[[Iterable[float]], float]) -> str | None:
    """The best arm of a column; None unless two arms have different values there."""
    column = {mine[length].value: label for label, mine in cells.items()}
    values = [value for value in column if value is not None]
    return column[best(values)] if len(values) > 1 else None


def ties(results: Results, protocol: str) -> Tied:
    """Tells whether two arms cannot be told apart at a length.

    That is so where the interval of their difference holds 0, or, of arms that were not scored on
    the same text, where the intervals of their scores overlap.
    """
    places = results.places("perplexity", protocol=protocol)
    cells = results.cells("perplexity", "bits_per_byte", spread=True, protocol=protocol)

    def tied(label: str, other: str, length: int) -> bool:
        apart = contrast(places[label][length], places[other][length])
        if apart.low is not None and apart.high is not None:
            return apart.low <= 0 <= apart.high
        one, two = cells[label][length], cells[other][length]
        ends = (one.low, two.high), (two.low, one.high)
        return all(low is not None and high is not None and low <= high for low, high in ends)

    return tied


def _value(cell: Cell, text: Callable[[float], str], kind: str, sure: Callable[[Cell], str]) -> Td:
    assert cell.value is not None
    note = sure(cell)
    if cell.seeds < cell.tried:
        note = f"{note} {cell.seeds} of {cell.tried} seeds".strip()
    return Td(text(cell.value), note, kind)


def reach(excess: dict[int, Cell], train: int | None) -> Reach | None:
    """The largest length up to which no score is worse than it may be.

    `excess` is by how much each is worse than the share allows: `Results.changes` against the
    score at `train` times 1 + share. The interval asks the same of both ends of its intervals.
    """
    if train is None or train not in excess or excess[train].value is None:
        return None
    lengths = [length for length in sorted(excess) if length > train]

    def last(end: str) -> int:
        def good(length: int) -> bool:
            at = getattr(excess[length], end)
            at = excess[length].value if at is None else at
            return at is not None and at <= 0

        return max(takewhile(good, lengths), default=train)

    point = last("value")
    after = next((excess[length] for length in lengths if length > point), None)
    return Reach(point, last("high"), last("low"), after is None, after.reason if after else "")


def dead(results: Results) -> dict[str, str]:
    """Arm -> why its scores show no learning, of those that show none."""
    rows = results.where(task="perplexity", protocol=headline(results), status="ok")
    return unlearned([row for row in rows if finite(row.get("bits_per_byte"))])


def reaches(results: Results) -> dict[str, Reach | None]:
    """Effective context of every arm, from the scores on the same tokens at every length.

    None where there is no score at the training length, or where the arm has not learned: a score
    that no text could make worse stays level at any length.
    """
    protocol, without = headline(results), dead(results)
    excess = results.changes(protocol, 1 + SHARE) if protocol in SAME_TOKENS else {}
    return {
        label: None if label in without else reach(mine, results.train_length(label))
        for label, mine in excess.items()
    }


def contexts(results: Results) -> Table | None:
    """Effective context as a table."""
    heads = ("arm", "tokens", "of the training length", "95% interval", "ends because")
    caption = f"Largest length up to which bits per byte stay within {SHARE:.0%} of the arm's own."
    table, without = Table(caption, [(head, "") for head in heads]), dead(results)
    for label, own in reaches(results).items():
        if own is None:
            dull = without.get(label)
            why = f"has not learned: {dull}" if dull else _unscored(results, label)
            kind = LEAKS if why.startswith(LEAKS) else "reason"
            cells = [Td(why, kind=kind, span=4)]
        else:
            why = "it does not: the tests end here" if own.open_end else own.then or "scores rise"
            ends = f"{own.low:,}{DASH}{own.high:,}"
            multiple = times(own.length, results.train_length(label))
            cells = [Td(str(own), kind="lead"), Td(multiple), Td(ends), Td(why, kind="words")]
        table.rows.append([Td(label), *cells])
    return table if table.rows else None


def _unscored(results: Results, label: str) -> str:
    """Why an arm has no score at its training length."""
    leaks = (in_words(row) for row in results.by_arm[label] if row["status"] == LEAKS)
    return next(leaks, "unknown: no score at the training length")


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


def speeds(results: Results) -> list[Table]:
    """Speed by length, for a terminal."""
    known = {
        "forward": ("Forward, tokens per second, higher is better.", "tokens_per_second"),
        "decode": ("Decoding, milliseconds per token, lower is better.", "milliseconds"),
    }
    tables = [
        grid(results, results.cells("speed", field, phase=phase), caption, count)
        for phase, (caption, field) in known.items()
    ]
    return [table for table in tables if table]


def streams(results: Results) -> Table | None:
    """One reading of a very long text: how far, how fast, in how much memory."""
    columns = {
        "length": ("tokens read", plain),
        "tokens_per_second": ("tokens/s", count),
        "late_tokens_per_second": ("in the last tenth", count),
        "peak_bytes": ("peak memory", size),
        "growth_bytes": ("growth after the first tenth", lambda grown: size(max(grown, 0))),
        "state_bytes": ("state", size),
    }
    heads = [("arm", ""), *((head, "") for head, _ in columns.values())]
    table = Table("One pass over one long text, the state carried on.", heads)
    for row in results.where(task="stream"):
        if row["status"] == "ok":
            told = (f(row[k]) if finite(row.get(k)) else DASH for k, (_, f) in columns.items())
            table.rows.append([Td(row["label"]), *map(Td, told)])
        else:
            kind = LEAKS if row["status"] == LEAKS else "reason"
            reason = Td(in_words(row), kind=kind, span=len(columns))
            table.rows.append([Td(row["label"]), reason])
    return table if table.rows else None
