"""eval.py hands the runs that it was given to the measurements."""

import sys
import types
from pathlib import Path

from building import ROOT, train_config

from zoo.runs.folder import RunFolder


def test_eval_hands_the_runs_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    from zoo.cli import eval as program

    seen = []

    def evaluate(config, folders, **_):
        seen.append((list(config.task), [folder.name for folder in folders]))
        return 1

    module = types.ModuleType("zoo.tasks.evaluate")
    module.evaluate = evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zoo.tasks.evaluate", module)
    for name in ("a", "b"):
        RunFolder.create(Path("runs") / name, train_config("size=tiny", "logger=none"), {})
    assert program.main(["run=runs/*", "task=speed"]) == 1
    assert seen == [(["speed"], ["a", "b"])]
    assert program.main(["-m", "run=a,b", "task=speed"]) == 1
    assert [names for _, names in seen[1:]] == [["a"], ["b"]]


def test_finished_runs_without_checkpoints_are_refused_before_anything_heavy(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    from zoo.cli import eval as program

    done = {"status": "done", "step": 1}
    for name in ("a", "b"):
        RunFolder.create(Path("runs") / name, train_config("size=tiny", "logger=none"), done)
    for pattern in ("run=a", "run=runs/*"):
        assert program.main([pattern]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("eval.py: run=runs/a")
        assert "has no checkpoint. Train it again" in line


def test_options_that_contradict_one_another_are_refused_before_anything_heavy(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "zoo.tasks.evaluate", None)  # makes an import fail
    from zoo.cli import eval as program

    RunFolder.create(Path("runs/a"), train_config("size=tiny", "logger=none"), {})
    for words, said in (
        ("task=extrapolation sequence_parallel=2", "sequence_parallel=2: task=speed reads"),
        ("extension=dca extension.factor=4", "extension.factor=4: extension=dca has no scaling"),
        ("task=accuracy", "task=accuracy: measures examples of a synthetic task, and data="),
    ):
        assert program.main(["run=a", *words.split()]) == 2
        assert f"eval.py: {said}" in capfd.readouterr().err
