"""`zoo tune`: rates compete on one seed, the best gets the others, and nothing is trained twice."""

import json
import math
import random
from pathlib import Path

import pytest

from zoo.cli import tune as program
from zoo.cli.arms import Arm, composed_arms
from zoo.cli.study import unfinished
from zoo.cli.train import check
from zoo.cli.tune import group
from zoo.config.schema.train import TrainConfig
from zoo.errors import RunError
from zoo.runs.claim import claim

pytest.importorskip("optuna", reason="zoo tune needs Optuna")

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
        if self.breaks(config):
            folder.update(status="failed")
            raise RunError("the loss is nan at step 3")
        until, since = arm.until or STEPS, folder.info["step"]
        self.steps.append((config.model.name, config.optim.lr, config.seed, since, until))
        with (folder.path / "metrics.csv").open("a") as file:
            if not since:
                file.write("step,valid_loss\n")
            file.write(f"{until},{self.loss(config, until)}\n")
        folder.update(step=until, status="done" if until == STEPS else "stopped")
        return 0


@pytest.fixture
def trains(monkeypatch) -> Trains:
    fake = Trains()
    monkeypatch.setattr(program, "job", fake)
    return fake


def words(place: Path, models: str = "lstm,nope") -> list[str]:
    swept = [f"model={models}", "optim.lr=1e-3,2e-3,4e-3,8e-3", "seed=0,1,2"]
    fixed = ["data=parity", "size=tiny", "seq_len=16", "batch_size=4", "optim.warmup_steps=5"]
    return [*swept, *fixed, f"trainer.max_steps={STEPS}", f"runs={place}", "logger=none"]


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


def test_a_rate_that_diverges_is_one_rate_less_and_no_rate_is_a_failure(trains, tmp_path):
    trains.breaks = lambda config: config.optim.lr == BEST["lstm"]
    assert program.main(words(tmp_path / "a", "lstm")) == 0
    trains.breaks = lambda config: True
    assert program.main(words(tmp_path / "b", "lstm")) == 1


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
    assert not unfinished([arm])


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
