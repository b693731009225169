"""Runs that go wrong, stop early or go on: what their records say, and what they print."""

import csv
import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from building import train_config, write_text

from zoo.config.schedule import learning_rate_factor
from zoo.runs.folder import RunFolder
from zoo.runs.stopping import Stop
from zoo.training.callbacks import MAX_LOGITS, MAX_TOKENS, MetricsLogger


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> SimpleNamespace:
    """The runs of real.py: their folder, exit codes and what the program said."""
    folder = tmp_path_factory.mktemp("real")
    write_text(folder)
    wandb.setup()  # its service, which the programs share: a run that is not ended stays in use
    command = [sys.executable, str(Path(__file__).with_name("real.py"))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    codes = json.loads((folder / "codes.json").read_text())
    return SimpleNamespace(at=folder / "runs", codes=codes, said=done.stderr)


def rates(folder: Path) -> list[float]:
    with open(folder / "metrics.csv") as file:
        return [float(row["learning_rate"]) for row in csv.DictReader(file)]


def test_a_run_stopped_by_its_time_is_stopped_and_goes_on(runs):
    assert runs.codes["short"] == runs.codes["rest"] == 0
    assert "stopped by trainer.max_time=00:00:00:01 at step" in runs.said
    info = RunFolder.open(runs.at / "short").info
    assert info["status"] == "done"
    assert info["step"] == RunFolder.open(runs.at / "short").config.trainer.max_steps


def test_fewer_steps_than_were_taken_are_refused_and_change_nothing(runs):
    assert runs.codes["fewer"] == 2
    assert "the step that the run has reached" in runs.said


def test_a_nan_in_one_process_is_the_runs_reason(runs):
    assert runs.codes["lost"] == 1
    info = RunFolder.open(runs.at / "lost").info
    assert info["status"] == "failed"
    assert info["reason"].startswith("the loss is nan at step 3, batch ")
    assert "of process 2 of 2; last good checkpoint: " in info["reason"]


def test_a_run_given_more_steps_says_how_its_rate_goes_on(runs):
    whole = rates(runs.at / "long")
    assert runs.codes["cosine"] == runs.codes["constant"] == runs.codes["rewarm"] == 0
    assert "goes on at 0.000628, as in a run of 20 steps from its start" in runs.said
    cosine, constant, rewarm = (rates(runs.at / how) for how in ("cosine", "constant", "rewarm"))
    assert cosine[:10] == constant[:10] == rewarm[:10] == whole
    assert constant[10:] == pytest.approx([1e-4] * 10)
    assert rewarm[10:13] == pytest.approx([5.5e-4, 1e-3, 1e-3])
    assert rewarm[12:] == sorted(rewarm[12:], reverse=True)
    assert runs.codes["alone"] == 2


def test_metrics_hold_the_rate_of_the_step_itself(runs):
    config = RunFolder.open(runs.at / "long").config
    optim = config.optim
    expected = [optim.lr * learning_rate_factor(optim, 10, step) for step in range(10)]
    assert rates(runs.at / "long") == pytest.approx(expected)
    assert expected[0] == pytest.approx(optim.lr / 2)  # of two steps of warm-up


def test_wandb_has_one_run_for_all_processes_and_starts(runs):
    assert runs.codes["wandb"] == runs.codes["again"] == 0
    info = RunFolder.open(runs.at / "wandb").info
    folders = [path.name for path in (runs.at / "wandb/wandb").glob("offline-run-*")]
    assert len(folders) == 2  # before and after it went on
    assert all(name.endswith(info["wandb"]) for name in folders)


def test_a_run_says_what_it_is_and_what_comes_next(runs):
    assert "model: transformer, 113,984 parameters" in runs.said
    assert "data: text, 4,941 tokens to train on" in runs.said
    assert "next: python eval.py run=runs/long" in runs.said
    assert "  valid " in runs.said


@pytest.mark.parametrize(("tokens", "vocabulary"), [(512, 256), (2048, 2**15), (2**16, 256)])
def test_validation_takes_what_there_is_memory_for(tokens, vocabulary):
    valid = {"tokens": torch.zeros(9, tokens + 1, dtype=torch.long)}
    metrics = MetricsLogger(
        None, valid=valid, valid_every=1, reached=0, tokens_per_step=1, stop=Stop()
    )  # type: ignore[arg-type]
    batches = metrics._batches(vocabulary)
    assert sum(len(batch["tokens"]) for batch in batches) == 9
    rows = len(batches[0]["tokens"])
    assert rows == 1 or rows * tokens * vocabulary <= MAX_LOGITS
    assert rows == 1 or rows * tokens <= MAX_TOKENS
    assert (rows == 8) == (tokens == 512)  # small models are validated as they always were


def test_the_time_left_does_not_wrap_at_a_day(capsys, monkeypatch):
    metrics = MetricsLogger(
        None, valid={}, valid_every=1, reached=0, tokens_per_step=1, stop=Stop()
    )  # type: ignore[arg-type]
    metrics._said = -100.0
    monkeypatch.setattr(metrics, "_speed", lambda _: 1.0)
    metrics._say(1, 1 + 3 * 24 * 3600, torch.tensor(2.0))
    assert str(timedelta(days=3)) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.devices=3", "batch_size=4"], "trainer.devices=3: must divide the 4 windows"),
        (["trainer.accumulate_grad_batches=5"], "trainer.accumulate_grad_batches=5: must divide"),
        (["trainer.devices=4", "trainer.accumulate_grad_batches=8"], "trainer.devices=4 trainer"),
        (["trainer.devices=3", "trainer.sequence_parallel=2"], "sequence_parallel=2: must divide"),
        (["trainer.sequence_parallel=1024"], "sequence_parallel=1024: must be at most seq_len=512"),
        (
            ["trainer.devices=12", "trainer.sequence_parallel=4", "batch_size=4"],
            "trainer.devices=12 trainer.sequence_parallel=4: must divide the 4 windows",
        ),
    ],
)
def test_a_step_that_cannot_be_shared_equally_is_refused(words, message):
    from zoo.errors import UserError
    from zoo.training.partition import check_partition

    with pytest.raises(UserError, match=message):
        check_partition(train_config("size=tiny", *words))
