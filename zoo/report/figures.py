"""What each figure shows: which rows become which lines, on the page and in the PNGs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zoo.measurement import Form, Quantity
from zoo.report.axes import Axis
from zoo.report.charts import DISTINCT, Drawing, Spec, Style, grid, lines
from zoo.report.noise import floors_of, noise_words
from zoo.report.protocols import PROTOCOLS, headline
from zoo.report.rows import Cell, Cells, Results
from zoo.report.scores import NEAR, bigram, context_gains, quantization_costs, score_noise
from zoo.report.tables import costs, lengths_of, shown_quantities
from zoo.report.timings import comparable, incomparable
from zoo.report.words import DASH, FORMS, caption, score, share, short, signed, size, times

INK = "#1d1f23"
MANY = 14  # arms, of which lines would be a tangle
WORST = 1.0  # bits per byte lost, from which on a cell has the full shade


@dataclass(frozen=True)
class Lines:
    """A figure before it is drawn: on the page, or as a PNG."""

    name: str
    points: list[Spec]
    x: Axis
    y: Axis
    about: str
    rules: tuple[int, ...] = ()
    level: float | None = None

    def draw(self, look: Mapping[str, Style], **how: Any) -> Drawing | None:
        """The chart, or None where there is nothing to draw."""
        marks = {"about": self.about, "rules": self.rules, "level": self.level}
        return lines(self.points, look, self.x, self.y, **marks, **how)


def number(value: float) -> str:
    """Words for a tick."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def drawn(results: Results) -> list[str]:
    """The arms that figures show: all, or of more than can be distinguished the best at the longest
    length."""
    if len(results.arms) <= DISTINCT:
        return results.arms
    protocol = headline(results)
    cells = results.cells("perplexity", "bits_per_byte", protocol=protocol) if protocol else {}
    best = sorted(results.arms, key=lambda label: _at_the_end(cells.get(label, {})))[:DISTINCT]
    return [label for label in results.arms if label in best]


def _at_the_end(mine: Mapping[int, Cell]) -> float:
    """An arm's score at the longest length; infinity where it has none."""
    value = mine[max(mine)].value if mine else None
    return math.inf if value is None else value


def lengths(results: Results, title: str) -> Axis:
    """The axis of test lengths: tokens, and below them multiples of the training length."""
    train = results.train_length()

    def words(length: float) -> list[str]:
        return [short(length), times(length, train)]

    return Axis(title, words, base=2, own_ticks=True)


def tested(results: Results) -> Axis:
    """The axis of all lengths of the tasks that have several: the same for all tasks."""
    every = [lengths_of(results, task) for task in results.tasks if shown_quantities(results, task)]
    axis = lengths(results, "test length in tokens, and in training lengths")
    return replace(axis, also=tuple({n for some in every if len(some) > 1 for n in some}))


def trained(results: Results) -> tuple[int, ...]:
    """The training lengths that occur."""
    return tuple(sorted({n for label in results.arms if (n := results.train_length(label))}))


def by_length(
    results: Results, cells: Cells, name: str, text: Callable[[float], str]
) -> list[Spec]:
    """The points of a figure over length, with what the tip shows."""
    points = []
    for label, mine in cells.items():
        for length, cell in mine.items():
            if cell.value is None:
                continue
            about = f"{length:,} ({times(length, results.train_length())})"
            tip = {"length": about, name: text(cell.value), "95% interval": DASH}
            if cell.low is not None and cell.high is not None:
                tip["95% interval"] = f"{text(cell.low)} to {text(cell.high)}"
            where = {"x": length, "y": cell.value, "low": cell.low, "high": cell.high}
            points.append({"arm": label, **where, **tip, "seeds": str(cell.seeds)})
    return points


def scores(results: Results, protocol: str) -> Lines:
    """Bits per byte against test length."""
    cells = results.cells("perplexity", "bits_per_byte", protocol=protocol)
    level = bigram(results, protocol)
    y = bits_axis(level)
    return Lines(
        f"scores-{protocol}",
        by_length(results, cells, "bits per byte", score),
        tested(results),
        replace(y, title=y.title + noise_words(score_noise(results, protocol), "score")),
        f"Bits per byte by test length, {PROTOCOLS[protocol].lower()}, one line per arm.",
        trained(results),
        level,
    )


def bits_axis(level: float | None) -> Axis:
    """The axis of bits per byte; it has the level of a bigram model, drawn as a dotted line."""
    title = "bits per byte (lower is better)"
    if level is None:
        return Axis(title, number, log_from=2.5)
    return Axis(f"{title}, {score(level)} by a bigram model", number, log_from=2.5, also=(level,))


def difference_axis(title: str, *also: float) -> Axis:
    """An axis of differences, of either sign; `also` are values that it reaches."""
    return Axis(title, lambda value: f"{value:+.3g}" if value else "0", signed=True, also=also)


def changes(results: Results, protocol: str) -> Lines:
    """By how much each arm's score changes past its training length, on the same tokens."""
    y = "change against the training length, bits per byte"
    return Lines(
        f"changes-{protocol}",
        by_length(results, results.changes(protocol), "change in bits per byte", signed),
        tested(results),
        difference_axis(y),
        "Change of bits per byte against the arm's own at its training length, one line per arm.",
        trained(results),
    )


def gains(results: Results, protocol: str) -> Lines:
    """What each arm gains from the distant past: bits per byte saved on the same tokens."""
    cells = context_gains(results, protocol)
    return Lines(
        f"gains-{protocol}",
        by_length(results, cells, "gain in bits per byte", signed),
        lengths(results, "test length in tokens, and in training lengths"),
        difference_axis(
            f"gain from context beyond {short(NEAR)} tokens, bits per byte (higher is better)", 0.0
        ),
        f"Bits per byte saved where more than {NEAR:,} tokens are read, one line per arm.",
        level=0.0 if cells else None,
    )


def quantization(results: Results, protocol: str) -> Lines:
    """What quantized weights and caches cost by length, against the same runs in plain numbers."""
    cells = quantization_costs(results, protocol)
    return Lines(
        f"quantization-{protocol}",
        by_length(results, cells, "cost in bits per byte", signed),
        lengths(results, "test length in tokens, and in training lengths"),
        difference_axis("bits per byte lost by fewer bits (lower is better)", 0.0),
        "Bits per byte less those of the same runs in plain numbers, one line per arm.",
        trained(results) if cells else (),
        level=0.0 if cells else None,
    )


def table(results: Results, protocol: str) -> Drawing:
    """Bits per byte of many arms by test length, best at the longest length first."""
    cells = results.cells("perplexity", "bits_per_byte", protocol=protocol)
    lost, values = results.changes(protocol), []
    for label, mine in cells.items():
        for length, cell in mine.items():
            value, change = cell.value, lost[label][length].value
            shade = None if change is None else min(max(change / WORST, 0.0), 1.0)
            text = DASH if value is None else score(value)
            values.append({"arm": label, "x": length, "text": text, "shade": shade})

    x = lengths(results, "test length in tokens, and in training lengths")
    about = "Bits per byte by test length, a row per arm, darker where it lost more."
    return grid(
        values, sorted(cells, key=lambda label: _at_the_end(cells[label])), x, about=about, ink=INK
    )


def task_figures(results: Results, task: str) -> list[Lines]:
    """A figure for each quantity of a task with several lengths."""
    if len(lengths_of(results, task)) < 2:
        return []
    return [quantity_figure(results, task, each) for each in shown_quantities(results, task)]


def cost_figures(results: Results) -> list[Lines]:
    """Speed and memory by length."""
    return [quantity_figure(results, task, quantity) for task, quantity in costs(results)]


def quantity_figure(results: Results, task: str, quantity: Quantity) -> Lines:
    """One quantity of a task against length, with what guessing would give as a level."""
    cells, without = comparable(results, task, quantity), incomparable(results, task, quantity)
    points = by_length(results, cells, quantity.name, FORMS[quantity.form].text)
    for point in points if quantity.form == "share" else ():
        if point["low"] is not None:  # Student's interval knows no bounds
            point |= {"low": max(0.0, point["low"]), "high": min(1.0, point["high"])}
    levels = results.chances(task, quantity)
    level = levels[0] if len(levels) == 1 else None
    title = caption(quantity)
    if level is not None:
        title += f", {FORMS[quantity.form].text(level)} by chance"
    if not quantity.cost:
        title += noise_words(floors_of(results, cells, quantity.form), quantity.form)
    where = "-".join(map(str, quantity.where.values()))
    return Lines(
        "-".join(filter(None, (task, quantity.field, where))),
        points,
        lengths(results, "length") if quantity.cost else tested(results),
        axis(quantity.form, title, [point["y"] for point in points]),
        f"{title}, by length, one line per arm.{_left_out(without)}",
        () if quantity.cost else trained(results),
        level,
    )


def _left_out(without: Mapping[str, str]) -> str:
    """How many arms a figure of times leaves out, and why."""
    whys = dict.fromkeys(without.values())
    return f" Not drawn: {len(without)} ({', '.join(whys)})." if without else ""


def axis(form: Form, title: str, values: list[float]) -> Axis:
    """The vertical axis for numbers of a form; one that has values below 0 is linear."""
    if form == "share":
        return Axis(title, share, signed=True, also=(0.0, 1.0))
    signed = any(value <= 0 for value in values)
    if form == "bytes":
        return Axis(title, size, base=2, signed=signed)
    return Axis(title, number, signed=signed, log_from=2.5 if form == "score" else 1.6)


def length_extension(results: Results) -> list[Lines]:
    """Reading on and finding: scores, and beside them what another task found in the same text."""
    protocol = headline(results)
    others = [
        (task, quantity)
        for task in results.tasks
        if task != "perplexity" and len(lengths_of(results, task)) > 1
        for quantity in shown_quantities(results, task)
        if quantity.form == "share"
    ]
    if not protocol or not others:
        return []
    pair = [scores(results, protocol), quantity_figure(results, *others[0])]
    pair = [replace(figure, name=f"length_extension-{figure.name}") for figure in pair]
    return pair if all(figure.points for figure in pair) else []


def drawn_words(results: Results) -> str:
    """Says how many arms figures leave out, where they do."""
    some, every = len(drawn(results)), len(results.arms)
    best = " (the best at the longest length)" if headline(results) else ""
    return f"{some} of {every} arms are drawn{best}; the tables have all" if some < every else ""
