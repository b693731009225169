"""Carry out the experiments of the results page, one after another: `zoo study`.

Says what is left of each and how long it takes at the speed of the runs there are, then tunes the
arms of the first, and so on; each ends with its table. A stopped study goes on where it was.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from statistics import mean

from zoo.cli.arms import composed_arms
from zoo.cli.guard import run_program
from zoo.cli.train import check
from zoo.cli.tune import (
    MAX_COST,
    STOPS,
    Tuned,
    UntrainedError,
    folder_of,
    group,
    halve,
    load_optuna,
    metrics_of,
    tune_arms,
)
from zoo.config.groups import choices
from zoo.config.schema.train import TrainConfig
from zoo.console import say
from zoo.errors import choose, refuse_path
from zoo.runs.files import one_line

STUDY = ("state_tracking", "recall", "selective_copying", "mqar", "induction")
USAGE = f"""zoo study [--left] [experiment ...]    tune and train the experiments one after another

  zoo study                    {", ".join(STUDY)}
  zoo study --left recall      say what is left of an experiment, train nothing
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where an arm of an experiment is left without a rate."""
    return run_program("zoo study", USAGE, argv, study)


def study(words: Sequence[str]) -> int:
    """Carry the command out; see the module."""
    names = [word for word in words if word != "--left"] or STUDY
    names = [choose("experiment", name, choices("experiment")) for name in names]
    if repeated := [word for word in words if words.count(word) > 1]:
        refuse_path(repeated[0], "is given twice", "Give it once")
    composed = {
        name: group(composed_arms("train", [f"experiment={name}"], check)) for name in names
    }
    for name, arms in composed.items():
        say(f"{name}: {left(arms)}")
    if "--left" in words:
        return 0
    return max(tune_arms(arms) for arms in composed.values())


def left(arms: Sequence[Tuned]) -> str:
    """What is left of an experiment, in words: arms, and at most how many steps and minutes."""
    waiting = [(arm, *found) for arm in arms if (found := _left(arm))]
    if not waiting:
        return f"all {len(arms)} arms are done"
    known = [pace for arm in arms for pace in _paces(arm)]
    seconds = sum(steps * mean(_paces(arm) or known or [0]) for arm, steps, _ in waiting)
    time = f", {timedelta(seconds=round(seconds))}" if known else ""
    names, steps = ", ".join(arm.name for arm, *_ in waiting), sum(one[1] for one in waiting)
    said = f"{len(waiting)} of {len(arms)} arms left ({names}), at most {steps:,} steps{time}"
    return "\n".join([said, *(f"  {arm.name}: {reason}" for arm, _, reason in waiting if reason)])


def _left(arm: Tuned) -> tuple[int, str] | None:
    """At most how many steps the tuning of an arm takes, and what is damaged; None once it is done.

    That is found by carrying it out on what is there.
    """
    planned, reason = Tuned(arm.name, dict(arm.configs), only_known=True), ""
    try:
        halve(planned, load_optuna())
        return None
    except UntrainedError:
        pass
    except STOPS as error:
        reason = one_line(error)
    first, *others = arm.seeds
    missing = {key: _missing(config) for key, config in planned.configs.items()}
    if planned.found:
        return sum(steps for (rate, _), steps in missing.items() if rate == planned.best), reason
    ended = [rate for (rate, _), one in planned.outcomes.items() if one.failed]
    grid = sum(missing[rate, first] for rate in planned.rates if rate not in ended)
    best = min(sum(missing[rate, seed] for seed in others) for rate in planned.rates)
    spent = sum(arm.steps - steps for steps in missing.values())
    return max(grid + best, MAX_COST * len(arm.seeds) * arm.steps - spent), reason


def _missing(config: TrainConfig) -> int:
    """How many steps a run has left; all where that cannot be read."""
    with suppress(*STOPS):
        return max(0, config.trainer.max_steps - folder_of(config).info["step"])
    return config.trainer.max_steps


def _paces(arm: Tuned) -> list[float]:
    """Seconds per step of each run that has any."""
    return [pace for config in arm.configs.values() if (pace := _pace(config))]


def _pace(config: TrainConfig) -> float | None:
    """Seconds per step of a run; None before it has any."""
    with suppress(*STOPS):
        rows = metrics_of(folder_of(config))
        speeds = [float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
        return config.batch_size * config.seq_len / speeds[-1] if speeds and speeds[-1] else None
    return None


if __name__ == "__main__":
    sys.exit(main())
