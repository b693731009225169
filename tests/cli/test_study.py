"""`zoo study` knows what is left of an experiment, and how long that takes."""

import zipfile

import pytest

from zoo.cli.arms import composed_arms
from zoo.cli.study import left, main
from zoo.cli.train import check
from zoo.cli.tune import Tuned, add_rate, group
from zoo.config import compose
from zoo.runs.claim import claim

pytest.importorskip("optuna", reason="zoo study needs Optuna")


@pytest.fixture
def arms(tmp_path) -> list[Tuned]:
    words = ["model=lstm,nope", "optim.lr=1e-3,2e-3", "seed=0,1", "data=parity", "seq_len=16"]
    more = ["size=tiny", "batch_size=4", "trainer.max_steps=80", "optim.warmup_steps=5"]
    return group(composed_arms("train", [*words, *more, f"runs={tmp_path}", "logger=none"], check))


def test_arms_that_differ_in_single_values_alone_are_composed_once(monkeypatch):
    composed = []
    whole = compose.hydra_compose
    monkeypatch.setattr(
        compose, "hydra_compose", lambda *a, **k: composed.append(a) or whole(*a, **k)
    )
    compose._composed.cache_clear()  # of what other tests composed
    words = ["model=lstm,nope", "optim.lr=1e-3,2e-3", "seed=0,1", "data=parity", "seq_len=16"]
    arms = composed_arms("train", words, check)
    assert [(c.model.name, c.optim.lr, c.seed) for _, c in arms] == [
        (model, rate, seed)
        for model in ("lstm", "nope")
        for rate in (1e-3, 2e-3)
        for seed in (0, 1)
    ]
    assert len(composed) == 2


def train(arm: Tuned, rate: float, seed: int, step: int, **other) -> None:
    folder = claim(arm.configs[rate, seed])
    folder.update(step=step, **other)
    rows = [f"{at},{1 / rate},32" for at in (20, 40, 80) if at <= step]
    text = "\n".join(["step,valid_loss,tokens_per_second", *rows, ""])
    (folder.path / "metrics.csv").write_text(text)
    with zipfile.ZipFile(folder.path / f"checkpoints/step={step}.ckpt", "w") as file:
        file.writestr("weights", "")


def test_all_is_left_at_first_and_no_time_is_known(arms):
    expected = "2 of 2 arms left (lstm, nope), at most 640 steps"
    assert left(arms) == expected  # twice the 80 steps of two seeds, of each


def test_what_was_trained_and_pruned_is_not_left(arms):
    train(arms[0], 2e-3, 0, 80, status="done")
    train(arms[0], 1e-3, 0, 20, pruned=True)
    assert left(arms[:1]) == "1 of 1 arms left (lstm), at most 220 steps, 0:07:20"
    add_rate(arms[0], 4e-3)  # the best was at the edge of the grid
    train(arms[0], 4e-3, 0, 80, status="done")
    assert left(arms[:1]) == "1 of 1 arms left (lstm), at most 80 steps, 0:02:40"
    train(arms[0], 4e-3, 1, 80, status="done")
    assert left(arms).startswith("1 of 2 arms left (nope), at most 320 steps")
    assert left(arms[:1]) == "all 1 arms are done"


@pytest.mark.parametrize("word", ["recall", "--left"])
def test_a_word_given_twice_is_refused(word, capfd):
    assert main(["--left", "recall", word]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"zoo study: {word}: is given twice. Give it once."


def test_an_unknown_experiment_is_refused_in_one_line(capfd):
    assert main(["state_trackin"]) == 2
    assert "Did you mean 'state_tracking'" in capfd.readouterr().err
