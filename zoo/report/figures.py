"""What each figure shows: which rows become which lines, on the page and in the PNGs."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import altair as alt
import vl_convert

from zoo.report.charts import DISTINCT, Axis, Drawing, Spec, Style, grid, lines, themed
from zoo.report.rows import Cell, Cells, Results, Row, finite
from zoo.report.tables import (
    ANSWERS,
    DASH,
    PROTOCOLS,
    SAME_TOKENS,
    chance,
    count,
    headline,
    score,
    share,
    short,
    signed,
    size,
    times,
)

INK, PAPER = "#1d1f23", "#ffffff"
PICTURES = ("bits_per_byte.png", "passkey.png", "reach.png", "speed.png")  # of a report
MANY = 14  # arms, of which lines would be a tangle
SHADED = "orange: what is lost against the arm's own score at its training length, full at 1 bit"
POOLED = 256  # scored tokens that a point by position rests on at least
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
    """The arms that figures show: all, or of more than can be told apart the best at the longest
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
    """The axis of all lengths that were scored or asked at: the same for both."""
    rows = [row for task in ("perplexity", "passkey") for row in results.where(task=task)]
    every = {row["length"] for row in rows if finite(row.get("length"))}
    axis = lengths(results, "test length in tokens, and in training lengths")
    return replace(axis, also=tuple(every))


def trained(results: Results) -> tuple[int, ...]:
    """The training lengths that occur."""
    return tuple(sorted({n for label in results.arms if (n := results.train_length(label))}))


def by_length(
    results: Results, cells: Cells, name: str, text: Callable[[float], str]
) -> list[Spec]:
    """The points of a figure over length, with what the tip tells."""
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
    cells = results.cells("perplexity", "bits_per_byte", spread=True, protocol=protocol)
    return Lines(
        f"scores-{protocol}",
        by_length(results, cells, "bits per byte", score),
        tested(results),
        Axis("bits per byte (lower is better)", number, log_from=2.5),
        f"Bits per byte by test length, {PROTOCOLS[protocol].lower()}, one line per arm.",
        trained(results),
    )


def changes(results: Results, protocol: str) -> Lines:
    """By how much each arm's score changes past its training length, on the same tokens."""
    y = "change against the training length, bits per byte"
    return Lines(
        f"changes-{protocol}",
        by_length(results, results.changes(protocol), "change in bits per byte", signed),
        tested(results),
        Axis(y, lambda value: f"{value:+.3g}" if value else "0", signed=True),
        "Change of bits per byte against the arm's own at its training length, one line per arm.",
        trained(results),
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


def retrieval(results: Results, answer: str) -> Lines:
    """How often each arm finds the passkey, against test length."""
    cells = results.cells("passkey", answer, spread=True)
    points = by_length(results, cells, "found", share)
    for point in points:
        if point["low"] is not None:  # Student's interval knows no bounds
            point |= {"low": max(0.0, point["low"]), "high": min(1.0, point["high"])}
    by_chance = chance(results, answer)
    luck = f", {share(by_chance)} by chance" if by_chance else ""
    return Lines(
        f"passkey-{answer}",
        points,
        tested(results),
        Axis(f"passkeys found, {ANSWERS[answer]}{luck}", share, signed=True, also=(0.0, 1.0)),
        f"Share of passkeys found by test length, {ANSWERS[answer]}, one line per arm.",
        trained(results),
        by_chance,
    )


def reach(results: Results) -> list[Lines]:
    """Reading on and finding: scores, and beside them passkeys, where both were measured."""
    protocol = headline(results)
    pair = [scores(results, protocol), retrieval(results, "accuracy")] if protocol else []
    pair = [replace(figure, name=f"reach-{figure.name}") for figure in pair]
    return pair if all(figure.points for figure in pair) else []


def positions(results: Results, task: str) -> Lines:
    """Bits per byte against the position in the text, at the longest length an arm could read."""
    points = []
    equal = {"protocol": "blocks"} if task == "perplexity" else {}
    for label in results.arms:
        rows = results.where(task=task, label=label, status="ok", **equal)
        rows = [row for row in rows if isinstance(row.get("curve"), dict)]
        longest = max((row["length"] for row in rows), default=0)
        points += _curve(label, [row["curve"] for row in rows if row["length"] == longest])
    about = "Bits per byte by position within the text, one line per arm."
    x = Axis("tokens read before", short, base=2)
    y = Axis("bits per byte (lower is better)", number, log_from=2.5)
    return Lines(f"positions-{task}", points, x, y, about, trained(results))


def _curve(label: str, curves: list[Row]) -> list[Spec]:
    """Points at the middle of ranges of positions, averaged over seeds by token count.

    A range is as many neighbouring buckets as hold `POOLED` tokens: a few tokens, such as those at
    the very first and last positions, differ by a bit and more from what a model scores there.
    """
    total: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for curve in curves:
        edges, bits = curve["edges"], curve["bits_per_byte"]
        if edges != curves[-1]["edges"]:  # of an older version: its ranges would overlap
            continue
        # Where nothing was counted, every position was scored at least once.
        counts = curve.get("count") or [b - a for a, b in pairwise(edges)]
        for *bucket, value, weight in zip(edges, edges[1:], bits, counts, strict=False):
            if finite(value) and finite(weight) and weight > 0:
                total[bucket[0], bucket[1]][0] += value * weight
                total[bucket[0], bucket[1]][1] += weight
    points = []
    for first, end, bits, tokens in _pooled(total):
        where = {"x": math.sqrt((first + 1) * end), "y": bits, "low": None, "high": None}
        tip = {"positions": f"{first:,} to {end - 1:,}", "bits per byte": score(bits)}
        points.append({"arm": label, **where, **tip, "scored tokens": f"{tokens:,.0f}"})
    return points


def _pooled(total: Mapping[tuple[int, int], list[float]]) -> list[tuple[int, int, float, float]]:
    """(first position, end, mean, tokens) of neighbouring buckets with `POOLED` tokens or more.

    What is left at the end joins the range before it, where there is one.
    """
    pools: list[tuple[int, int, float, float]] = []  # first, end, sum, tokens

    def join(end: int, amount: float, tokens: float) -> None:
        first, _, before, had = pools.pop()
        pools.append((first, end, before + amount, had + tokens))

    for (first, end), (amount, tokens) in sorted(total.items()):
        if pools and pools[-1][3] < POOLED:
            join(end, amount, tokens)
        else:
            pools.append((first, end, amount, tokens))
    if len(pools) > 1 and pools[-1][3] < POOLED:
        join(*pools.pop()[1:])
    return [(first, end, amount / tokens, tokens) for first, end, amount, tokens in pools]


def state_cells(results: Results) -> Cells:
    """State bytes by length, from the first measurement that recorded them."""
    places: list[dict[str, Any]] = [{"task": "perplexity", "protocol": name} for name in PROTOCOLS]
    places += [{"task": "speed", "phase": phase} for phase in ("decode", "forward")]
    tables = (results.cells(field="state_bytes", **place) for place in places)
    return next((t for t in tables if any(c.seeds for m in t.values() for c in m.values())), {})


def costs(results: Results) -> dict[str, tuple[Cells, Lines]]:
    """Speed and memory by length: name -> (cells, figure)."""
    known = {
        "forward": ("forward, tokens per second (higher is better)", "tokens_per_second", number),
        "decode": ("decoding, ms per token (lower is better)", "milliseconds", number),
        "peak": ("peak memory of the forward pass", "peak_bytes", size),
        "state": ("state kept between chunks", "", size),
    }
    found = {}
    for name, (title, field, text) in known.items():
        phase = "decode" if name == "decode" else "forward"
        cells = results.cells("speed", field, phase=phase) if field else state_cells(results)
        words = size if text is size else count
        x = lengths(results, "prompt length" if name == "decode" else "length")
        y = Axis(title, text, base=2 if text is size else 10)
        about = f"{title.capitalize()}, by length, one line per arm."
        found[name] = (
            cells,
            Lines(name, by_length(results, cells, title.split(" (")[0], words), x, y, about),
        )
    return found


def pngs(results: Results, look: Mapping[str, Style]) -> dict[str, bytes]:
    """The pictures for a README, on white: file name -> PNG; what has no rows is left out."""
    pictures = {}
    protocol, train = headline(results), results.train_length()
    headed = f"Trained at {train:,}, tested beyond" if train else "Bits per byte by test length"
    large: dict[str, Any] = {"fontSize": 17, "subtitlePadding": 5, "offset": 28}
    how = {"width": 640, "named": True, "ink": INK}
    told = PROTOCOLS[protocol].lower() if protocol else ""
    subtitle = f"bits per byte by test length, lower is better; {told}"
    part = [drawn_words(results)] if drawn_words(results) else []
    if protocol and len(results.arms) > MANY:
        title = alt.Title(headed, subtitle=[subtitle, SHADED], **large)
        pictures["bits_per_byte.png"] = table(results, protocol).properties(title=title)
    elif protocol and (chart := scores(results, protocol).draw(look, height=400, **how)):
        scale = [s for s in [chart.title.subtitle] if isinstance(s, str)]
        title = alt.Title(headed, subtitle=", ".join([subtitle, *scale]), **large)
        panels = [chart.properties(title=title)]
        if protocol in SAME_TOKENS and (
            below := changes(results, protocol).draw(look, height=200, **how)
        ):
            panels.append(below)
        pictures["bits_per_byte.png"] = alt.vconcat(*panels, spacing=26)
    elif found := retrieval(results, "accuracy").draw(look, height=240, **how):
        pictures["passkey.png"] = found
    how = {"legend": True, "ink": INK}
    shown = (figure.draw(look, width=440, height=380, **how) for figure in reach(results))
    if panels := [chart for chart in shown if chart]:
        words = ["reading on, and finding what was read", *part]
        title = alt.Title(headed, subtitle=words, **large)
        pictures["reach.png"] = alt.concat(*panels, spacing=30, title=title)
    shown = (
        figure.draw(look, width=270, height=240, **how) for _, figure in costs(results).values()
    )
    if panels := [chart for chart in shown if chart]:
        title = {"title": alt.Title("Speed and memory", subtitle=part, **large)} if part else {}
        pictures["speed.png"] = alt.concat(*panels, columns=2, spacing=30, **title)
    return {
        name: vl_convert.vegalite_to_png(themed(chart, INK, PAPER, padding=20), scale=2)
        for name, chart in pictures.items()
    }


def drawn_words(results: Results) -> str:
    """Says how many arms figures leave out, where they do."""
    some, every = len(drawn(results)), len(results.arms)
    best = " (the best at the longest length)" if headline(results) else ""
    return f"{some} of {every} arms are drawn{best}; the tables have all" if some < every else ""
