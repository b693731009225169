"""train.py by its run folder: it continues, refuses and sweeps; in place of learning, a stub."""

import contextlib
import errno
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from building import ROOT, files_below, write_checkpoint

import zoo.runs.claim
import zoo.runs.files
from zoo.console import say
from zoo.errors import UserError
from zoo.runs.find import find_runs
from zoo.runs.folder import RunFolder


@pytest.fixture
def train(tmp_path, monkeypatch, capfd) -> Callable:
    """train(*words, learner=...) -> (exit code, stderr); in place of learning, what is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.syspath_prepend(ROOT)

    def call(*words: str, learner: Callable = learn) -> tuple[int, str]:
        from zoo.cli import train

        module = types.ModuleType("zoo.training.fit")
        module.train = learner  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "zoo.training.fit", module)
        capfd.readouterr()
        tiny = [] if words and words[0].startswith("resume=") else ["size=tiny", "logger=none"]
        return train.main([*words, *tiny]), capfd.readouterr().err

    return call


def learn(config, folder: RunFolder, *_) -> None:
    """Trains nothing, and says it did."""
    step = config.trainer.max_steps
    write_checkpoint(folder, f"step={step:08d}.ckpt")
    folder.update(status="done", step=step)


def stop_after_7(config, folder: RunFolder, *_) -> None:
    write_checkpoint(folder, "step=00000007.ckpt")
    folder.update(step=7)
    raise KeyboardInterrupt("stopped by SIGTERM at step 7")


def stop_before_7_is_noted(config, folder: RunFolder, *_) -> None:
    """As a kill between the checkpoint and run.json does."""
    write_checkpoint(folder, "step=00000007.ckpt")
    raise KeyboardInterrupt("stopped by SIGTERM")


def refuse(config, folder: RunFolder, *_) -> None:
    raise ValueError("heads=3: must divide\nwidth=64.")


def only_run() -> RunFolder:
    (path,) = Path("runs").glob("[!.]*")
    return RunFolder.open(path)


def test_a_run_writes_its_folder_and_nothing_else(train, tmp_path):
    code, error = train("name=mine")
    assert code == 0
    assert error == "runs/mine: training transformer for 1000 steps\n"
    assert sorted(set(os.listdir(tmp_path)) - {".data"}) == ["runs"]
    assert os.listdir("runs") == ["mine"]
    info = only_run().info
    assert info["versions"]["python"] == sys.version.split()[0]
    assert {"commit", "dirty"} <= set(info)


def test_the_same_command_continues_then_says_it_is_done(train):
    code, error = train(learner=stop_after_7)
    assert (code, error.splitlines()[-1]) == (130, "train.py: stopped by SIGTERM at step 7")
    info = only_run().info
    assert (info["status"], info["reason"]) == ("stopped", "stopped by SIGTERM at step 7")
    code, error = train("threads=1")
    assert code == 0
    assert "training transformer from step=00000007.ckpt" in error
    assert only_run().config.threads == 1
    code, error = train(learner=refuse)
    assert code == 0
    assert error == f"already trained: {only_run()} (fresh=true trains again)\n"
    assert train("fresh=true")[0] == 0
    assert sorted(path.name for path in Path("runs").iterdir())[1].endswith("-2")


def test_a_finished_run_is_not_already_trained_on_a_device_that_is_not_there(train, monkeypatch):
    monkeypatch.setattr("zoo.devices.cuda_devices", lambda: 0)
    train("name=mine")
    code, error = train("name=mine", "trainer.accelerator=cuda")
    assert code == 2
    assert error == "train.py: trainer.accelerator=cuda: there is none here. Use auto or cpu.\n"


def test_resume_goes_on_and_changes_only_what_it_may(train):
    train("name=mine", learner=stop_after_7)
    words = ["trainer.max_steps=2k", "threads=2", "logger=wandb", "logger.mode=offline"]
    code, error = train("resume=runs/mine", *words)
    assert code == 0
    assert "training transformer from step=00000007.ckpt" in error
    config = only_run().config
    assert (config.trainer.max_steps, config.threads, config.size.name) == (2048, 2, "tiny")
    assert (config.logger.name, config.logger.mode, config.resume) == ("wandb", "offline", None)
    assert train("resume=runs/mine", learner=refuse)[1].startswith("already trained: runs/mine")
    assert train("resume=runs/mine", *words, learner=refuse)[0] == 0  # changes nothing
    code, error = train("resume=runs/mine", "workers=1", "trainer.checkpoint=whole")
    rule = "has no steps left to train, so workers, trainer.checkpoint would change nothing"
    advice = "Give trainer.max_steps above 2048, or leave it out"
    assert (code, error) == (2, f"train.py: resume=runs/mine: {rule}. {advice}.\n")
    assert train("resume=runs/mine", "trainer.max_steps=3k", learner=stop_after_7)[0] == 130


def test_a_name_that_another_run_has_is_refused(train):
    train("name=mine")
    code, error = train("name=mine", "seed=1", "optim.lr=0.5")
    assert code == 2
    assert "another run, which differs in optim.lr, seed" in error
    assert train("name=mine", "seed=1", "fresh=true")[0] == 0
    assert sorted(os.listdir("runs")) == ["mine", "mine-2"]


def test_a_run_in_progress_is_refused(train):
    train("name=mine", learner=stop_after_7)
    with only_run().lock():
        code, error = train("name=mine")
    assert code == 2
    assert f"already being trained by process {os.getpid()}" in error


def test_a_further_rank_neither_locks_nor_records(train, monkeypatch):
    train("name=mine", learner=stop_after_7)
    monkeypatch.setenv("LOCAL_RANK", "1")
    before, seen = only_run().info, []
    with only_run().lock():
        assert train("resume=runs/mine", learner=lambda *given: seen.append(given))[0] == 0
    assert len(seen) == 1
    assert only_run().info == before


def test_a_late_refusal_leaves_no_folder(train, tmp_path):
    code, error = train(learner=refuse)
    assert code == 2
    assert error.splitlines()[-1] == "train.py: heads=3: must divide width=64."
    assert set(os.listdir(tmp_path)) <= {".data"}


def test_a_failure_on_the_way_is_recorded(train):
    def learner(config, folder, *_):
        raise ZeroDivisionError("step 3")

    with pytest.raises(ZeroDivisionError):
        train(learner=learner)
    info = only_run().info
    assert (info["status"], info["reason"]) == ("failed", "ZeroDivisionError: step 3")


def test_a_full_disk_on_the_way_is_one_line(train):
    def learner(config, folder, *_):
        folder.update(step=3)
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/checkpoints/last.ckpt")

    code, error = train(learner=learner)
    assert code == 2
    message = "runs/x/checkpoints/last.ckpt: No space left on device"
    assert error.splitlines()[1:] == [f"train.py: {message}"]
    assert only_run().info["reason"] == message


def test_a_failing_arm_does_not_stop_the_sweep(train, tmp_path):
    def learner(config, folder, *_):
        if config.model.name == "mamba" and config.seed == 1:
            raise ValueError("no such width")
        learn(config, folder)

    sweep = ("-m", "model=transformer,mamba", "seed=0,1", "trainer.accumulate_grad_batches=2")
    code, error = train(*sweep, learner=learner)
    assert code == 1
    *_, head, line = error.splitlines()
    assert head == "train.py: 1 of 4 arms failed:"
    assert "model=mamba seed=1" in line
    assert line.endswith(": no such width")
    assert error.count("no such width") == 1
    runs = find_runs("runs/*", "runs")
    assert sorted(run.info["status"] for run in runs) == ["done", "done", "done", "failed"]
    assert [run.info["reason"] for run in runs if run.info["reason"]] == ["no such width"]
    assert all(run.config.trainer.accumulate_grad_batches == 2 for run in runs)
    assert sorted(set(os.listdir(tmp_path)) - {".data"}) == ["runs"]
    assert {Path(file).name for file in files_below(Path("runs/.sweeps"))} == {"multirun.yaml"}


def test_sweeps_that_begin_in_one_second_have_a_record_each(train):
    for seeds in ("0,1", "2,3"):
        assert train("-m", f"seed={seeds}")[0] == 0
    sweeps: dict[str, set[int]] = {}
    for run in find_runs("*", "runs"):
        sweeps.setdefault(run.info["sweep"], set()).add(run.config.seed)
    assert sorted(map(sorted, sweeps.values())) == [[0, 1], [2, 3]]
    assert {path.parent.name for path in Path("runs/.sweeps").glob("*/multirun.yaml")} == {*sweeps}


def test_accepting_other_code_where_there_is_none_is_said(train):
    for said in ("is a new run, which no", "was trained by this code, there"):
        code, error = train("changed_code=accept")
        assert code == 0
        (line,) = [line for line in error.splitlines() if line.startswith("changed_code=accept: ")]
        assert said in line


def test_a_stopped_sweep_goes_on_by_the_same_command(train):
    def learner(config, folder, *_):
        (stop_after_7 if config.seed == 1 else learn)(config, folder)

    assert train("-m", "seed=0,1,2", learner=learner)[0] == 130
    assert sorted(run.info["status"] for run in find_runs("*", "runs")) == ["done", "stopped"]
    code, error = train("-m", "seed=0,1,2")
    assert code == 0
    assert error.count("already trained") == 1
    assert "training transformer from step=00000007.ckpt" in error
    assert {run.info["status"] for run in find_runs("*", "runs")} == {"done"}


def test_an_experiment_runs_its_arms_under_its_options(train):
    code, _ = train("-m", "experiment=compare", "seed=3")
    assert code == 0
    runs = find_runs("runs/compare/*", "runs")
    assert [run.config.model.name for run in runs] == ["alibi", "mamba", "transformer"]
    assert {run.config.seed for run in runs} == {3}
    code, error = train("-m", "experiment=compare", "model=mmaba")
    assert code == 2
    assert error.startswith("train.py: model=mmaba: unknown model. ")


def edit_code(monkeypatch, **files: str) -> None:
    """As if these files of the package had changed since."""
    real = zoo.runs.claim.sources
    monkeypatch.setattr(
        zoo.runs.claim, "sources", lambda *given, **more: real(*given, **more) | files
    )


@pytest.mark.parametrize("learner", [stop_after_7, stop_before_7_is_noted])
def test_a_run_that_has_steps_does_not_go_on_with_another_text(learner, train):
    train("name=mine", learner=learner)
    only_run().update(fingerprint="its own")
    zoo.runs.claim.check_data("text", "its own", only_run())
    with pytest.raises(UserError, match="is not the text that runs/mine was trained on"):
        zoo.runs.claim.check_data("text", "another", only_run())


def test_weights_that_other_code_made_are_not_already_trained(train, monkeypatch):
    train("name=mine")
    before = only_run().info["sources"]
    edit_code(monkeypatch, **{"zoo/mixers/softmax.py": "corrected"})
    code, error = train("name=mine", learner=refuse)
    assert code == 2
    assert "mine: was trained by other code (zoo/mixers/softmax.py changed since)" in error
    assert "Use fresh=true to train a new run beside it" in error
    assert only_run().info["sources"] == before
    assert train("name=mine", "fresh=true")[0] == 0
    assert RunFolder.open("runs/mine-2").info["sources"] != before
    assert train("name=mine", "changed_code=accept", learner=refuse)[0] == 0  # nothing to train


@pytest.mark.parametrize("learner", [stop_after_7, stop_before_7_is_noted])
def test_a_run_goes_on_under_other_code_only_when_accepted_and_says_so(learner, train, monkeypatch):
    train("name=mine", learner=learner)
    before = only_run().info["sources"]
    edit_code(monkeypatch, **{"zoo/model/backbone.py": "changed"})
    for words in (["resume=runs/mine"], ["name=mine"]):
        code, error = train(*words, learner=refuse)
        assert code == 2
        assert "was trained by other code (zoo/model/backbone.py changed since)" in error
    code, error = train("resume=runs/mine", "changed_code=accept")
    assert code == 0
    assert "zoo/model/backbone.py changed since), which changed_code=accept allows" in error
    info = only_run().info
    assert info["earlier_sources"] == [{"sources": before, "until_step": 7}]
    assert zoo.runs.claim.trained_by(info) == f"{before}+{info['sources']}"
    assert train("resume=runs/mine")[1].startswith("already trained")  # the word was for one time


def test_a_run_of_before_the_record_goes_on_and_says_that_its_code_is_unknown(train):
    train("name=mine", learner=stop_after_7)
    file = Path("runs/mine/run.json")
    kept = {"status", "reason", "step", "tokens_seen", "commit", "versions"}
    old = {key: value for key, value in json.loads(file.read_text()).items() if key in kept}
    file.write_text(json.dumps(old))
    config = Path("runs/mine/config.yaml")
    config.write_text(config.read_text().partition("\n")[2])  # nor had that a hash
    code, error = train("resume=runs/mine")
    assert code == 0
    assert "what code trained it is not known" in error
    assert zoo.runs.claim.trained_by(only_run().info) is None


def test_a_refusal_on_the_way_puts_back_what_was_recorded(train, monkeypatch):
    train("name=mine", learner=stop_after_7)
    before = only_run()
    config, info = before.config, before.info

    def other_text(config, folder, *_):
        raise UserError("data=stdlib: is not the text. Give that.")

    edit_code(monkeypatch, **{"zoo/model/backbone.py": "changed"})
    words = ["trainer.max_steps=2k", "changed_code=accept"]
    assert train("resume=runs/mine", *words, learner=other_text)[0] == 2
    assert only_run().config == config
    assert only_run().info["sources"] == info["sources"]


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_in_silence(train):
    train("name=mine", learner=stop_after_7)
    for file in Path("runs/mine/checkpoints").iterdir():
        file.unlink()
    for words in (["resume=runs/mine"], ["name=mine"]):
        code, error = train(*words, learner=refuse)
        assert code == 2
        assert "mine: has lost the checkpoints of its 7 steps" in error


def test_a_run_goes_on_where_nobody_reads_its_lines(monkeypatch):
    """A closed pipe is no reason to fail: of a tuning, it would count against the rate."""
    read, write = os.pipe()
    os.close(read)
    with contextlib.suppress(BrokenPipeError), os.fdopen(write, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        say("a line")
        say("another")
        assert sys.stderr is not closed
        monkeypatch.undo()
