"""`zoo tune`: rates compete on one seed, the best gets the others, and nothing is trained twice."""

import functools
import json
import math
import random
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zoo.cli import tune as program
from zoo.cli.arms import Arm, composed_arms
from zoo.cli.study import left
from zoo.cli.train import check
from zoo.cli.tune import Tuned, group
from zoo.config.schema.train import TrainConfig
from zoo.errors import NonFiniteError, RunError, UserError
from zoo.runs.claim import claim
from zoo.runs.folder import RunFolder

optuna = pytest.importorskip("optuna", reason="zoo tune needs Optuna")

STEPS = 80
BEST = {"lstm": 2e-3, "nope": 4e-3}  # of each model, in this file's own world


def loss(config: TrainConfig, step: int) -> float:
    far = abs(math.log2(config.optim.lr / BEST[config.model.name]))
    return (1 + far) * (1 - step / STEPS / 2) + 0.01 * config.seed


class Trains:
    """In place of training: a folder and its metrics, and a list of what was requested."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float, int, int, int]] = []
        self.breaks = lambda config: False
        self.loss = loss

    def __call__(self, config: TrainConfig, arm: Arm) -> int:
        folder = claim(config)
        arm.folder = str(folder)
        with folder.training(keep=True):
            until, since = arm.until or STEPS, folder.info["step"]
            if self.breaks(config):
                raise NonFiniteError("the loss is nan at step 3")
            self.steps.append((config.model.name, config.optim.lr, config.seed, since, until))
            with (folder.path / "metrics.csv").open("a") as file:
                if not since:
                    file.write("step,valid_loss\n")
                file.write(f"{until},{self.loss(config, until)}\n")
            with zipfile.ZipFile(folder.path / f"checkpoints/step={until:08d}.ckpt", "w") as file:
                file.writestr("weights", "")
            folder.update(step=until, status="done" if until == STEPS else "stopped")
        return 0


def stop() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def trains(monkeypatch) -> Trains:
    fake = Trains()
    monkeypatch.setattr(program, "job", fake)
    for name in ("sources", "provenance"):  # slow to read
        monkeypatch.setattr(f"zoo.runs.claim.{name}", lambda *_: {})
    monkeypatch.setattr("os.fsync", lambda _: None)
    return fake


def words(place: Path, models: str = "lstm,nope") -> list[str]:
    swept = [f"model={models}", "optim.lr=1e-3,2e-3,4e-3,8e-3", "seed=0,1,2"]
    fixed = ["data=parity", "size=tiny", "seq_len=16", "batch_size=4", "optim.warmup_steps=5"]
    return [*swept, *fixed, f"trainer.max_steps={STEPS}", f"runs={place}", "logger=none"]


@functools.cache
def composed(models: str) -> list[tuple[list[str], TrainConfig]]:
    return composed_arms("train", words(Path("runs"), models), check)


def arms_in(place: Path, models: str = "lstm,nope") -> list[Tuned]:
    """The arms of the command of `words`, composed once."""
    moved = {"runs": str(place)}
    return group([(line, config.model_copy(update=moved)) for line, config in composed(models)])


def tune(place: Path, models: str = "lstm,nope") -> int:
    return program.tune_arms(arms_in(place, models))


def folder_of(place: Path, rate: float, seed: int = 0) -> RunFolder:
    """The folder of an LSTM's run, which may not exist."""
    return program.folder_of(arms_in(place, "lstm")[0].configs[rate, seed])


def test_the_best_rate_of_each_arm_is_found_and_trained_with_every_seed(trains, tmp_path, capfd):
    assert program.main(words(tmp_path)) == 0
    done = {key[:3] for key in trains.steps if key[-1] == STEPS}
    for name, best in BEST.items():
        assert {(name, best, seed) for seed in (0, 1, 2)} <= done
        assert {rate for model, rate, seed in done if model == name and seed == 2} == {best}
        assert len({rate for model, rate, seed in done if model == name and seed == 1}) <= 2
    table = capfd.readouterr().err
    for name, best in BEST.items():
        assert f"{name}: best of 4 rates is {best:g}" in table


def test_halving_costs_less_than_twice_the_best_rate_with_its_seeds(trains, tmp_path):
    program.main(words(tmp_path))
    for name in BEST:
        steps = sum(until - since for model, _, _, since, until in trains.steps if model == name)
        assert steps < 2 * 3 * STEPS


def test_what_was_trained_is_not_trained_again(trains, tmp_path, capfd):
    program.main(words(tmp_path))
    first, before = capfd.readouterr().err.splitlines()[-12:], list(trains.steps)
    program.main(words(tmp_path))
    assert trains.steps == before
    assert capfd.readouterr().err.splitlines()[-12:] == first


def test_a_rate_that_was_pruned_says_so_in_its_run(trains, tmp_path):
    program.main(words(tmp_path, "lstm"))
    infos = [json.loads(path.read_text()) for path in tmp_path.glob("*/run.json")]
    pruned = [info for info in infos if info.get("pruned")]
    assert pruned
    assert all(info["reason"].startswith("pruned at step") for info in pruned)
    assert all(info["step"] in (STEPS // 4, STEPS // 2) for info in pruned)


@pytest.mark.parametrize("steps", [*range(1, 34), 250, 999, 9800])
def test_rates_are_compared_at_a_quarter_and_at_half_of_the_steps_alone(steps, monkeypatch):
    """By the step that each rate reached: one keeps up, others are worse from some step on."""
    worse_from = {1.0: math.inf, 2.0: 0, 3.0: steps // 4 + 1, 4.0: steps}
    made: list[int] = []

    def advance(arm, rate, seed, until):
        made.append(until)
        return 1.0 if until < worse_from[rate] else 2.0

    monkeypatch.setattr(program, "advance", advance)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known = {"name": "any", "steps": steps, "seeds": [0], "rates": [*worse_from]}
    arm: Any = SimpleNamespace(
        **known, outcomes={}, reached={}, only_known=True, ranking=lambda _: []
    )
    program.find_rate(arm, optuna)
    quarter, half = steps // 4, steps // 2
    assert {*made} <= {quarter, half, steps}
    first = quarter or half or steps  # of one, two and three steps
    assert arm.reached == {1.0: steps, 2.0: first, 3.0: max(first, half or steps), 4.0: steps}


def test_a_rate_that_diverges_is_one_rate_less_and_no_rate_is_a_failure(trains, tmp_path, capfd):
    trains.breaks = lambda config: config.optim.lr == BEST["lstm"]
    assert program.main(words(tmp_path / "a", "lstm")) == 0
    trains.breaks = lambda config: True
    assert program.main(words(tmp_path / "b", "lstm")) == 1
    assert "lstm: no rate is chosen: all 4 diverged" in capfd.readouterr().err


@pytest.mark.parametrize("figure", ["nan", "inf", "raised"])
def test_a_rate_that_diverges_is_not_trained_again(trains, tmp_path, capfd, figure):
    """Whether its training raises or only its validation loss is not finite."""
    worst = BEST["lstm"]
    if figure == "raised":
        trains.breaks = lambda config: config.optim.lr == worst
    else:
        trains.loss = lambda config, step: (
            float(figure) if config.optim.lr == worst else loss(config, step)
        )
    assert tune(tmp_path, "lstm") == 0
    first, before = capfd.readouterr().err.splitlines()[-8:], list(trains.steps)
    assert "best of 4 rates" in first[-1]
    trains.breaks = lambda config: pytest.fail("trained again")
    assert tune(tmp_path, "lstm") == 0
    assert trains.steps == before
    assert capfd.readouterr().err.splitlines()[-8:] == first


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Another process trains the run."""
    (arm,) = arms_in(place, "lstm")
    with claim(arm.configs[4e-3, 0]).lock():
        yield


@contextmanager
def in_the_way(place: Path) -> Iterator[None]:
    """A plain file has the name of the run's folder."""
    place.mkdir()
    path = folder_of(place, 4e-3).path
    path.write_text("mine")
    yield
    path.unlink()


FROM_OUTSIDE = {  # what keeps a run from its end, and what is said of it
    locked: "is already being trained by process",
    in_the_way: "there is no such run folder",
    UserError("refused"): "refused",
    RunError("the process was ended by SIGKILL"): "ended by SIGKILL",
    OSError(28, "No space left on device"): "No space left on device",
    MemoryError("no memory"): "MemoryError: no memory",
    RuntimeError("CUDA out of memory"): "RuntimeError: CUDA out of memory",
    ZeroDivisionError("a fault of the program"): "a fault of the program",
}


def name_of(kind: object) -> str:
    return getattr(kind, "__name__", str(kind))


@pytest.mark.parametrize("kind", FROM_OUTSIDE, ids=name_of)
def test_what_fails_from_outside_chooses_no_rate_and_the_same_command_goes_on(
    trains, tmp_path, capfd, kind
):
    place = tmp_path / "runs"

    def fails(config: TrainConfig) -> bool:
        if isinstance(kind, Exception) and (config.model.name, config.optim.lr) == ("lstm", 4e-3):
            raise kind
        return False

    trains.breaks = fails
    with nullcontext() if isinstance(kind, Exception) else kind(place):
        assert tune(place) == 1
    said = capfd.readouterr().err
    (note,) = [line for line in said.splitlines() if line.startswith("lstm: ")]
    assert note.startswith("lstm: no rate is chosen: ")
    assert FROM_OUTSIDE[kind] in note
    assert "nope: best of 4 rates" in said  # the other arm went on
    stopped = [key for key in trains.steps if key[0] == "lstm"]
    assert not stopped  # the rate in the middle of the grid comes first
    trains.breaks = lambda config: False
    assert tune(place) == 0
    note, _ = capfd.readouterr().err.splitlines()[-2:]
    assert note.startswith("lstm: best of 4 rates is 0.002; chosen by the mean of two seeds")
    assert {rate for _, rate, *_ in trains.steps} == {1e-3, 2e-3, 4e-3, 8e-3}


def test_a_run_that_pauses_before_its_step_is_no_lost_one(trains, tmp_path, capfd, monkeypatch):
    """As trainer.max_time makes it."""

    def pauses(config: TrainConfig, arm: Arm) -> int:
        folder = claim(config)
        arm.folder = str(folder)
        (folder.path / "metrics.csv").write_text("step,valid_loss\n")
        folder.update(step=15, status="stopped", reason="stopped by trainer.max_time at step 15")
        return 0

    monkeypatch.setattr(program, "job", pauses)
    assert tune(tmp_path, "lstm") == 1
    said = capfd.readouterr().err
    assert "lstm: no rate is chosen: lr=0.004 seed=0: stopped by trainer.max_time at" in said
    assert "lost" not in said
    monkeypatch.setattr(program, "job", trains)
    assert tune(tmp_path, "lstm") == 0


LOST = {  # damage to a file of the best rate's first run, and what is said of it
    "checkpoints": lambda path: [file.unlink() for file in path.glob("*")],
    "./checkpoints": lambda path: [file.write_text("damaged") for file in path.glob("*")],
    "metrics.csv": lambda path: path.unlink(),
    "./metrics.csv": lambda path: path.write_text(path.read_text().replace(",", ";")),
    ".//metrics.csv": lambda path: path.write_text(path.read_text().replace("80,", "8O,")),
    "config.yaml": lambda path: path.unlink(),
    "./config.yaml": lambda path: path.write_text("seed: 1"),
    "run.json": lambda path: path.unlink(),
    "./run.json": lambda path: path.write_text("{"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_is_lost_of_the_best_rate_is_said_and_no_rate_is_chosen(trains, tmp_path, capfd, name):
    tune(tmp_path)
    before, folder = list(trains.steps), folder_of(tmp_path, BEST["lstm"])
    LOST[name](folder.path / name)
    capfd.readouterr()
    arms = arms_in(tmp_path)
    assert left(arms).startswith("1 of 2 arms left (lstm), at most ")
    assert str(folder) in left(arms)
    assert tune(tmp_path) == 1
    said = capfd.readouterr().err.splitlines()
    (note,) = [line for line in said if line.startswith("lstm: no rate is chosen: ")]
    assert str(folder) in note
    assert said[-1].startswith("nope: best of 4 rates is 0.004")
    assert len([line for line in said if str(folder) in line]) <= 4  # a warning, and in the table
    assert trains.steps == before
    shutil.rmtree(folder.path)
    assert tune(tmp_path) == 0
    assert trains.steps[len(before) :]
    assert {key[:3] for key in trains.steps[len(before) :]} == {("lstm", BEST["lstm"], 0)}


def test_last_steps_that_are_lost_are_trained_again(trains, tmp_path, capfd):
    tune(tmp_path, "lstm")
    before, folder = list(trains.steps), folder_of(tmp_path, BEST["lstm"])
    (folder.path / "checkpoints/step=00000080.ckpt").unlink()
    assert left(arms_in(tmp_path, "lstm")).startswith("1 of 1 arms left (lstm), at most ")
    assert tune(tmp_path, "lstm") == 0
    assert {key[:3] for key in trains.steps[len(before) :]} == {("lstm", BEST["lstm"], 0)}
    assert left(arms_in(tmp_path, "lstm")) == "all 1 arms are done"


def test_a_garbled_line_that_is_not_needed_is_named_and_the_table_is_the_same(
    trains, tmp_path, capfd
):
    tune(tmp_path, "lstm")
    first = capfd.readouterr().err.splitlines()[-1]
    with (folder_of(tmp_path, BEST["lstm"]).path / "metrics.csv").open("a") as file:
        file.write("garbage\n")
    assert tune(tmp_path, "lstm") == 0
    said = capfd.readouterr().err
    assert said.splitlines()[-1] == first
    assert said.count("1 lines hold no figures") == 1


def test_a_study_that_was_cut_anywhere_is_not_done_and_goes_on_to_the_same_table(
    trains, tmp_path, capfd
):
    """Cut after each single training: also between the second seeds of the best and its rival."""
    whole = tmp_path / "whole"
    tune(whole, "lstm")
    expected = capfd.readouterr().err.splitlines()[-1]
    count, arms = len(trains.steps), arms_in(tmp_path, "lstm")
    for _ in range(count):
        trains.steps.clear()
        trains.breaks = lambda config: trains.steps and stop()
        said = left(arms)
        assert said.startswith("1 of 1 arms left (lstm), at most ")
        most = int(said.split("at most ")[1].split(" steps")[0])
        with suppress(KeyboardInterrupt):
            tune(tmp_path, "lstm")
        assert 0 < sum(until - since for *_, since, until in trains.steps) <= most
    assert left(arms) == "all 1 arms are done"
    capfd.readouterr()
    trains.breaks = lambda config: pytest.fail("trained again")
    assert tune(tmp_path, "lstm") == 0
    assert capfd.readouterr().err.splitlines()[-1] == expected


@pytest.mark.parametrize("option", ["name=x", "fresh=true"])
def test_an_option_of_one_run_is_refused(trains, tmp_path, capfd, option):
    assert program.main([*words(tmp_path), option]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"zoo tune: {option}: is of one run, and these are several.")
    assert not trains.steps


def test_without_optuna_the_grid_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert program.main(words(tmp_path)) == 2
    assert "pip install 'zoo[tune]'" in capfd.readouterr().err


def test_an_unexpected_error_of_one_arm_does_not_stop_the_others(trains, tmp_path, capfd):
    trains.breaks = lambda config: config.model.name == "lstm" and 1 / 0
    assert program.main(words(tmp_path)) == 1
    assert {name for name, *_ in trains.steps} == {"nope"}
    assert "ZeroDivisionError: division by zero" in capfd.readouterr().err


def test_a_first_seed_that_misleads_is_overruled_by_the_mean_of_two(trains, tmp_path, capfd):
    """On seed 0 the wrong rate is ahead by little, on every other it is far behind."""

    def misleads(config: TrainConfig, step: int) -> float:
        lucky = config.optim.lr == 4e-3
        return loss(config, step) - (1.1 if config.seed == 0 else -2.0) * lucky

    trains.loss = misleads
    assert program.main(words(tmp_path, "lstm")) == 0
    trained = {key[:3] for key in trains.steps if key[-1] == STEPS}
    assert ("lstm", 2e-3, 2) in trained
    assert ("lstm", 4e-3, 2) not in trained
    output = capfd.readouterr().err
    assert "best of 4 rates is 0.002; chosen by the mean of two seeds (then 0.004)" in output


@pytest.mark.parametrize(
    ("best", "tried", "edge"),
    [(8e-3, 16e-3, False), (16e-3, 16e-3, True)],
)
def test_a_best_rate_on_the_edge_gets_a_neighbour_beyond_it(
    trains, tmp_path, capfd, monkeypatch, best, tried, edge
):
    monkeypatch.setitem(BEST, "lstm", best)
    assert program.main(words(tmp_path, "lstm")) == 0
    assert {rate for _, rate, *_ in trains.steps} == {1e-3, 2e-3, 4e-3, 8e-3, tried}
    output = capfd.readouterr().err
    assert f"is the best and at the edge of the grid: trying {tried:g} too" in output
    assert (f"best of 5 rates is {best:g}, the edge of the grid" in output) == edge
    before = list(trains.steps)
    program.main(words(tmp_path, "lstm"))
    assert trains.steps == before
    (arm,) = group(composed_arms("train", words(tmp_path, "lstm"), check))
    assert left([arm]) == "all 1 arms are done"


def test_a_best_rate_on_the_edge_is_named_where_another_would_cost_too_much(
    trains, tmp_path, capfd, monkeypatch
):
    monkeypatch.setitem(BEST, "lstm", 1e-3)
    assert program.main(words(tmp_path, "lstm")) == 0
    assert "best of 4 rates is 0.001, the edge of the grid" in capfd.readouterr().err


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_losses_tuning_costs_at_most_twice_the_best_rate_with_its_seeds(
    trains, tmp_path, seed
):

    def drawn(config: TrainConfig, step: int) -> float:
        return random.Random(f"{seed} {config.optim.lr} {config.seed} {step}").random()

    trains.loss = drawn
    program.main(words(tmp_path, "lstm"))
    assert sum(until - since for *_, since, until in trains.steps) <= 2 * 3 * STEPS
    before = list(trains.steps)
    program.main(words(tmp_path, "lstm"))
    assert trains.steps == before
