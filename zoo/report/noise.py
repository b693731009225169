"""The noise floor: by how much two trainings of one arm differ, where nothing but the seed does.

What two arms differ by is a result only where it is more. The standard deviation over seeds is
pooled over all arms with several; of two means of k seeds the difference then exceeds
t sqrt(2 / k) times it once in 20 (Student's t, two-sided, with the pooled degrees of freedom).
The floor is given for arms of several seeds; a difference of fewer is held against a higher one.

An arm whose bits per byte break at a length breaks by much more or less from seed to seed, and says
nothing of how sure the others are. Where an arm's deviation is over `OUTLYING` times that of all
steadier ones, half of the arms at least, it is left out, and what is compared with it is held
against the floor of all. Of shares of right answers none is left out: whether a task is learned is
a matter of the seed for any arm, also for those whose few seeds all learned it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from zoo.measurement import Form
from zoo.report.rows import Cell, Cells, Results
from zoo.report.statistics import student
from zoo.report.words import FORMS

NOISE_FLOOR = "noise floor"  # the name of its row in a table
NOISE = "noise"  # the kind of a difference below it
OUTLYING = 5.0  # times the deviation of the other arms together


@dataclass(frozen=True)
class Floor:
    """The difference that the seed alone makes, in the unit of what was measured."""

    value: float
    seeds: int  # of each of two arms: the fewest of those that have several
    arms: int  # with several seeds, from which it is known
    single: bool = False  # whether another arm has one seed
    outlying: frozenset[str] = frozenset()  # the arms that it leaves out
    whole: float = 0.0  # the floor of differences from these, where there are any

    @property
    def source(self) -> str:
        """What it rests on, in words."""
        said = f"{self.seeds} seeds each, from {self.arms} arm{'s' if self.arms > 1 else ''}"
        if self.outlying:
            times = self.whole / self.value
            said += f"; {times:.1f} times it against {', '.join(sorted(self.outlying))}"
        return f"{said}; {self.of(1) / self.value:.1f} times it for one seed" * self.single or said

    def of(self, seeds: int, *arms: str) -> float:
        """The floor of a difference between means of so many seeds, or of more, of these arms."""
        value = self.whole if self.outlying.intersection(arms) else self.value
        return value * math.sqrt(self.seeds / max(1, min(seeds, self.seeds)))


def noise_floors(cells: Cells, form: Form) -> dict[int, Floor]:
    """Length -> the floor there, at the lengths where an arm has several seeds that differ.

    Args:
        form: of the values: a "score" is bits per byte.
    """
    found: dict[int, Floor] = {}
    for length in next(iter(cells.values()), {}):
        column = {label: mine[length] for label, mine in cells.items() if mine[length].seeds}
        several = {label: cell for label, cell in column.items() if cell.spread is not None}
        if not any(cell.spread for cell in several.values()):
            continue
        alike = _alike(several) if form == "score" else several
        fewest = min(cell.seeds for cell in several.values())
        value, whole = (_floor(arms, fewest) for arms in (alike, several))
        single = any(cell.seeds == 1 for cell in column.values())
        outlying = frozenset(several.keys() - alike.keys())
        found[length] = Floor(value, fewest, len(alike), single, outlying, whole)
    return found


def _alike(several: Mapping[str, Cell]) -> dict[str, Cell]:
    """The arms whose seeds differ by about as much: the steadier half, and on from there."""
    ordered = sorted(several.items(), key=lambda pair: pair[1].spread or 0.0)
    alike = dict(ordered[: max(2, math.ceil(len(ordered) / 2))])
    for label, cell in ordered[len(alike) :]:
        others, _ = _pooled(alike)
        if others and (cell.spread or 0.0) > OUTLYING * others:
            break
        alike[label] = cell
    return alike


def _pooled(several: Mapping[str, Cell]) -> tuple[float, int]:
    """The standard deviation of all arms together, and its degrees of freedom."""
    freedom = [cell.seeds - 1 for cell in several.values()]
    parts = (
        math.sqrt(free) * (cell.spread or 0.0)
        for free, cell in zip(freedom, several.values(), strict=True)
    )
    return math.hypot(*parts) / math.sqrt(sum(freedom)), sum(freedom)  # no overflow


def _floor(several: Mapping[str, Cell], seeds: int) -> float:
    deviation, freedom = _pooled(several)
    return student(freedom) * deviation * math.sqrt(2 / seeds)


def score_noise(results: Results, protocol: str) -> dict[int, Floor]:
    """The floors of bits per byte."""
    return noise_floors(results.cells("perplexity", "bits_per_byte", protocol=protocol), "score")


def is_noise(cell: Cell, floor: Floor | None, *arms: str) -> bool:
    """Whether a difference between these arms is no larger than the seed alone makes."""
    if floor is None or cell.value is None:
        return False
    return abs(cell.value) <= floor.of(cell.seeds, *arms)


def noise_words(cells: Cells, form: Form) -> str:
    """The largest floor of a figure, for its title; nothing where none is known."""
    floors = [floor.value for floor in noise_floors(cells, form).values()]
    return f", noise floor {FORMS[form].text(max(floors))}" if floors else ""
