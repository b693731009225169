"""The noise floor: by how much two trainings of one arm differ, where nothing but the seed does.

What two arms differ by is a result only where it is more. The standard deviation over seeds is
pooled over all arms with several; of two means of k seeds the difference then exceeds
t sqrt(2 / k) times it once in 20 (Student's t, two-sided, with the pooled degrees of freedom).
The floor is given for arms of several seeds; a difference of fewer is held against a higher one.
Arms that are the same trainings, read in several ways, vary together and count as one; where all
are, there is no floor.

An arm whose bits per byte break at a length breaks by much more or less from seed to seed, and says
nothing of how sure the others are. It sets no floor where those of a seed are more than `SHARE`
above the same seed's at the training length, the bound of the effective context too; nor does an
arm that has not learned, whose seeds all score like a guess. What is compared with either is held
against the floor of all, where that is higher. Every other arm counts, however much its seeds
differ. Where none is left, or nothing was measured at the training length, the broken ones count
too. Of shares of right answers none is left out: whether a task is learned is a matter of the seed
for any arm, also for those whose few seeds all learned it.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zoo.measurement import Form
from zoo.report.learned import never_learned
from zoo.report.rows import SHARE, Cell, Cells, Results
from zoo.report.statistics import student
from zoo.report.words import FORMS

NOISE_FLOOR = "noise floor"  # the name of its row in a table
NOISE = "noise"  # the kind of a difference below it


@dataclass(frozen=True)
class Floor:
    """The difference that the seed alone makes, in the unit of what was measured."""

    value: float
    seeds: int  # of each of two arms: the fewest of those that have several
    arms: int  # with several seeds, from which it is known
    single: bool = False  # whether another arm has one seed
    outlying: frozenset[str] = frozenset()  # the arms that broke or have not learned
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
    """The noise floors of what was measured; of scores those of the arms that learned and hold."""
    if form != "score":
        return noise_floors(cells)
    broken = {
        label: broken_at(mine, results.train_length(label) or 0) for label, mine in cells.items()
    }
    return noise_floors(cells, never_learned(results), broken)


def broken_at(mine: Mapping[int, Cell], train: int) -> set[int]:
    """The lengths beyond the training length at which the bits per byte of any seed are more than
    `SHARE` above its own at the training length; none where it was not measured there."""
    own = mine[train].values if train in mine else {}
    return {
        length
        for length, cell in mine.items()
        if length > train
        and any(cell.values[one] > (1 + SHARE) * own[one] for one in cell.values.keys() & own)
    }


def noise_floors(
    cells: Cells,
    unlearned: Collection[str] = (),
    broken: Mapping[str, Collection[int]] | None = None,
) -> dict[int, Floor]:
    """Length -> the floor there, at the lengths where an arm has several seeds that differ.

    Args:
        unlearned: the arms that have not learned.
        broken: the lengths at which arms are broken.
    """
    found: dict[int, Floor] = {}
    for length in next(iter(cells.values()), {}):
        column = {label: mine[length] for label, mine in cells.items() if mine[length].seeds}
        if len(column) > 1 and len(_by_trainings(column.values())) == 1:
            continue  # the same trainings in several ways: what they differ by is no training's
        several = {label: cell for label, cell in column.items() if cell.spread is not None}
        beyond = {label for label, lengths in (broken or {}).items() if length in lengths}
        for apart in ({*unlearned} | beyond, {*unlearned}):
            setting = {label: cell for label, cell in several.items() if label not in apart}
            if any(cell.spread for cell in setting.values()):
                fewest = min(cell.seeds for cell in several.values())
                value, whole = (_floor(arms, fewest) for arms in (setting, several))
                single = any(cell.seeds == 1 for cell in column.values())
                outlying = frozenset(column.keys() & apart)
                whole = max(value, whole)
                found[length] = Floor(value, fewest, len(setting), single, outlying, whole)
                break
    return found


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
