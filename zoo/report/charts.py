"""Drawing: lines as a Vega-Lite specification, in one look for every figure.

Colours are Okabe and Ito's, which colour-blind readers tell apart; symbol and dash repeat the
distinction. Everything else is `currentColor`, so that the page's theme, light or dark, decides.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from zoo.report.rows import Results, finite

Spec = dict[str, Any]
Drawing = alt.LayerChart | alt.FacetChart

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
DASHES = ((1, 0), (6, 3), (2, 2.5), (9, 3, 2, 3), (1, 4))
LOG = "log scale"
SYMBOLS = (  # SVG paths in a square from -1 to 1
    "M-1,0A1,1,0,1,1,1,0A1,1,0,1,1,-1,0Z",
    "M-0.9,-0.9H0.9V0.9H-0.9Z",
    "M0,-1.1L1.1,0.9H-1.1Z",
    "M0,-1.3L1.3,0L0,1.3L-1.3,0Z",
    "M0,1.1L1.1,-0.9H-1.1Z",
    "M-0.4,-1.1H0.4V-0.4H1.1V0.4H0.4V1.1H-0.4V0.4H-1.1V-0.4H-0.4Z",
)
DISTINCT = len(COLORS) * len(DASHES)  # arms that can be told apart
NAME = 17  # pixels that a name beside a line needs
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"


@dataclass(frozen=True)
class Style:
    """How an arm is drawn: no two alike, up to `DISTINCT`."""

    color: str
    dash: tuple[float, ...]
    symbol: str


@dataclass(frozen=True)
class Axis:
    """A scale: its title, the words for its ticks, and from which ratio on it is logarithmic.

    A figure names its scale where that is logarithmic.
    """

    title: str
    text: Callable[[float], str | list[str]]
    log_from: float = 1.6
    base: int = 10
    own_ticks: bool = False  # ticks at the data's own values
    signed: bool = False  # values around 0: never logarithmic
    also: tuple[float, ...] = ()  # values that the scale has besides the data's own

    def scale(self, values: Sequence[float]) -> tuple[alt.Scale, alt.Axis]:
        """The scale around the values, which are positive unless signed, and its axis."""
        values = [*values, *self.also]
        low, high = min(values), max(values)
        log = not self.signed and high / low > self.log_from
        if log:
            air = (high / low) ** 0.04
            low, high = low / air, high * air
        else:
            air = max((high - low) * 0.06, abs(high) * 0.01, 1e-3)
            low, high = low - air, high + air
        at = sorted(set(values)) if self.own_ticks else ticks(low, high, self.base, log)
        # The words are looked up by position: languages spell numbers differently.
        words = json.dumps([self.text(value) for value in at])
        axis = alt.Axis(
            title=f"{self.title}, {LOG}" if log else self.title,
            values=at,
            labelExpr=f"{words}[indexof({json.dumps(at)}, datum.value)]",
            labelOverlap="greedy",
        )
        return alt.Scale(type="log" if log else "linear", domain=[low, high], nice=False), axis


def ticks(low: float, high: float, base: int, log: bool) -> list[float]:
    """A handful of round values within a range: in base 2 powers of two, in base 10 1, 2, 5."""
    if log and base == 2:
        powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        return [2.0**power for power in powers[:: math.ceil(len(powers) / 9)]] if powers else []
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        choices = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,))
        series = ([step * 10.0**power for power in powers for step in steps] for steps in choices)
        inside = [[value for value in values if low <= value <= high] for values in series]
        return next((values for values in inside if len(values) <= 8), inside[-1])
    rough = (high - low) / 6
    unit = base ** math.floor(math.log(rough, base))
    step = next(unit * k for k in ((1, 2) if base == 2 else (1, 2, 5, 10)) if unit * k >= rough)
    return [
        round(k * step, 12) + 0.0 for k in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]


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
    legend: bool = False,
    ink: str = "currentColor",
) -> Drawing | None:
    """One line per arm of `look`, with its interval as a band; None where there is none to draw.

    More arms than colours have no bands, which would cover one another.

    Args:
        points: arm, x, y, low and high (or None); all else is told by the tip.
        about: what a reader who cannot see the figure should know.
        rules: x positions (training lengths) marked by a vertical rule.
        level: a y position (chance) marked by a horizontal rule.
        named: name the arms at the right, beside the ends of their lines; makes a figure of many
            arms as high as their names.
    """

    def drawable(value: Any) -> bool:
        return finite(value) and (y.signed or value > 0)

    points = [p for p in points if p["arm"] in look and p["x"] > 0 and drawable(p["y"])]
    if not points:
        return None
    arms = [arm for arm in look if any(point["arm"] == arm for point in points)]
    marks = [{"x": rule, "text": f"trained at {rule:,}"} for rule in rules]
    x_scale, x_axis = x.scale([point["x"] for point in [*points, *marks]])
    drawn = ("y", "low", "high") if len(arms) <= len(COLORS) else ("y",)
    seen = [point[name] for point in points for name in drawn]
    y_scale, y_axis = y.scale([value for value in seen if drawable(value)])
    y_axis.title, y_axis.grid = None, True
    height = max(height, NAME * len(arms)) if named else height
    across, up = alt.X("x:Q", scale=x_scale, axis=x_axis), alt.Y("y:Q", scale=y_scale, axis=y_axis)

    bottom = y_scale.domain[0]  # where an interval reaches below all there is to see
    sure = [point for point in points if finite(point["low"]) and finite(point["high"])]
    bands = [point | {"low": max(point["low"], bottom)} for point in sure if "low" in drawn]
    symbols: dict[str, Any] = {"symbolSize": 80, "symbolOpacity": 1, "symbolStrokeWidth": 0}
    symbols["symbolLimit"] = 0  # by default a long legend ends in "6 entries"
    key = alt.Legend(title=None, orient="bottom", columns=4, **symbols) if legend else None

    def scale(field: str) -> alt.Scale:
        return alt.Scale(domain=arms, range=[getattr(look[arm], field) for arm in arms])

    color = alt.Color("arm:N", legend=key, sort=None, scale=scale("color"))
    shape = alt.Shape("arm:N", legend=key, sort=None, scale=scale("symbol"))
    dash = alt.StrokeDash("arm:N", legend=None, sort=None, scale=scale("dash"))
    tip = [alt.Tooltip(f"{name}:N") for name in points[0] if name not in ("x", "y", "low", "high")]
    base = alt.Chart(alt.Data(values=list(points))).encode(x=across, y=up, color=color)
    trained = alt.Chart(alt.Data(values=marks)).encode(x=across)
    dots = {"filled": True, "size": 56, "opacity": 1}
    layers = [
        trained.mark_rule(color=ink, opacity=0.5, strokeDash=[3, 3]),
        trained.mark_text(color=ink, opacity=0.8, fontSize=11.5).encode(
            y=alt.value(-8), text="text:N"
        ),
        alt.Chart(alt.Data(values=bands))
        .mark_area(opacity=0.17)
        .encode(across, alt.Y("low:Q", scale=y_scale, axis=y_axis), alt.Y2("high:Q"), color),
        base.mark_line(strokeWidth=2.4).encode(strokeDash=dash),
        base.mark_point(**dots).encode(shape=shape, tooltip=tip),
    ]
    if level is not None:
        chance = alt.Chart(alt.Data(values=[{"y": level}])).encode(y=up)
        layers.append(chance.mark_rule(color=ink, opacity=0.8, strokeDash=[2, 3]))
    if named:
        ends = alt.Chart(alt.Data(values=_ends(points, arms, y_scale, height)))
        ends = ends.encode(x=alt.value("width"), y=up)
        dot = ends.mark_point(**dots, xOffset=12).encode(color=color, shape=shape)
        text = ends.mark_text(align="left", xOffset=21, color=ink, fontSize=12.5, limit=230)
        layers += [
            dot.properties(name="end"),
            text.encode(text="text:N").properties(name="ends"),
        ]
    return alt.layer(*layers).properties(
        width=width,
        height=height,
        description=about,
        title=alt.Title(
            y.title,
            subtitle=LOG if y_scale.type == "log" else alt.Undefined,
            offset=26 if marks else 12,
        ),
    )


def grid(
    values: Sequence[Spec], arms: Sequence[str], x: Axis, *, about: str = "", ink: str
) -> Drawing:
    """A cell per arm and length, for more arms than lines could tell apart.

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
    up = alt.Y("arm:N", sort=list(arms), title=None, axis=alt.Axis(labelLimit=230))
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
        text = arm if stop == end else f"{arm}, to {stop:,.0f}"
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
