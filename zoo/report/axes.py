"""The axes of figures: scales, round ticks and the words on them."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import altair as alt

LOG = "log scale"


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
    most: int = 9  # round ticks, of which a narrow figure has room for fewer

    def scale(self, values: Sequence[float]) -> tuple[alt.Scale, alt.Axis]:
        """The scale around the values, which are positive unless signed, and its axis."""
        values = [*values, *self.also]
        low, high = min(values), max(values)
        log = not self.signed and high / low > self.log_from
        if log:
            air = (high / low) ** 0.04
            low, high = low / air, min(high * air, sys.float_info.max)
        else:
            air = max((high - low) * 0.06, abs(high) * 0.01, 1e-3)
            low, high = low - air, high + air
        at = sorted(set(values)) if self.own_ticks else ticks(low, high, self.base, log, self.most)
        # The words are looked up by position: languages spell numbers differently.
        words = json.dumps([self.text(value) for value in at])
        axis = alt.Axis(
            title=f"{self.title}, {LOG}" if log else self.title,
            values=at,
            labelExpr=f"{words}[indexof({json.dumps(at)}, datum.value)]",
            labelOverlap="greedy",
        )
        return alt.Scale(type="log" if log else "linear", domain=[low, high], nice=False), axis


def ticks(low: float, high: float, base: int, log: bool, most: int = 9) -> list[float]:
    """At most so many round values in a range: in base 2 powers of two, in base 10 1, 2, 5."""
    if log and base == 2:
        powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        return [2.0**power for power in powers[:: math.ceil(len(powers) / most)]] if powers else []
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        choices = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,))
        series = (
            [float(f"{step}e{power}") for power in powers for step in steps] for steps in choices
        )
        inside = [[value for value in values if low <= value <= high] for values in series]
        return next((values for values in inside if len(values) < most), inside[-1])
    rough = (high - low) / (most * 2 / 3)
    unit = base ** math.floor(math.log(rough, base))
    step = next(unit * k for k in ((1, 2) if base == 2 else (1, 2, 5, 10)) if unit * k >= rough)
    return [
        round(k * step, 12) + 0.0 for k in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]
