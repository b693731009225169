"""`zoo tune`: rates compete on one seed, the best gets the others, and nothing is trained twice."""

import json
from pathlib import Path

import pytest

from zoo.cli import tune as program
from zoo.cli.arms import Arm
from zoo.config.schema.train import TrainConfig
from zoo.errors import RunError
from zoo.runs.claim import claim

pytest.importorskip("optuna", reason="zoo tune needs Optuna")

STEPS, RATES = 80, [1e-3, 2e-3, 4e-3, 8e-3]
BEST = {"lstm": 2e-3, "nope": 8e-3}  # of each model, in this file's own world


def loss(config: TrainConfig, step: int) -> float:
    far = abs(RATES.index(config.optim.lr) - RATES.index(BEST[config.model.name]))
    return (1 + far) * (1 - step / STEPS / 2) + 0.01 * config.seed


class Trains:
    """In place of training: a folder and its metrics, and a list of what was asked for."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float, int, int, int]] = []
        self.breaks = lambda config: False

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
            file.write(f"{until},{loss(config, until)}\n")
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
        assert {rate for model, rate, seed in done if model == name and seed} == {best}
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
