"""Tune every arm of a sweep: `zoo tune experiment=state_tracking`, or any options of `train -m`.

The learning rates of an arm (`optim.lr=1e-3,2e-3,...`) compete by successive halving on the first
seed: at a quarter and at half of the steps a rate goes on only if its validation loss is in the
better half of those that came so far (Li 2020, "A System for Massively Parallel Hyperparameter
Tuning", arXiv 1810.05934; Optuna's pruner). One seed can mislead: the two
leading rates are trained with a second one, and the lower mean of the two decides. A best rate on
the edge of the grid gets a neighbour beyond it first. Either is left out, and the table says so,
where tuning would take more than twice the steps of the best rate with all its seeds. The seeds
that remain are trained at the best rate alone. The same command again continues where it stopped;
what finished is not trained twice.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.cli.arms import Arm, composed_arms, run_arm
from zoo.cli.guard import run_program
from zoo.cli.train import check, job
from zoo.config.schema.train import TrainConfig
from zoo.console import label, say
from zoo.errors import UserError, refuse_path
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
MAX_COST = 2  # tuning takes at most so many times the steps of the best rate with all its seeds
FIRST = 4  # the first rung is at this fraction of the steps


@dataclass
class Tuned:
    """An arm over its rates and seeds, and what was trained of it: (rate, seed) -> its outcome."""

    name: str
    configs: dict[tuple[float, int], TrainConfig]
    outcomes: dict[tuple[float, int], Arm] = field(default_factory=dict)
    best: float | None = None
    reached: dict[float, int] = field(default_factory=dict)  # rate -> its last rung, first seed

    @property
    def rates(self) -> list[float]:
        """From the middle outwards: the likeliest first, so that the others have a good rival.

        Of two as far from it the larger: grids end too low more often than too high, and steps
        saved on the smaller ones pay for a rate beyond.
        """
        rates = sorted({rate for rate, _ in self.configs})
        middle = (len(rates) - 1) / 2
        return sorted(rates, key=lambda rate: (abs(rates.index(rate) - middle), -rate))

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.configs})

    @property
    def steps(self) -> int:
        return next(iter(self.configs.values())).trainer.max_steps

    @property
    def spent(self) -> int:
        """The steps of all runs so far."""
        total = 0
        for (rate, seed), one in self.outcomes.items():
            known = RunFolder(Path(one.folder)).info["step"] if one.folder else 0
            pruned = seed == self.seeds[0] and (one.failed or "").startswith("pruned")
            total += self.reached[rate] if pruned else known
        return total

    def ranking(self, seeds: Sequence[int]) -> list[float]:
        """The rates trained to the end with all these seeds, lowest mean validation loss first."""
        means = {}
        for rate in self.rates:
            runs = [self.outcomes.get((rate, seed)) for seed in seeds]
            losses = [run.loss for run in runs if run and not run.failed and run.loss is not None]
            if len(losses) == len(seeds):
                means[rate] = sum(losses) / len(losses)
        return sorted(means, key=means.__getitem__)


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and train all arms; returns the exit code, 1 where an arm has no rate that works."""
    words = sys.argv[1:] if argv is None else list(argv)
    return run_program("zoo tune", USAGE.lstrip(), words, tune)


def tune(words: list[str]) -> int:
    """Carry the command out; see the module."""
    if not words:
        raise UserError("experiment=: must be given. See zoo tune --help.")
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
    """Find the arm's best rate, and train every seed at it; see the module."""
    steps, first = arm.steps, arm.seeds[0]
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=max(1, steps // FIRST), reduction_factor=FACTOR
    )
    study = optuna.create_study(pruner=pruner)
    for rate in arm.rates:
        compete(arm, rate, study, optuna)
    arm.best = next(iter(arm.ranking([first])), None)
    if arm.best is None:
        return
    others = arm.seeds[1:]
    if (further := beyond(arm, arm.best)) and affordable(arm, 1 + len(others)):
        say(f"lr={arm.best:g} is the best and at the edge of the grid: trying {further:g} too")
        add_rate(arm, further)
        compete(arm, further, study, optuna)
        arm.best = arm.ranking([first])[0]
    rival = runner_up(arm, arm.best)
    if others and rival and affordable(arm, 2 + len(others), arm.reached[rival]):
        finish(arm, rival)
        for rate in (arm.best, rival):
            train(arm, rate, others[0])
        arm.best = next(iter(arm.ranking(arm.seeds[:2])), arm.best)
    for seed in others:
        train(arm, arm.best, seed)


def compete(arm: Tuned, rate: float, study: Any, optuna: Any) -> None:
    """Train a rate on the first seed, as far as it keeps up with the others."""
    steps, first = arm.steps, arm.seeds[0]
    trial, loss = study.ask(), None
    outcome = arm.outcomes[rate, first] = Arm(len(arm.outcomes) + 1, arm.name, "tune", first)
    for rung in rungs(max(1, steps // FIRST), steps):
        loss = advance(arm.configs[rate, first], outcome, rung)
        if loss is None:
            break
        arm.reached[rate] = rung
        trial.report(loss, rung)
        if rung < steps and trial.should_prune():
            outcome.failed = message = f"pruned at step {rung} of {steps}"
            folder = RunFolder(Path(outcome.folder or ""))
            if folder.info["step"] <= rung:  # no second seed needed it since
                folder.update(reason=message, pruned=True)
            say(f"lr={rate:g}: {message}, validation loss {loss:.4f}")
            break
    if loss is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    elif outcome.failed:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, loss)


def runner_up(arm: Tuned, best: float) -> float | None:
    """The rate that came furthest on the first seed beside the best, of several the lowest loss."""
    first = arm.seeds[0]
    losses = {rate: arm.outcomes[rate, first].loss for rate in arm.rates if rate != best}
    found = [(-arm.reached[rate], loss, rate) for rate, loss in losses.items() if loss is not None]
    return min(found)[2] if found else None


def finish(arm: Tuned, rate: float) -> None:
    """Train a rate that was pruned on the first seed to its end after all."""
    outcome = arm.outcomes[rate, arm.seeds[0]]
    if outcome.failed:
        outcome.failed = None
        advance(arm.configs[rate, arm.seeds[0]], outcome, arm.steps)
        RunFolder(Path(outcome.folder or "")).update(reason=outcome.failed, pruned=False)


def train(arm: Tuned, rate: float, seed: int) -> None:
    """Train a rate with a further seed to the end, once."""
    if (rate, seed) not in arm.outcomes:
        outcome = arm.outcomes[rate, seed] = Arm(len(arm.outcomes) + 1, arm.name, "tune", seed)
        advance(arm.configs[rate, seed], outcome, arm.steps)


def beyond(arm: Tuned, rate: float) -> float | None:
    """The rate that follows outside the grid one on its edge; None for one inside."""
    rates = sorted({rate for rate, _ in arm.configs})
    if len(rates) < 2 or rate not in (rates[0], rates[-1]):
        return None
    inner = rates[1] if rate == rates[0] else rates[-2]
    return float(f"{rate * rate / inner:.6g}")


def add_rate(arm: Tuned, rate: float) -> None:
    """Give the arm a further rate with all its seeds."""
    for seed in arm.seeds:
        config = next(own for (_, other), own in arm.configs.items() if other == seed)
        optim = config.optim.model_copy(update={"lr": rate})
        arm.configs[rate, seed] = config.model_copy(update={"optim": optim})


def affordable(arm: Tuned, runs: int, less: int = 0) -> bool:
    """Whether so many whole runs, `less` steps of them, keep within `MAX_COST`."""
    return arm.spent + runs * arm.steps - less <= MAX_COST * len(arm.seeds) * arm.steps


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
            notes.append(_chosen(arm, arm.best))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join([*lines, "* the arm's best rate", *notes])


def _chosen(arm: Tuned, best: float) -> str:
    """How the best rate was found, and what that has cost."""
    count, seeds = len(arm.rates), arm.seeds
    edge = ", the edge of the grid: a better one may lie beyond" if beyond(arm, best) else ""
    several = [rate for rate in arm.ranking(seeds[:2]) if rate != best] if len(seeds) > 1 else []
    how = f"by the mean of two seeds (then {several[0]:g})" if several else "by the first seed"
    ratio = arm.spent / (arm.steps * len(seeds))
    return (
        f"{arm.name}: best of {count} rates is {best:g}{edge}; chosen {how}; tuning took "
        f"{ratio:.2f} times the steps of that rate's {len(seeds)} seeds"
    )


if __name__ == "__main__":
    sys.exit(main())
