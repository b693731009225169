"""Figures by position in the text: which rows become which lines."""

import math
from itertools import pairwise
from typing import NamedTuple

from zoo.report.axes import Axis
from zoo.report.charts import Spec
from zoo.report.figures import Lines, bits_axis, trained
from zoo.report.rows import Results, Row
from zoo.report.scores import bigram
from zoo.report.statistics import finite
from zoo.report.tables import Table, Td
from zoo.report.words import DASH, score, short

MIN_TOKENS = 256  # scored tokens that a point rests on at least


class Bucket(NamedTuple):
    """What was scored at the positions from `first` to before `end`."""

    first: int
    end: int
    bits: float  # of all its text
    bytes: float
    tokens: float

    @property
    def middle(self) -> float:
        """The position that is as many times the first as the last is that; 0 counts as 1."""
        return math.sqrt(max(self.first, 1) * max(self.end - 1, 1))

    def joined(self, after: "Bucket") -> "Bucket":
        sums = (a + b for a, b in zip(self[2:], after[2:], strict=True))
        return Bucket(self.first, after.end, *sums)


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
        parts: dict[int, Bucket] = {}
        for one in _total([row["curve"] for row in mine]):
            place = next(n for n, last in enumerate(ends) if one.middle < last)
            parts[place] = parts[place].joined(one) if place in parts else one
        for part in parts.values():
            if part.tokens >= MIN_TOKENS:
                columns.setdefault((part.first, part.end), {})[label] = part.bits / part.bytes
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
    """An arm's rows with a curve, of the longest length that it could read.

    Curves of before they had their bytes are those of texts whose tokens are bytes, or left out.
    """
    equal = {"protocol": "blocks"} if task == "perplexity" else {}
    rows = results.where(task=task, label=label, status="ok", **equal)
    rows = [
        row
        for row in rows
        if isinstance(row.get("curve"), dict)
        and ("bytes" in row["curve"] or row.get("tokenizer") == "bytes")
    ]
    longest = max((row["length"] for row in rows), default=0)
    return [row for row in rows if row["length"] == longest]


def _curve(label: str, curves: list[Row]) -> list[Spec]:
    """Points at the middle of ranges of positions, over all bytes of all seeds.

    A range is as many neighbouring buckets as hold `MIN_TOKENS` tokens: a few tokens, such as those
    at the very first and last positions, differ by a bit and more from what a model scores there.
    """
    points = []
    for one in _pooled(_total(curves)):
        bits = one.bits / one.bytes
        where = {"x": one.middle, "y": bits, "low": None, "high": None}
        tip = {"positions": f"{one.first:,} to {one.end - 1:,}", "bits per byte": score(bits)}
        points.append({"arm": label, **where, **tip, "scored tokens": f"{one.tokens:,.0f}"})
    return points


def _total(curves: list[Row]) -> list[Bucket]:
    """The buckets of positions, in order, over all curves."""
    total: dict[tuple[int, int], Bucket] = {}
    for curve in curves:
        edges, bits = curve["edges"], curve["bits_per_byte"]
        if edges != curves[-1]["edges"]:  # of an older version: its ranges would overlap
            continue
        # Where nothing was counted, every position was scored at least once.
        counts = curve.get("count") or [b - a for a, b in pairwise(edges)]
        sizes = curve.get("bytes") or counts
        for *place, value, size, tokens in zip(edges, edges[1:], bits, sizes, counts, strict=False):
            if finite(value) and finite(size) and finite(tokens) and size > 0:
                first, end = place
                found = Bucket(first, end, value * size, size, tokens)
                total[first, end] = (
                    total[first, end].joined(found) if (first, end) in total else found
                )
    return sorted(total.values())


def _pooled(total: list[Bucket]) -> list[Bucket]:
    """Neighbouring buckets together, each range of `MIN_TOKENS` tokens or more.

    What is left at the end joins the range before it, where there is one.
    """
    pools: list[Bucket] = []
    for one in total:
        if pools and pools[-1].tokens < MIN_TOKENS:
            pools[-1] = pools[-1].joined(one)
        else:
            pools.append(one)
    if len(pools) > 1 and pools[-1].tokens < MIN_TOKENS:
        last = pools.pop()
        pools[-1] = pools[-1].joined(last)
    return pools
