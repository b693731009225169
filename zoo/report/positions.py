"""Figures by position in the text: which rows become which lines."""

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise

from zoo.report.axes import Axis
from zoo.report.charts import Spec
from zoo.report.figures import Lines, bits_axis, trained
from zoo.report.rows import Results, Row
from zoo.report.scores import bigram
from zoo.report.statistics import finite
from zoo.report.tables import Table, Td
from zoo.report.words import DASH, score, short

MIN_TOKENS = 256  # scored tokens that a point rests on at least


def positions(results: Results, task: str) -> Lines:
    """Bits per byte against the position in the text, at the longest length an arm could read."""
    points = []
    for label in results.arms:
        rows = _longest(results, task, label)
        points += _curve(label, [row["curve"] for row in rows])
    about = "Bits per byte by position within the text, one line per arm."
    x = Axis("tokens read before", short, base=2)
    level = bigram(results) if points else None
    marks = about, trained(results), level
    return Lines(f"positions-{task}", points, x, bits_axis(level), *marks)


def position_table(results: Results) -> Table | None:
    """Bits per byte of the longest blocks by position: its octaves, the last one in halves.

    None where no arm read blocks, or the arms' longest differ: their positions are of other texts.
    """
    rows = {label: _longest(results, "perplexity", label) for label in results.arms}
    rows = {label: mine for label, mine in rows.items() if mine}
    lengths = {row["length"] for mine in rows.values() for row in mine}
    if len(lengths) != 1:
        return None
    (length,) = lengths
    ends = [length // 8, length // 4, length // 2, length * 2**-0.5, math.inf]
    columns: dict[tuple[int, int], dict[str, float]] = {}
    for label, mine in rows.items():
        parts: dict[int, list[tuple[int, int, float, float]]] = defaultdict(list)
        for (first, end), (amount, tokens) in sorted(
            _total([row["curve"] for row in mine]).items()
        ):
            place = next(n for n, last in enumerate(ends) if math.sqrt((first + 1) * end) < last)
            parts[place].append((first, end, amount, tokens))
        for part in parts.values():
            tokens = sum(one[3] for one in part)
            if tokens >= MIN_TOKENS:
                place = part[0][0], part[-1][1]
                columns.setdefault(place, {})[label] = sum(one[2] for one in part) / tokens
    if len(columns) < 2:
        return None
    caption = f"Bits per byte by position in the text, in blocks of {length:,} (lower is better)."
    head = [(f"{first:,} to {end - 1:,}", "") for first, end in sorted(columns)]
    table = Table(caption, [("arm", ""), *head])
    for label in rows:
        cells = (columns[place].get(label) for place in sorted(columns))
        table.rows.append([Td(label), *(Td(score(bits) if bits else DASH) for bits in cells)])
    return table


def _longest(results: Results, task: str, label: str) -> list[Row]:
    """An arm's rows with a curve, of the longest length that it could read."""
    equal = {"protocol": "blocks"} if task == "perplexity" else {}
    rows = results.where(task=task, label=label, status="ok", **equal)
    rows = [row for row in rows if isinstance(row.get("curve"), dict)]
    longest = max((row["length"] for row in rows), default=0)
    return [row for row in rows if row["length"] == longest]


def _curve(label: str, curves: list[Row]) -> list[Spec]:
    """Points at the middle of ranges of positions, averaged over seeds by token count.

    A range is as many neighbouring buckets as hold `MIN_TOKENS` tokens: a few tokens, such as those
    at the very first and last positions, differ by a bit and more from what a model scores there.
    """
    points = []
    for first, end, bits, tokens in _pooled(_total(curves)):
        where = {"x": math.sqrt((first + 1) * end), "y": bits, "low": None, "high": None}
        tip = {"positions": f"{first:,} to {end - 1:,}", "bits per byte": score(bits)}
        points.append({"arm": label, **where, **tip, "scored tokens": f"{tokens:,.0f}"})
    return points


def _total(curves: list[Row]) -> dict[tuple[int, int], list[float]]:
    """(first position, end) of every bucket -> [sum, tokens] over curves."""
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
    return total


def _pooled(total: Mapping[tuple[int, int], list[float]]) -> list[tuple[int, int, float, float]]:
    """(first position, end, mean, tokens) of neighbouring buckets with `MIN_TOKENS` tokens or more.

    What is left at the end joins the range before it, where there is one.
    """
    pools: list[tuple[int, int, float, float]] = []  # first, end, sum, tokens

    def join(end: int, amount: float, tokens: float) -> None:
        first, _, before, had = pools.pop()
        pools.append((first, end, before + amount, had + tokens))

    for (first, end), (amount, tokens) in sorted(total.items()):
        if pools and pools[-1][3] < MIN_TOKENS:
            join(end, amount, tokens)
        else:
            pools.append((first, end, amount, tokens))
    if len(pools) > 1 and pools[-1][3] < MIN_TOKENS:
        join(*pools.pop()[1:])
    return [(first, end, amount / tokens, tokens) for first, end, amount, tokens in pools]
