"""Learning rates: of an arm trained at several, the best by validation stands for it.

What is reported is then measured on other text or other examples than the choice was made by. The
other rates keep their place in a table of their own, which shows how much the rate matters.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zoo.report.labels import settings_apart
from zoo.report.statistics import finite

Row = dict[str, Any]

VALIDATED_ON = ("fingerprint", "valid_windows")  # losses on one text are not those on another


@dataclass(frozen=True)
class Rate:
    """A learning rate of an arm, with the validation losses of the seeds trained to the end."""

    arm: str
    lr: float
    losses: tuple[float, ...]
    ended: str = ""  # why none was: "pruned at step 150 of 600"
    chosen: bool = False
    runs: tuple[Any, ...] = ()

    @property
    def loss(self) -> float | None:
        """The mean over the seeds."""
        return sum(self.losses) / len(self.losses) if self.losses else None


def choose_rates(
    rows: Iterable[Row], runs: Iterable[Row]
) -> tuple[list[Row], list[Row], list[Rate]]:
    """Leave out the rows and runs of all rates of an arm but its best; and all rates.

    An arm's best rate is the one that most seeds were trained to the end with, of several such the
    one of the lowest mean validation loss ("valid_loss" of a run's record). Runs whose records have
    no validation loss, and arms of a single rate, stay as they are.
    """
    rows, runs = [*rows], [*runs]
    tried = [
        run
        for run in runs
        if run.get("lr") is not None and isinstance(run.get("settings"), Mapping)
    ]
    texts: dict[Any, set[Any]] = defaultdict(set)
    for run, field in itertools.product(tried, VALIDATED_ON):
        texts[_arm(run), field] |= {run[field]} if run.get(field) else set()
    groups: dict[Any, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for run in tried:
        arm = _arm(run)
        read = [run.get(name) if len(texts[arm, name]) > 1 else None for name in VALIDATED_ON]
        groups[arm, *read][run["lr"]].append(run)
    others: set[Any] = set()
    every: list[Rate] = []
    named = settings_apart(tried, VALIDATED_ON)
    for group in groups.values():
        label = named[next(iter(group.values()))[0]["run"]]
        rates = [_rate(label, lr, mine) for lr, mine in sorted(group.items())]
        finished = [rate for rate in rates if rate.losses]
        if len(rates) < 2 or not finished:
            continue
        best = min(finished, key=lambda rate: (-len(rate.losses), rate.loss))
        others |= {run["run"] for lr, mine in group.items() if lr != best.lr for run in mine}
        every += [replace(rate, chosen=rate is best) for rate in rates]
    rows = [row for row in rows if row.get("run") not in others]
    return rows, [run for run in runs if run.get("run") not in others], every


def _arm(run: Row) -> str:
    """What is the same for all rates and seeds of an arm."""
    settings = {k: v for k, v in run["settings"].items() if k != "optim.lr"}
    return repr([run.get("arm"), sorted(settings.items(), key=lambda item: item[0])])


def _rate(label: str, lr: float, runs: Sequence[Row]) -> Rate:
    done = [run for run in runs if run.get("status") == "done"]
    losses = [run["valid_loss"] for run in done if finite(run.get("valid_loss"))]
    why = next((str(run.get("reason")) for run in runs if run.get("status") != "done"), "")
    return Rate(
        label, lr, tuple(losses), "" if losses else why, runs=tuple(run["run"] for run in runs)
    )
