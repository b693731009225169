"""Numbers in words: how tables, figures and the terminal print them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from zoo.measurement import Form, Quantity
from zoo.report.rows import Cell
from zoo.report.statistics import missing

HUGE = 1e6  # from here on numbers are printed as 1.23e+06: digits would say nothing
TIMES, DASH, AT_LEAST, PLUS_MINUS = "\u00d7", "\u2013", "\u2265", "\u00b1"


def short(number: float) -> str:
    """1024 -> "1k", 2**20 -> "1M": lengths, which are mostly powers of two."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if number >= unit and number % (unit / 4) == 0:
            return f"{number / unit:g}{letter}"
    return f"{number:,.0f}" if number < 1e15 else f"{number:.3g}"


def count(number: float) -> str:
    """Three significant digits: 12345.6 -> "12,300", 4.45e10 -> "44.5 G", 0.1234 -> "0.123"."""
    digits = f"{number:.3g}"
    power, letter = _scale(abs(float(digits)))
    if power < 6:
        return f"{float(digits):,.0f}" if abs(number) >= 100 else digits
    return f"{number / 10**power:.3g} {letter}"


def size(number: float) -> str:
    """Bytes for people: 3 * 2**20 -> "3 MiB"."""
    units, number = ("B", "KiB", "MiB", "GiB", "TiB"), max(number, 0)  # growth may be less
    power = next((i for i in range(4) if number < 1000 * 1024**i), 4)
    return f"{count(number / 1024**power)} {units[power]}"


def operations(number: float) -> str:
    """2.5e8 -> "250 MFLOP"."""
    power, letter = _scale(number)
    return f"{number / 10**power:.4g} {letter}FLOP"


def _scale(number: float) -> tuple[int, str]:
    """The power of a thousand that a number is written in, with its letter."""
    scales = ((12, "T"), (9, "G"), (6, "M"), (3, "k"))
    return next(
        ((power, letter) for power, letter in scales if 10**power <= number < math.inf), (0, "")
    )


def score(number: float) -> str:
    """Bits per byte."""
    return f"{number:.3f}" if abs(number) < HUGE else f"{number:.3g}"


def signed(number: float) -> str:
    """A change or difference in bits per byte."""
    return f"{number:+.3f}" if abs(number) < HUGE else f"{number:+.3g}"


def share(number: float) -> str:
    """0.1 -> "10%", 0.0001 -> "0.01%"."""
    whole = 0.01 <= number < HUGE or not number
    return f"{100 * number:.0f}%" if whole else f"{100 * number:.2g}%"


def plain(value: object) -> str:
    """A value as it is, with thousands; a dash for none."""
    if missing(value):
        return DASH
    return f"{value:,}" if isinstance(value, int) else str(value)


def times(length: float, train: int | None) -> str:
    """A length as a multiple of the training length: "4×"."""
    return f"{length / train:.3g}{TIMES}" if train else ""


def plus_minus(cell: Cell) -> str:
    """The interval of bits per byte."""
    return f"{PLUS_MINUS}{score(cell.half)}" if cell.half else ""


def from_to(cell: Cell) -> str:
    """The interval of a share, which is not symmetric."""
    return ends(cell, lambda value: share(min(1.0, max(0.0, value))))


def ends(cell: Cell, text: Callable[[float], str]) -> str:
    """The interval as its two ends: a value of any kind need not be symmetric in it.

    What is known exactly, as the bytes of a state, has none.
    """
    if cell.low is None or cell.high is None or cell.low == cell.high:
        return ""
    return f"{text(cell.low)}{DASH}{text(cell.high)}"


@dataclass(frozen=True)
class Words:
    """How numbers of a form are printed: the value, and its interval beside it."""

    text: Callable[[float], str]
    sure: Callable[[Cell], str]


FORMS: dict[Form, Words] = {
    "score": Words(score, plus_minus),
    "share": Words(share, from_to),
    "count": Words(count, lambda cell: ends(cell, count)),
    "bytes": Words(size, lambda cell: ends(cell, size)),
}


def caption(quantity: Quantity) -> str:
    """A quantity in words: "Forward, tokens per second (higher is better)"."""
    said = f"{quantity.name[0].upper()}{quantity.name[1:]}"
    said += f", {quantity.unit}" if quantity.unit else ""
    return said + (f" ({quantity.better} is better)" if quantity.better else "")
