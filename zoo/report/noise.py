"""The noise floor: by how much two trainings of one arm differ, where nothing but the seed does.

What two arms differ by is a result only where it is more. The standard deviation over seeds is
pooled over all arms with several; of two means of k seeds the difference then exceeds
t sqrt(2 / k) times it once in 20 (Student's t, two-sided, with the pooled degrees of freedom).
The floor is given for arms of several seeds; a difference of fewer is held against a higher one.
Arms that are the same trainings, read in several ways, vary together and count as one; where all
are, there is no floor.

An arm whose bits per byte break at a length breaks by much more or less from seed to seed, and says
nothing of how sure the others are. Where an arm's deviation is over `OUTLYING` times that of all
steadier ones, half of the arms at least, it is left out, as is one that has not learned, whose
seeds all score like a guess; what is compared with it is held against the floor of all, where that
is higher. Of shares of right answers none is left out: whether a task is learned is a matter of the
seed for any arm, also for those whose few seeds all learned it.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zoo.measurement import Form
from zoo.report.learned import never_learned
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
        if self.whole > self.value:
            times = self.whole / self.value
            said += f"; {times:.1f} times it against {', '.join(sorted(self.outlying))}"
        return f"{said}; {self.of(1) / self.value:.1f} times it for one seed" * self.single or said

    def of(self, seeds: int, *arms: str) -> float:
        """The floor of a difference between means of so many seeds, or of more, of these arms."""
        value = self.whole if self.outlying.intersection(arms) else self.value
        return value * math.sqrt(self.seeds / max(1, min(seeds, self.seeds)))


def floors_of(results: Results, cells: Cells, form: Form) -> dict[int, Floor]:
    """The noise floors of what was measured, of scores without the arms that have not learned."""
    return noise_floors(cells, form, never_learned(results) if form == "score" else ())


def noise_floors(cells: Cells, form: Form, unlearned: Collection[str] = ()) -> dict[int, Floor]:
    """Length -> the floor there, at the lengths where an arm has several seeds that differ.

    Args:
        form: of the values: a "score" is bits per byte.
        unlearned: the arms that have not learned.
    """
    found: dict[int, Floor] = {}
    for length in next(iter(cells.values()), {}):
        column = {label: mine[length] for label, mine in cells.items() if mine[length].seeds}
        if len(column) > 1 and len(_by_trainings(column.values())) == 1:
            continue  # the same trainings in several ways: what they differ by is no training's
        several = {label: cell for label, cell in column.items() if cell.spread is not None}
        learned = {label: cell for label, cell in several.items() if label not in unlearned}
        if not any(cell.spread for cell in learned.values()):
            continue
        alike = _alike(learned) if form == "score" else learned
        fewest = min(cell.seeds for cell in several.values())
        value, whole = (_floor(arms, fewest) for arms in (alike, several))
        single = any(cell.seeds == 1 for cell in column.values())
        outlying = frozenset(several.keys() - alike.keys())
        found[length] = Floor(value, fewest, len(alike), single, outlying, max(value, whole))
    return found


def _alike(several: Mapping[str, Cell]) -> dict[str, Cell]:
    """The arms whose seeds differ by about as much: the steadier half, and on from there.

    It is half of the trainings too: one arm that is read in many ways is no half of several.
    """
    ordered = sorted(several.items(), key=lambda pair: pair[1].spread or 0.0)
    size, groups = max(2, math.ceil(len(ordered) / 2)), len(_by_trainings(several.values()))
    least = min(groups, max(2, math.ceil(groups / 2)))
    while len(_by_trainings(cell for _, cell in ordered[:size])) < least:
        size += 1
    alike = dict(ordered[:size])
    for label, cell in ordered[len(alike) :]:
        others, _ = _pooled(alike)
        if others and (cell.spread or 0.0) > OUTLYING * others:
            break
        alike[label] = cell
    return alike


def _pooled(several: Mapping[str, Cell]) -> tuple[float, int]:
    """The standard deviation of all arms together, and its degrees of freedom."""
    parts, every = [], 0
    for trainings, cells in _by_trainings(several.values()):
        freedom = sum(cell.seeds - 1 for cell in cells)
        alone = (math.sqrt((cell.seeds - 1) / freedom) * (cell.spread or 0.0) for cell in cells)
        own = max(1, len(trainings) - 1) if trainings else freedom
        parts.append(math.sqrt(own) * math.hypot(*alone))  # no overflow
        every += own
    return math.hypot(*parts) / math.sqrt(every), every


def _by_trainings(cells: Iterable[Cell]) -> list[tuple[frozenset[Any], list[Cell]]]:
    """The cells by the trainings that they are of; those that have some in common together."""
    groups: list[tuple[frozenset[Any], list[Cell]]] = []
    for cell in cells:
        same = [group for group in groups if group[0] & cell.trainings]
        groups = [group for group in groups if group not in same]
        trainings = cell.trainings.union(*(group[0] for group in same))
        groups.append((trainings, [one for group in same for one in group[1]] + [cell]))
    return groups


def _floor(several: Mapping[str, Cell], seeds: int) -> float:
    deviation, freedom = _pooled(several)
    return student(freedom) * deviation * math.sqrt(2 / seeds)


def is_noise(cell: Cell, floor: Floor | None, *arms: str) -> bool:
    """Whether a difference between these arms is no larger than the seed alone makes."""
    if floor is None or cell.value is None:
        return False
    return abs(cell.value) <= floor.of(cell.seeds, *arms)


def noise_words(floors: Mapping[int, Floor], form: Form) -> str:
    """The largest floor of a figure, for its title; nothing where none is known."""
    values = [floor.value for floor in floors.values()]
    return f", noise floor {FORMS[form].text(max(values))}" if values else ""
