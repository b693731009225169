"""The noise floor: by how much two trainings of one arm differ, where nothing but the seed does.

What two arms differ by is a result only where it is more. The standard deviation over seeds is
pooled over all arms with several; of two means of k seeds the difference then exceeds
t sqrt(2 / k) times it once in 20 (Student's t, two-sided, with the pooled degrees of freedom).
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
    seeds: int  # of each of two arms: the fewest that an arm has here
    arms: int  # with several seeds, from which it is known

    @property
    def source(self) -> str:
        """What it rests on, in words."""
        each = f"{self.seeds} seed{'s' if self.seeds > 1 else ''} each"
        return f"{each}, from {self.arms} arm{'s' if self.arms > 1 else ''}"


def noise_floors(cells: Cells) -> dict[int, Floor]:
    """Length -> the floor there, at the lengths where an arm has several seeds that differ."""
    found: dict[int, Floor] = {}
    for length in next(iter(cells.values()), {}):
        column = [mine[length] for mine in cells.values() if mine[length].seeds]
        several = [(cell.seeds - 1, cell.spread) for cell in column if cell.spread is not None]
        freedom = sum(free for free, _ in several)
        if not any(spread for _, spread in several):
            continue
        pooled = math.sqrt(sum(free * spread**2 for free, spread in several) / freedom)
        fewest = min(cell.seeds for cell in column)
        value = student(freedom) * pooled * math.sqrt(2 / fewest)
        found[length] = Floor(value, fewest, len(several))
    return found


def score_noise(results: Results, protocol: str) -> dict[int, Floor]:
    """The floors of bits per byte."""
    return noise_floors(results.cells("perplexity", "bits_per_byte", protocol=protocol))


def is_noise(cell: Cell, floor: Floor | None) -> bool:
    """Whether a difference is no larger than the seed alone makes."""
    return floor is not None and cell.value is not None and abs(cell.value) <= floor.value


def noise_words(cells: Cells, text: Callable[[float], str]) -> str:
    """The largest floor of a figure, for its title; nothing where none is known."""
    floors = [floor.value for floor in noise_floors(cells).values()]
    return f", noise floor {text(max(floors))}" if floors else ""
