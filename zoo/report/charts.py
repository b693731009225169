"""Drawing: lines as a Vega-Lite specification, in one look for every figure.

Colours are Okabe and Ito's, which colour-blind readers distinguish; symbol and dash repeat the
distinction. Everything else is `currentColor`, so that the page's theme, light or dark, decides.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from zoo.report.axes import LOG, Axis
from zoo.report.rows import Results
from zoo.report.statistics import finite

Spec = dict[str, Any]
Drawing = alt.LayerChart | alt.FacetChart

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
DASHES = ((1, 0), (6, 3), (2, 2.5), (9, 3, 2, 3), (1, 4))
SYMBOLS = (  # SVG paths in a square from -1 to 1
    "M-1,0A1,1,0,1,1,1,0A1,1,0,1,1,-1,0Z",
    "M-0.9,-0.9H0.9V0.9H-0.9Z",
    "M0,-1.1L1.1,0.9H-1.1Z",
    "M0,-1.3L1.3,0L0,1.3L-1.3,0Z",
    "M0,1.1L1.1,-0.9H-1.1Z",
    "M-0.4,-1.1H0.4V-0.4H1.1V0.4H0.4V1.1H-0.4V0.4H-1.1V-0.4H-0.4Z",
)
DISTINCT = len(COLORS) * len(DASHES)  # arms that can be distinguished
DOT: dict[str, Any] = {"filled": True, "size": 56, "opacity": 1}
NAME = 17  # pixels that a name beside a line needs
NAME_LENGTH, HEAD = 34, 12  # characters of a name in a figure, and those before the cut of a longer
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"


@dataclass(frozen=True)
class Style:
    """How an arm is drawn: no two alike, up to `DISTINCT`."""

    color: str
    dash: tuple[float, ...]
    symbol: str


def styles(results: Results, arms: Sequence[str] | None = None) -> dict[str, Style]:
    """A symbol per model, a colour per arm, another dash for each further arm of either.

    `arms` are those that are drawn, by default all. Of one model alone, read in several ways, every
    arm has its own symbol.
    """
    models = {label: str(results.known(label, "model") or label) for label in arms or results.arms}
    kinds = list(dict.fromkeys(models.values()))
    drawn: dict[str, Style] = {}
    for i, (label, model) in enumerate(models.items()):
        color, used = COLORS[i % len(COLORS)], [*models.values()][:i].count(model)
        taken = {style.dash for style in drawn.values() if style.color == color}
        free = [dash for dash in DASHES[used % len(DASHES) :] + DASHES if dash not in taken]
        symbol = SYMBOLS[(kinds.index(model) if len(kinds) > 1 else i) % len(SYMBOLS)]
        drawn[label] = Style(color, (free or DASHES)[0], symbol)
    return drawn


def lines(
    points: Sequence[Spec],
    look: Mapping[str, Style],
    x: Axis,
    y: Axis,
    *,
    about: str = "",
    rules: Iterable[int] = (),
    level: float | None = None,
    width: int | str = "container",
    height: int = 300,
    named: bool = False,
    legend: int = 0,
    ink: str = "currentColor",
) -> Drawing | None:
    """One line per arm of `look`, with its interval as a band; None where there is none to draw.

    More arms than colours have no bands, which would cover one another.

    Args:
        points: arm, x, y, low and high (or None); all else is shown in the tip.
        about: what a reader who cannot see the figure should know.
        rules: x positions (training lengths) marked by a vertical rule.
        level: a y position (chance) marked by a horizontal rule.
        named: name the arms at the right, beside the ends of their lines; makes a figure of many
            arms as high as their names.
        legend: the columns of a legend below; 0 for none.
    """

    def drawable(value: Any) -> bool:
        return finite(value) and (y.signed or value > 0)

    points = [p for p in points if p["arm"] in look and p["x"] > 0 and drawable(p["y"])]
    if not points:
        return None
    arms = [arm for arm in look if any(point["arm"] == arm for point in points)]
    marks = [{"x": rule, "text": f"trained at {rule:,}"} for rule in rules]
    x_scale, x_axis = x.scale([point["x"] for point in [*points, *marks]])
    banded = len(arms) <= len(COLORS)
    drawn = ("y", "low", "high") if banded else ("y",)
    seen = [point[name] for point in points for name in drawn]
    y_scale, y_axis = y.scale([value for value in seen if drawable(value)])
    y_axis.title, y_axis.grid = None, True
    height = max(height, NAME * len(arms)) if named else height
    across, up = alt.X("x:Q", scale=x_scale, axis=x_axis), alt.Y("y:Q", scale=y_scale, axis=y_axis)
    coding = _coding(arms, look, legend)
    layers = [
        *_marks(marks, across, ink),
        _bands(points if banded else [], across, y_scale, y_axis, coding["color"]),
        *_lines(points, across, up, coding),
    ]
    layers += [] if level is None else [_level(level, up, ink)]
    if named:
        layers += _names(_ends(points, arms, y_scale, height), up, coding, ink)
    title = alt.Title(
        y.title,
        subtitle=LOG if y_scale.type == "log" else alt.Undefined,
        offset=26 if marks else 12,
    )
    return alt.layer(*layers).properties(width=width, height=height, description=about, title=title)


def _coding(arms: Sequence[str], look: Mapping[str, Style], legend: int) -> dict[str, Any]:
    """Colour, symbol and dash of every arm, as encodings."""

    def scale(field: str) -> alt.Scale:
        return alt.Scale(domain=arms, range=[getattr(look[arm], field) for arm in arms])

    symbols: dict[str, Any] = {"symbolSize": 80, "symbolOpacity": 1, "symbolStrokeWidth": 0}
    symbols["symbolLimit"] = 0  # by default a long legend ends in "6 entries"
    key = alt.Legend(title=None, orient="bottom", columns=legend, **symbols) if legend else None
    return {
        "color": alt.Color("arm:N", legend=key, sort=None, scale=scale("color")),
        "shape": alt.Shape("arm:N", legend=key, sort=None, scale=scale("symbol")),
        "strokeDash": alt.StrokeDash("arm:N", legend=None, sort=None, scale=scale("dash")),
    }


def _level(level: float, up: alt.Y, ink: str) -> alt.Chart:
    """A horizontal rule, such as at what guessing would give."""
    base = alt.Chart(alt.Data(values=[{"y": level}])).encode(y=up)
    return base.mark_rule(color=ink, opacity=0.8, strokeDash=[2, 3])


def _marks(marks: Sequence[Spec], across: alt.X, ink: str) -> list[alt.Chart]:
    """Vertical rules with words above them."""
    base = alt.Chart(alt.Data(values=list(marks))).encode(x=across)
    words = base.mark_text(color=ink, opacity=0.8, fontSize=11.5)
    return [
        base.mark_rule(color=ink, opacity=0.5, strokeDash=[3, 3]),
        words.encode(y=alt.value(-8), text="text:N"),
    ]


def _bands(
    points: Sequence[Spec], across: alt.X, scale: alt.Scale, axis: alt.Axis, color: alt.Color
) -> alt.Chart:
    """The intervals of the points that have one."""
    bottom = scale.domain[0]  # where an interval reaches below all there is to see
    sure = [point for point in points if finite(point["low"]) and finite(point["high"])]
    bands = [point | {"low": max(point["low"], bottom)} for point in sure]
    low, high = alt.Y("low:Q", scale=scale, axis=axis), alt.Y2("high:Q")
    return (
        alt.Chart(alt.Data(values=bands)).mark_area(opacity=0.17).encode(across, low, high, color)
    )


def _lines(
    points: Sequence[Spec], across: alt.X, up: alt.Y, coding: Mapping[str, Any]
) -> list[alt.Chart]:
    """The lines, and a symbol with a tip at each point."""
    names = [name for name in points[0] if name not in ("x", "y", "low", "high")]
    tip = [alt.Tooltip(field=name, type="nominal") for name in names]
    base = alt.Chart(alt.Data(values=list(points))).encode(x=across, y=up, color=coding["color"])
    return [
        base.mark_line(strokeWidth=2.4).encode(strokeDash=coding["strokeDash"]),
        base.mark_point(**DOT).encode(shape=coding["shape"], tooltip=tip),
    ]


def cut(name: str) -> str:
    """A long name without its middle: what distinguishes arms is at its end."""
    return (
        name if len(name) <= NAME_LENGTH else f"{name[:HEAD]}\u2026{name[HEAD + 1 - NAME_LENGTH :]}"
    )


# The same for the names on an axis.
CUT = (
    f"length(datum.label) <= {NAME_LENGTH} ? datum.label : slice(datum.label, 0, {HEAD})"
    f" + '\u2026' + slice(datum.label, {HEAD + 1 - NAME_LENGTH})"
)


def _names(ends: Sequence[Spec], up: alt.Y, coding: Mapping[str, Any], ink: str) -> list[alt.Chart]:
    """The arms' names at the right, each behind its symbol."""
    base = alt.Chart(alt.Data(values=list(ends))).encode(x=alt.value("width"), y=up)
    dot = base.mark_point(**DOT, xOffset=12)
    text = base.mark_text(align="left", xOffset=21, color=ink, fontSize=12.5, limit=300)
    return [
        dot.encode(color=coding["color"], shape=coding["shape"]).properties(name="end"),
        text.encode(text="text:N").properties(name="ends"),
    ]


def grid(
    values: Sequence[Spec], arms: Sequence[str], x: Axis, *, about: str = "", ink: str
) -> Drawing:
    """A cell per arm and length, for more arms than lines could distinguish.

    `values` have arm, x, text, and `shade` from 0 (as at the training length) to 1, or None.
    """
    order = sorted({value["x"] for value in values})
    words = json.dumps([x.text(length) for length in order])
    axis = alt.Axis(
        title=x.title,
        orient="top",
        labelAngle=0,
        labelPadding=20,  # its words have two lines
        labelExpr=f"{words}[indexof({json.dumps(order)}, datum.value)]",
    )
    across = alt.X("x:O", axis=axis, sort=order)
    up = alt.Y("arm:N", sort=list(arms), title=None, axis=alt.Axis(labelExpr=CUT, labelLimit=300))
    base = alt.Chart(alt.Data(values=list(values))).encode(across, up)
    shades = alt.Scale(domain=[0, 1], range=["#f4f4f2", COLORS[1]], interpolate="rgb")
    shade = alt.Color("shade:Q", legend=None, scale=shades)
    cells = base.transform_filter("isValid(datum.shade)").mark_rect(stroke="white", strokeWidth=1.5)
    text = base.mark_text(fontSize=12, color=ink).encode(text="text:N")
    size = {"width": alt.Step(74), "height": alt.Step(20)}
    return alt.layer(cells.encode(color=shade), text).properties(**size, description=about)


def _ends(points: Sequence[Spec], arms: Sequence[str], scale: alt.Scale, height: int) -> list[Spec]:
    """Where the names at the right go: level with the last point, pushed apart where they touch."""
    log, inverse = (math.log, math.exp) if scale.type == "log" else (float, float)
    bottom, top = map(log, scale.domain)
    pixel = height / (top - bottom)
    last = {point["arm"]: point for point in sorted(points, key=lambda point: point["x"])}
    end = max(point["x"] for point in points)
    order = sorted(arms, key=lambda arm: last[arm]["y"])
    at = [(log(last[arm]["y"]) - bottom) * pixel for arm in order]  # pixels above the bottom
    gap = min(NAME, height / len(arms))
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    at[-1] = min(at[-1], height)
    for i in reversed(range(len(at) - 1)):
        at[i] = min(at[i], at[i + 1] - gap)
    names = []
    for arm, above in zip(order, at, strict=True):
        stop = last[arm]["x"]
        text = cut(arm) + ("" if stop == end else f", to {stop:,.0f}")
        names.append({"arm": arm, "text": text, "y": inverse(bottom + above / pixel)})
    return names


def themed(
    chart: alt.TopLevelMixin,
    ink: str = "currentColor",
    paper: str = "transparent",
    padding: int = 4,
) -> Spec:
    """The specification of a chart, in the one look all figures have."""
    text = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12}
    axis = {"domain": False, "tickColor": ink, "tickOpacity": 0.3, "gridColor": ink}
    axis |= {"gridOpacity": 0.13, "titleFontWeight": 400, "labelPadding": 5, "titlePadding": 9}
    title = {
        "color": ink,
        "subtitleColor": ink,
        "anchor": "start",
        "frame": "group",
        "fontSize": 13,
    }
    return chart.to_dict(validate=False) | {
        "background": paper,
        "padding": padding,
        "config": {
            "font": FONT,
            "view": {"stroke": None},
            "axis": text | axis,
            "axisX": {"grid": False},
            "title": title | {"fontWeight": 600, "subtitleFontSize": 12.5},
            "legend": text | {"labelFontSize": 12.5, "labelLimit": 320},
        },
    }
