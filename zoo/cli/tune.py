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

A rate drops out only where its training diverged. Whatever else keeps a run from its end (another
process trains it, no memory, a damaged file) says nothing of the rate: no rate of that arm is
chosen until the same command gets past it.
"""

import functools
import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.cli.arms import Arm, composed_arms, run_arm
from zoo.cli.guard import run_program
from zoo.cli.train import check, job
from zoo.config.schema.train import TrainConfig
from zoo.console import label, say
from zoo.errors import RunError, UserError, refuse, refuse_path
from zoo.runs.files import as_it_is, one_line
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
PARTS = (4, 2)  # rungs are at these fractions of the steps
STOPS = (UserError, RunError, OSError)  # what ends the tuning of an arm, and of no other
MENDED = (
    "no rate is chosen; once that is mended the same command goes on, and trains a run again whose "
    "folder was removed (in place of fresh=true, which is of one run)"
)


@dataclass
class Tuned:
    """An arm over its rates and seeds, and what was trained of it: (rate, seed) -> its outcome."""

    name: str
    configs: dict[tuple[float, int], TrainConfig]
    outcomes: dict[tuple[float, int], Arm] = field(default_factory=dict)
    best: float | None = None
    found: bool = False  # the best is the final one
    stopped: str | None = None  # why no rate is chosen, where that is no fault of the rates
    only_known: bool = False  # go by what was trained before: train nothing, write nothing
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


class UntrainedError(Exception):
    """A run has steps left that an arm of `only_known` needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and train all arms; returns the exit code, 1 where an arm is left without a rate."""
    words = sys.argv[1:] if argv is None else list(argv)
    return run_program("zoo tune", USAGE.lstrip(), words, tune)


def tune(words: list[str]) -> int:
    """Carry the command out; see the module."""
    if not words:
        raise UserError("experiment=: must be given. See zoo tune --help.")
    composed = composed_arms("train", words, check)
    for option in ("name", "resume", "fresh"):
        if value := getattr(composed[0][1], option):
            refuse(option, value, "is of one run, and these are several", "Leave it out")
    return tune_arms(group(composed))


def tune_arms(arms: Sequence[Tuned]) -> int:
    """Tune and train the arms, then list them; the exit code."""
    optuna = load_optuna()
    for number, arm in enumerate(arms, 1):
        label(f"[{number}/{len(arms)} {arm.name}] ")
        try:
            halve(arm, optuna)
        except STOPS as error:
            arm.best, arm.stopped = None, one_line(error)
            say(arm.stopped)
            say(MENDED)
        finally:
            label("")
    say(table(arms))
    return int(any(arm.best is None for arm in arms))


def load_optuna() -> Any:
    """The library that prunes; UserError where it is not installed."""
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        refuse_path(
            "optuna",
            "is not installed, and zoo tune needs it",
            "Run pip install 'zoo[tune]', or train the whole grid: zoo train -m with these options",
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


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
    """Find the arm's best rate, and train every seed at it; see the module.

    Raises one of STOPS where a run ends for another reason than its rate, or what is needed of a
    finished one is gone.
    """
    find_rate(arm, optuna)
    arm.found = True
    if arm.best is not None:
        for seed in arm.seeds[1:]:
            train(arm, arm.best, seed)
        _check_whole(arm, arm.best)


def find_rate(arm: Tuned, optuna: Any) -> None:
    """Find the arm's best rate, None where all diverged."""
    steps, first = arm.steps, arm.seeds[0]
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=next(iter(rungs(steps)), 1), reduction_factor=FACTOR
    )
    study = optuna.create_study(pruner=pruner)
    for rate in arm.rates:
        compete(arm, rate, study, optuna)
    arm.best = next(iter(arm.ranking([first])), None)
    if arm.best is None:
        return
    others = arm.seeds[1:]
    if (further := beyond(arm, arm.best)) and affordable(arm, 1 + len(others)):
        if not arm.only_known:
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


def compete(arm: Tuned, rate: float, study: Any, optuna: Any) -> None:
    """Train a rate on the first seed, as far as it keeps up with the others."""
    steps, first = arm.steps, arm.seeds[0]
    trial, loss = study.ask(), None
    outcome = arm.outcomes[rate, first] = Arm(len(arm.outcomes) + 1, arm.name, "tune", first)
    for rung in (*rungs(steps), steps):
        loss = advance(arm, rate, first, rung)
        if loss is None:
            break
        arm.reached[rate] = rung
        trial.report(loss, rung)
        if rung < steps and trial.should_prune():
            outcome.failed = message = f"pruned at step {rung} of {steps}"
            if not arm.only_known:
                folder = RunFolder(Path(outcome.folder or ""))
                info = folder.info
                if info["step"] <= rung and not info.get("diverged"):  # not trained on since
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
        advance(arm, rate, arm.seeds[0], arm.steps)
        if not arm.only_known:
            RunFolder(Path(outcome.folder or "")).update(reason=outcome.failed, pruned=False)


def train(arm: Tuned, rate: float, seed: int) -> None:
    """Train a rate with a further seed to the end, once."""
    if (rate, seed) not in arm.outcomes:
        arm.outcomes[rate, seed] = Arm(len(arm.outcomes) + 1, arm.name, "tune", seed)
        advance(arm, rate, seed, arm.steps)


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


def rungs(steps: int) -> list[int]:
    """The steps at which rates are compared: a quarter and half of them, rounded down."""
    return sorted({steps // part for part in PARTS} - {0})


def advance(arm: Tuned, rate: float, seed: int, until: int) -> float | None:
    """Train a run up to a step; its validation loss there, None where it diverged.

    Raises one of STOPS where it ends for another reason, and UntrainedError where nothing is to be
    trained.
    """
    config, outcome = arm.configs[rate, seed], arm.outcomes[rate, seed]
    folder = folder_of(config)
    loss, diverged = _figures(folder, until)
    if loss is None and not diverged:
        if not _is_past(folder, until):
            _carry_out(arm, config, outcome, until)
        loss, diverged = _figures(folder, until)
        if loss is None and not diverged:
            outcome.folder, outcome.failed = str(folder), "stopped"
            if folder.info["step"] < until:  # by trainer.max_time
                raise RunError(f"lr={rate:g} seed={seed}: {folder.info['reason']}")
            rule = f"has lost its validation loss at step {until}"
            refuse_path(folder.path / "metrics.csv", rule, f"Restore it, or remove {folder}")
    outcome.folder, outcome.loss, outcome.failed = str(folder), loss, diverged
    if diverged and not arm.only_known:
        say(f"lr={rate:g} seed={seed}: {diverged}")
    return loss


def _carry_out(arm: Tuned, config: TrainConfig, outcome: Arm, until: int) -> None:
    """Train a run up to a step; RunError where it ends for another reason than that it diverged."""
    if arm.only_known:
        raise UntrainedError(run_name(config))
    outcome.until = until if until < arm.steps else None
    run_arm(outcome, lambda: job(config, outcome))
    if outcome.diverged:
        folder_of(config).update(diverged=outcome.failed)
    elif outcome.failed:
        reason, outcome.failed, outcome.loss = outcome.failed, "stopped", None
        raise RunError(f"lr={config.optim.lr:g} seed={config.seed}: {reason}")


def folder_of(config: TrainConfig) -> RunFolder:
    """The folder of a run, which may not exist."""
    return RunFolder(Path(config.runs) / run_name(config))


def _is_past(folder: RunFolder, step: int) -> bool:
    """Whether training a run up to a step would train nothing, so that its figures remain."""
    if not folder.path.exists():
        return False
    info = RunFolder.open(folder.path).info
    leaks = (info.get("audit") or {}).get("ok") is False
    ended = info["step"] > step or (info["step"] == step and info["status"] == "done")
    return ended and not leaks


def _figures(folder: RunFolder, step: int) -> tuple[float | None, str | None]:
    """A run's validation loss at a step, or how it diverged before that; neither where unknown."""
    if not (folder.path / "run.json").is_file():
        return None, None
    info = folder.info
    if info["step"] >= step and (info.get("audit") or {}).get("ok") is not False:
        rows = [row for row in metrics_of(folder) if int(row["step"]) == step]
        found = [row.get("valid_loss") for row in rows]
        if losses := [float(loss) for loss in found if loss]:
            finite = math.isfinite(losses[-1])
            said = f"the validation loss is {losses[-1]} at step {step}"
            return (losses[-1], None) if finite else (None, said)
    return None, info.get("diverged")


def metrics_of(folder: RunFolder) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, read once as long as it is the same file."""
    path = folder.path / "metrics.csv"
    return _read_once(*as_it_is(path)) if path.is_file() else []


@functools.cache
def _read_once(path: Path, *_: int) -> list[dict[str, str]]:
    return read_metrics(path)


def _check_whole(arm: Tuned, best: float) -> None:
    """Train the last steps of the best rate's runs again where they are lost; refuse lost runs.

    Reports measure what their last checkpoints hold.
    """
    for seed in arm.seeds:
        config, outcome = arm.configs[best, seed], arm.outcomes[best, seed]
        if outcome.failed:
            continue
        folder = RunFolder.open(folder_of(config).path)
        if folder.checkpoint() and not folder.is_trained(config):
            _carry_out(arm, config, outcome, arm.steps)
        if folder.checkpoint() is None or not folder.is_trained(config):
            rule = "has lost the checkpoint of its last step"
            refuse_path(folder.path, rule, "Restore it, or remove the folder")


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
        else:
            why = arm.stopped or f"all {len(arm.rates)} diverged"
            notes.append(f"{arm.name}: no rate is chosen: {why}")
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
