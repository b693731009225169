"""The noise floor: by how much two trainings of one arm differ, where nothing but the seed does.

What two arms differ by is a result only where it is more. The standard deviation over seeds is
pooled over all arms with several; of two means of k seeds the difference then exceeds
t sqrt(2 / k) times it once in 20 (Student's t, two-sided, with the pooled degrees of freedom).
The floor is given for arms of several seeds; a difference of fewer is held against a higher one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from zoo.report.rows import Cell, Cells, Results
from zoo.report.statistics import student

NOISE_FLOOR = "noise floor"  # the name of its row in a table
NOISE = "noise"  # the kind of a difference below it


@dataclass(frozen=True)
class Floor:
    """The difference that the seed alone makes, in the unit of what was measured."""

    value: float
    seeds: int  # of each of two arms: the fewest of those that have several
    arms: int  # with several seeds, from which it is known
    single: bool = False  # whether another arm has one seed

    @property
    def source(self) -> str:
        """What it rests on, in words."""
        said = f"{self.seeds} seeds each, from {self.arms} arm{'s' if self.arms > 1 else ''}"
        return f"{said}; {self.of(1) / self.value:.1f} times it for one seed" * self.single or said

    def of(self, seeds: int) -> float:
        """The floor of a difference between means of so many seeds, or of more."""
        return self.value * math.sqrt(self.seeds / max(1, min(seeds, self.seeds)))


def noise_floors(cells: Cells) -> dict[int, Floor]:
    """Length -> the floor there, at the lengths where an arm has several seeds that differ."""
    found: dict[int, Floor] = {}
    for length in next(iter(cells.values()), {}):
        column = [mine[length] for mine in cells.values() if mine[length].seeds]
        several = [(cell.seeds - 1, cell.spread) for cell in column if cell.spread is not None]
        freedom = sum(free for free, _ in several)
        if not any(spread for _, spread in several):
            continue
        pooled = math.hypot(*(math.sqrt(free) * spread for free, spread in several))
        pooled /= math.sqrt(freedom)  # no overflow
        fewest = min(free + 1 for free, _ in several)
        value = student(freedom) * pooled * math.sqrt(2 / fewest)
        found[length] = Floor(value, fewest, len(several), any(c.seeds == 1 for c in column))
    return found


def score_noise(results: Results, protocol: str) -> dict[int, Floor]:
    """The floors of bits per byte."""
    return noise_floors(results.cells("perplexity", "bits_per_byte", protocol=protocol))


def is_noise(cell: Cell, floor: Floor | None) -> bool:
    """Whether a difference is no larger than the seed alone makes."""
    return floor is not None and cell.value is not None and abs(cell.value) <= floor.of(cell.seeds)


def noise_words(cells: Cells, text: Callable[[float], str]) -> str:
    """The largest floor of a figure, for its title; nothing where none is known."""
    floors = [floor.value for floor in noise_floors(cells).values()]
    return f", noise floor {text(max(floors))}" if floors else ""
