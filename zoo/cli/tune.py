"""Tune every arm of a sweep: `zoo tune experiment=state_tracking`, or any options of `train -m`.

The learning rates of an arm (`optim.lr=1e-3,2e-3,...`) compete by successive halving on the first
seed: at a quarter and at half of the steps a rate goes on only if its validation loss is in the
better half of those that came so far (Li 2020, "A System for Massively Parallel Hyperparameter
Tuning", arXiv 1810.05934; Optuna's pruner). The other seeds are trained at the best rate alone. The
same command again continues where it stopped; what finished is not trained twice.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.cli.arms import Arm, composed_arms, run_arm
from zoo.cli.guard import guarded
from zoo.cli.train import check, job
from zoo.config.schema.train import TrainConfig
from zoo.console import label, say
from zoo.errors import refuse_path
from zoo.runs.folder import RunFolder
from zoo.runs.identity import identity, run_name
from zoo.runs.metrics import read_metrics

USAGE = """
zoo tune experiment=<name> [option=value,value ...]    find the best learning rate of each arm

  zoo tune experiment=state_tracking
  zoo tune model=transformer,mamba optim.lr=5e-4,1e-3,2e-3,4e-3 seed=0,1,2 trainer.max_steps=400

takes the options of `zoo train -m`; needs Optuna: pip install 'zoo[tune]'
"""
FACTOR = 2  # of the rates at a rung, one in so many goes on
FIRST = 4  # the first rung is at this fraction of the steps


@dataclass
class Tuned:
    """An arm over its rates and seeds, and what was trained of it: (rate, seed) -> its outcome."""

    name: str
    configs: dict[tuple[float, int], TrainConfig]
    outcomes: dict[tuple[float, int], Arm] = field(default_factory=dict)
    best: float | None = None

    @property
    def rates(self) -> list[float]:
        """From the middle outwards: the likeliest first, so that the others have a good rival."""
        rates = sorted({rate for rate, _ in self.configs})
        middle = (len(rates) - 1) / 2
        return sorted(rates, key=lambda rate: abs(rates.index(rate) - middle))

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.configs})


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and train all arms; returns the exit code, 1 where an arm has no rate that works."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or {"-h", "--help"} & {*words}:
        sys.stdout.write(USAGE.lstrip())
        return 0
    return guarded("zoo tune", lambda: tune(words))


def tune(words: list[str]) -> int:
    """Carry the command out; see the module."""
    return tune_arms(group(composed_arms("train", words, check)))


def tune_arms(arms: Sequence[Tuned]) -> int:
    """Tune and train the arms, then list them; the exit code."""
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        refuse_path(
            "optuna",
            "is not installed, and zoo tune needs it",
            "Run pip install 'zoo[tune]', or train the whole grid: zoo train -m with these options",
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for number, arm in enumerate(arms, 1):
        label(f"[{number}/{len(arms)} {arm.name}] ")
        try:
            halve(arm, optuna)
        finally:
            label("")
    say(table(arms))
    return int(any(arm.best is None for arm in arms))


def group(composed: Sequence[tuple[list[str], TrainConfig]]) -> list[Tuned]:
    """The arms: configurations that differ in rate and seed alone are one.

    Named by the options in which they differ from each other.
    """
    tuned = ("optim.lr=", "seed=")
    words = [[w for w in line if not w.startswith(tuned)] for line, _ in composed]
    common = set.intersection(*map(set, words))
    arms: dict[str, Tuned] = {}
    for line, (_, config) in zip(words, composed, strict=True):
        key = {k: v for k, v in identity(config).items() if k not in ("optim.lr", "seed")}
        name = (
            " ".join(w.removeprefix("model=") for w in line if w not in common) or config.model.name
        )
        arm = arms.setdefault(str(key), Tuned(name, {}))
        arm.configs[config.optim.lr, config.seed] = config
    return [*arms.values()]


def halve(arm: Tuned, optuna: Any) -> None:
    """Let the rates of an arm compete on the first seed, then train the other seeds at the best."""
    steps, first = next(iter(arm.configs.values())).trainer.max_steps, arm.seeds[0]
    least = max(1, steps // FIRST)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=FACTOR)
    study = optuna.create_study(pruner=pruner)
    for rate in arm.rates:
        trial = study.ask()
        outcome = arm.outcomes[rate, first] = Arm(len(arm.outcomes) + 1, arm.name, "tune", first)
        config, loss = arm.configs[rate, first], None
        for rung in rungs(least, steps):
            loss = advance(config, outcome, rung)
            if loss is None:
                break
            trial.report(loss, rung)
            if rung < steps and trial.should_prune():
                outcome.failed = told = f"pruned at step {rung} of {steps}"
                RunFolder(Path(outcome.folder or "")).update(reason=told, pruned=True)
                say(f"lr={rate:g}: {told}, validation loss {loss:.4f}")
                break
        if loss is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif outcome.failed:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, loss)
            arm.best = rate if loss == study.best_value else arm.best
    if arm.best is None:
        return
    for seed in arm.seeds[1:]:
        outcome = Arm(len(arm.outcomes) + 1, arm.name, "tune", seed)
        arm.outcomes[arm.best, seed] = outcome
        advance(arm.configs[arm.best, seed], outcome, steps)


def rungs(least: int, steps: int) -> Iterator[int]:
    """The steps at which rates are compared, and the last."""
    while least < steps:
        yield least
        least *= FACTOR
    yield steps


def advance(config: TrainConfig, outcome: Arm, until: int) -> float | None:
    """Train a run up to a step; its validation loss there, None where it failed."""
    folder = RunFolder(Path(config.runs) / run_name(config))
    if (known := _loss_at(folder, until)) is not None:
        outcome.folder, outcome.loss = str(folder), known
        return known
    outcome.until = until if until < config.trainer.max_steps else None
    run_arm(outcome, lambda: job(config, outcome))
    outcome.loss = None
    if not outcome.failed:
        outcome.loss = _loss_at(RunFolder(Path(outcome.folder or "")), until)
    if outcome.loss is None:
        outcome.failed = outcome.failed or f"no validation loss at step {until}"
        say(f"lr={config.optim.lr:g} seed={config.seed}: {outcome.failed}")
    return outcome.loss


def _loss_at(folder: RunFolder, step: int) -> float | None:
    if not (folder.path / "metrics.csv").is_file() or folder.info["step"] < step:
        return None
    rows = read_metrics(folder.path / "metrics.csv")
    found = [row["valid_loss"] for row in rows if int(row["step"]) == step and row["valid_loss"]]
    return float(found[-1]) if found else None


def table(arms: Sequence[Tuned]) -> str:
    """Arm, rate, seed, validation loss and folder of every run, and what the tuning has cost."""
    rows, notes = [("", "arm", "lr", "seed", "valid loss", "folder")], []
    for arm in arms:
        for (rate, seed), outcome in sorted(arm.outcomes.items()):
            loss = "" if outcome.loss is None else f"{outcome.loss:.4f}"
            loss = f"{loss} {outcome.failed}".strip() if outcome.failed else loss
            best = "*" if rate == arm.best else ""
            rows.append((best, arm.name, f"{rate:g}", str(seed), loss, outcome.folder or ""))
        if arm.best is not None:
            done = [
                RunFolder(Path(o.folder)).info["step"] for o in arm.outcomes.values() if o.folder
            ]
            steps = next(iter(arm.configs.values())).trainer.max_steps
            ratio = sum(done) / (steps * len(arm.seeds))
            notes.append(
                f"{arm.name}: best of {len(arm.rates)} rates is {arm.best:g}; tuning took "
                f"{ratio:.2f} times the steps of that rate's {len(arm.seeds)} seeds"
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join([*lines, "* the arm's best rate", *notes])


if __name__ == "__main__":
    sys.exit(main())
