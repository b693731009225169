"""Carry out the experiments of the results page, one after another: `zoo study`.

Says what is left of each and how long it takes at the speed of the runs there are, then tunes the
arms of the first that is not finished, and so on. A stopped study goes on where it was.
"""

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from zoo.cli.arms import composed_arms
from zoo.cli.guard import run_program
from zoo.cli.train import check
from zoo.cli.tune import Tuned, add_rate, beyond, group, tune_arms
from zoo.config.groups import choices
from zoo.config.schema.train import TrainConfig
from zoo.console import say
from zoo.errors import choose
from zoo.runs.folder import RunFolder
from zoo.runs.identity import run_name
from zoo.runs.metrics import read_metrics

STUDY = ("state_tracking", "recall", "selective_copying", "mqar", "induction")
USAGE = f"""zoo study [--left] [experiment ...]    tune and train the experiments one after another

  zoo study                    {", ".join(STUDY)}
  zoo study --left recall      say what is left of an experiment, train nothing
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where an arm of an experiment has no rate that works."""
    return run_program("zoo study", USAGE, argv, study)


def study(words: Sequence[str]) -> int:
    """Carry the command out; see the module."""
    names = [word for word in words if word != "--left"] or STUDY
    names = [choose("experiment", name, choices("experiment")) for name in names]
    composed = {
        name: group(composed_arms("train", [f"experiment={name}"], check)) for name in names
    }
    for name, arms in composed.items():
        say(f"{name}: {left(arms)}")
    if "--left" in words:
        return 0
    codes = [tune_arms(arms) for arms in composed.values() if unfinished(arms)]
    return max(codes, default=0)


def left(arms: Sequence[Tuned]) -> str:
    """What is left of an experiment, in words: arms, and at most how many steps and minutes."""
    waiting = unfinished(arms)
    if not waiting:
        return f"all {len(arms)} arms are done"
    steps, seconds = 0, 0.0
    known = [pace for arm in arms for config in arm.configs.values() if (pace := _pace(config))]
    usual = sum(known) / len(known) if known else None
    for arm in waiting:
        own = [pace for config in arm.configs.values() if (pace := _pace(config))]
        mine = _steps_left(arm)
        steps += mine
        seconds += mine * (sum(own) / len(own) if own else usual or 0)
    time = f", {timedelta(seconds=round(seconds))}" if known else ""
    names = ", ".join(arm.name for arm in waiting)
    return f"{len(waiting)} of {len(arms)} arms left ({names}), at most {steps:,} steps{time}"


def unfinished(arms: Sequence[Tuned]) -> list[Tuned]:
    """The arms of which no rate has been trained to its end with every seed."""
    return [arm for arm in arms if _steps_left(arm)]


def _steps_left(arm: Tuned) -> int:
    """Of all rates on the first seed, those that were pruned apart, and one rate's other seeds."""
    total = next(iter(arm.configs.values())).trainer.max_steps
    whole = Tuned(arm.name, dict(arm.configs))
    for edge in (min(arm.rates), max(arm.rates)):  # a rate beyond the grid may be the best
        further = beyond(arm, edge)
        if further:
            add_rate(whole, further)
            if not _info(whole.configs[further, arm.seeds[0]])["step"]:
                whole.configs = {key: c for key, c in whole.configs.items() if key[0] != further}
    arm = whole
    missing = {key: total - _info(config)["step"] for key, config in arm.configs.items()}
    first, *others = arm.seeds
    best = min((sum(missing[rate, seed] for seed in others), rate) for rate in arm.rates)
    competing = (rate for rate in arm.rates if not _info(arm.configs[rate, first]).get("pruned"))
    return best[0] + sum(missing[rate, first] for rate in competing)


def _info(config: TrainConfig) -> dict:
    path = Path(config.runs) / run_name(config)
    return RunFolder.open(path).info if path.is_dir() else {"step": 0}


def _pace(config: TrainConfig) -> float | None:
    """Seconds per step of a run; None before it has any."""
    path = Path(config.runs) / run_name(config)
    rows = read_metrics(path / "metrics.csv") if (path / "metrics.csv").is_file() else []
    speeds = [float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
    return config.batch_size * config.seq_len / speeds[-1] if speeds and speeds[-1] else None


if __name__ == "__main__":
    sys.exit(main())
