"""One picture of what holds up, at what, and at what cost: quality, recall, state and speed.

A row per arm and a panel per question. A hollow mark is the training length, a filled one the
longest length that was measured, the bar its 95% interval; costs are those of the longest length.
Only arms that passed the leak audit and have learned are drawn: of the others a word says which.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import altair as alt

from zoo.measurement import Quantity
from zoo.report.axes import Axis
from zoo.report.charts import CUT, Drawing, Spec, Style
from zoo.report.figures import bits_axis, number
from zoo.report.learned import dead
from zoo.report.protocols import headline
from zoo.report.rows import Cell, Cells, Results
from zoo.report.scores import bigram
from zoo.report.statistics import finite
from zoo.report.tables import costs, lengths_of, shown_quantities
from zoo.report.timings import comparable, incomparable
from zoo.report.validity import LEAKS, NOT_AUDITED, NOT_LEARNED
from zoo.report.words import FORMS, caption, score, share, short, size

MAX_ARMS = 20  # arms: as many rows as fit above the fold
ROW = 21  # pixels of an arm
PANEL = 190  # pixels across, of a PNG
NARROW = 4  # ticks that a panel has room for
SPEEDS = ("milliseconds", "tokens_per_second")  # the first that was measured


@dataclass(frozen=True)
class Panel:
    """One question: of each arm its value at the training length, and at the longest."""

    name: str
    title: list[str]
    axis: Axis
    values: dict[str, tuple[Cell | None, Cell | None]]  # at the training length, at the longest
    better: str | None
    text: Any
    level: float | None = None
    guesses: Mapping[str, float] = field(default_factory=dict)  # arm -> what guessing would score


@dataclass(frozen=True)
class Overview:
    """The panels, the arms in their order, and why some have no marks."""

    panels: list[Panel]
    arms: list[str]
    without: dict[str, str]  # arm -> the words in place of its marks
    every: int

    @property
    def about(self) -> str:
        """What is to be seen, for the reader and for who cannot see it."""
        left = len(self.arms) - len(self.without)
        some = f" The best {left} of {self.every} arms are drawn." if left < self.every else ""
        names = ", ".join(panel.title[0].lower() for panel in self.panels)
        return (
            f"{names[0].upper()}{names[1:]}, a row per arm. Hollow marks: at the training length; "
            f"filled: at the longest length measured, with the 95% interval.{some}"
        )


def overview(results: Results) -> Overview | None:
    """The picture's content; None where neither quality nor recall was measured."""
    tested = [panel for panel in (_quality(results), _recall(results)) if panel]
    if not tested:
        return None
    without = excluded(results, tested)
    learned = [arm for arm in results.arms if arm not in without]
    learned.sort(key=lambda arm: [_rank(panel, arm) for panel in tested])
    shown = learned[:MAX_ARMS]
    words = {arm: without[arm] for arm in [*without][: MAX_ARMS - len(shown) or 3]}
    panels = [*tested, *(panel for panel in _costs(results) if {*shown} & {*panel.values})]
    return Overview(panels, [*shown, *words], words, len(results.arms))


def excluded(results: Results, tested: Sequence[Panel]) -> dict[str, str]:
    """Arm -> why it is not drawn: it leaks, was not audited, or has not learned the task."""
    found: dict[str, str] = {}
    unlearned = dead(results)
    for arm in results.arms:
        rows = results.by_arm[arm]
        if any(row["status"] == LEAKS for row in rows):
            found[arm] = LEAKS
        elif any(row["status"] == NOT_AUDITED for row in rows):
            found[arm] = "not audited"
        elif arm in unlearned:
            found[arm] = unlearned[arm].words
        elif not any(arm in panel.values for panel in tested):
            found[arm] = "no result"
        elif all(_at_chance(panel, arm) for panel in tested):
            found[arm] = NOT_LEARNED
    return found


def _at_chance(panel: Panel, arm: str) -> bool:
    """Whether an arm is no better than guessing where it was trained, or wherever measured."""
    if arm not in panel.values:
        return True
    home, far = panel.values[arm]
    cell = home or far
    level = panel.guesses.get(arm, panel.level)
    if level is None or cell is None or cell.value is None:
        return False
    return cell.value <= level if panel.better == "higher" else cell.value >= level


def _rank(panel: Panel, arm: str) -> float:
    """The best at the longest length first."""
    _, far = panel.values.get(arm, (None, None))
    if far is None or far.value is None:
        return math.inf
    return -far.value if panel.better == "higher" else far.value


def _quality(results: Results) -> Panel | None:
    protocol = headline(results)
    if not protocol:
        return None
    cells = results.cells("perplexity", "bits_per_byte", protocol=protocol)
    level = bigram(results, protocol)
    axis = bits_axis(None)
    title = ["quality", "bits per byte, lower is better"]
    return _panel(results, "quality", title, axis, cells, "lower", score, level)


def _recall(results: Results) -> Panel | None:
    """The first share that any task has measured, such as accuracy or passkeys found."""
    for task in results.tasks:
        if task == "perplexity":
            continue
        for quantity in shown_quantities(results, task):
            if quantity.form == "share" and lengths_of(results, task):
                cells, levels = results.measured(task, quantity), results.chances(task, quantity)
                axis = Axis("", share, signed=True, also=(0.0, 1.0), most=NARROW)
                data = {row.get("data") for row in results.where(task=task, status="ok")}
                one = data.pop() if len(data) == 1 else None  # several are in a banner
                of = f" of {one}" if quantity.name == "accuracy" and one else ""
                title = [f"{quantity.name}{of}", "higher is better"]
                level = levels[0] if len(levels) == 1 else None
                panel = _panel(results, "recall", title, axis, cells, "higher", share, level)
                return panel and replace(panel, guesses=_guesses(results, task, quantity))
    return None


def _guesses(results: Results, task: str, quantity: Quantity) -> dict[str, float]:
    """Arm -> what guessing scores at its training length, or where it was measured farthest."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for row in results.where(task=task, status="ok", **quantity.where):
        level = quantity.unlearned(row)
        if level is not None and finite(row.get("length")):
            found[row["label"]][row["length"]] = level
    homes = {arm: results.train_length(arm) for arm in found}
    return {arm: mine.get(homes[arm] or 0, mine[max(mine)]) for arm, mine in found.items()}


def _costs(results: Results) -> list[Panel]:
    """State at the longest length, and the speed of decoding or, without it, of reading."""
    known: dict[str, tuple[str, Quantity]] = {
        each.field: (task, each) for task, each in costs(results)
    }
    speed = next((cost for cost in SPEEDS if cost in known), None)
    panels = []
    for name, cost in (("state", "state_bytes"), ("speed", speed)):
        if cost not in known:
            continue
        task, quantity = known[cost]
        bytes_ = quantity.form == "bytes"
        words = size if bytes_ else FORMS[quantity.form].text
        axis = Axis("", size if bytes_ else number, base=2 if bytes_ else 10, most=NARROW)
        head = caption(quantity).partition(" (")[0].partition(", ")
        title = ["state" if name == "state" else head[0].lower()]
        unit = "bytes" if bytes_ else head[2]
        title.append(f"{unit}, {quantity.better} is better")
        cells = comparable(results, task, quantity)
        if left := len(incomparable(results, task, quantity)):
            title.append(f"{left} timed otherwise: not drawn")
        panel = _panel(results, name, title, axis, cells, quantity.better, words, home=False)
        panels += [panel] if panel else []
    return panels


def _panel(
    results: Results,
    name: str,
    title: list[str],
    axis: Axis,
    cells: Cells,
    better: str | None,
    text: Any,
    level: float | None = None,
    *,
    home: bool = True,
) -> Panel | None:
    """The cells of each arm at its training length and at the longest that any was measured at."""
    longest = max((n for mine in cells.values() for n, c in mine.items() if c.seeds), default=0)
    values = {}
    for arm, mine in cells.items():
        at = (mine.get(results.train_length(arm) or 0) if home else None, mine.get(longest))
        start, end = (cell if cell and finite(cell.value) else None for cell in at)
        if start or end:
            values[arm] = (start, end)
    if not values:
        return None
    title = [f"{title[0]} at {short(longest)}", *title[1:]]
    return Panel(name, title, axis, values, better, text, level)


def draw(
    panel: Panel,
    whole: Overview,
    look: Mapping[str, Style],
    *,
    named: bool,
    width: int | str = "container",
    ink: str = "currentColor",
) -> Drawing:
    """A panel: its marks, and in the first, which is `named`, the words of the arms without."""
    points = [point for arm in whole.arms for point in _points(panel, whole, arm)]
    ends = [v for p in points for v in (p["x"], p["low"], p["high"]) if finite(v)]
    ends = [value for value in ends if panel.axis.signed or value > 0]
    ends += [] if panel.level is None else [panel.level]
    scale, axis = panel.axis.scale(ends or [1.0])
    axis.title, axis.orient, axis.labelSeparation = None, "bottom", 8
    if not points:
        axis.values = []
    names = alt.Axis(
        ticks=False, domain=False, grid=True, labels=named, labelExpr=CUT, labelLimit=300
    )
    order = list(whole.arms)
    up = alt.Y("arm:N", sort=order, title=None, scale=alt.Scale(domain=order), axis=names)
    across = alt.X("x:Q", scale=scale, axis=axis)
    known = [arm for arm in order if arm in look]
    colors = alt.Scale(domain=known, range=[look[arm].color for arm in known])
    color = alt.Color("arm:N", legend=None, sort=None, scale=colors)
    symbols = alt.Scale(domain=known, range=[look[arm].symbol for arm in known])
    shape = alt.Shape("arm:N", legend=None, sort=None, scale=symbols)
    data = alt.Chart(alt.Data(values=points)).encode(y=up, color=color)
    sure = data.transform_filter("isValid(datum.low) && isValid(datum.high)")
    bar = alt.X("low:Q", scale=scale, axis=axis)
    marks = data.encode(x=across, shape=shape)
    tip = [
        alt.Tooltip(field=name, type="nominal") for name in ("arm", "length", "value", "interval")
    ]
    layers: list[alt.Chart] = [
        sure.mark_rule(strokeWidth=7, opacity=0.22, clip=True).encode(x=bar, x2="high:Q"),
        data.transform_filter("isValid(datum.home)")
        .mark_rule(strokeWidth=1.6)
        .encode(x=across, x2="home:Q"),
        marks.transform_filter("datum.hollow")
        .mark_point(filled=False, size=52, strokeWidth=1.6, opacity=1)
        .encode(tooltip=tip),
        marks.transform_filter("!datum.hollow")
        .mark_point(filled=True, size=62, opacity=1)
        .encode(tooltip=tip),
    ]
    if panel.level is not None:
        base = alt.Chart(alt.Data(values=[{"x": panel.level}])).encode(x=across)
        layers.append(base.mark_rule(color=ink, opacity=0.8, strokeDash=[2, 3]))
    words = [{"arm": arm, "text": why} for arm, why in whole.without.items()]
    if panel is whole.panels[0] and words:
        base = alt.Chart(alt.Data(values=words)).encode(y=up, x=alt.value(2), text="text:N")
        layers.append(base.mark_text(align="left", fontStyle="italic", color=ink, opacity=0.85))
    title = alt.Title(panel.title[0], subtitle=panel.title[1:], offset=8)
    return alt.layer(*layers).properties(
        width=width, height=ROW * len(order), title=title, description=whole.about
    )


def _points(panel: Panel, whole: Overview, arm: str) -> list[Spec]:
    """The marks of an arm: at the training length, hollow, and at the longest."""
    if arm in whole.without or arm not in panel.values:
        return []
    home, far = panel.values[arm]
    found = []
    for cell, where in ((home, "training length"), (far, "longest length")):
        if cell is None or not finite(cell.value):
            continue
        hollow = cell is home
        low, high = (None, None) if hollow else (cell.low, cell.high)
        if finite(low) and finite(high):
            if panel.name == "recall":
                low, high = max(0.0, low), min(1.0, high)
        else:
            low, high = None, None
        interval = f"{panel.text(low)} to {panel.text(high)}" if low is not None else ""
        point = {"arm": arm, "x": cell.value, "low": low, "high": high, "hollow": hollow}
        point |= {"length": where, "value": panel.text(cell.value), "interval": interval}
        point["home"] = home.value if home and not hollow else None
        found.append(point)
    return found


def overview_picture(whole: Overview, look: Mapping[str, Style], ink: str) -> alt.HConcatChart:
    """The panels side by side, of one width each, for a PNG."""
    charts = [
        draw(panel, whole, look, named=i == 0, width=PANEL, ink=ink)
        for i, panel in enumerate(whole.panels)
    ]
    return alt.hconcat(*charts, spacing=26)
