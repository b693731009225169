"""A run whose measurements end their process is a failed one; the others are measured."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_evaluate import run_folder

from zoo.errors import RunError, UserError
from zoo.runs.folder import RunFolder
from zoo.tasks.isolation import Begun, Measured, measure_each

CRASHING = Path(__file__).with_name("crashing.py")


@pytest.mark.parametrize("report", ["null", pytest.param("page.html", marks=pytest.mark.slow)])
def test_a_model_that_kills_itself_costs_its_own_rows_alone(report, tmp_path):
    runs, names = tmp_path / "runs", ("a", "broken", "killed", "z")
    for name in names:
        run_folder(runs / name)
    words = ["run=any", "task=perplexity", f"report={report}", "runs=.", "task.perplexity.units=4"]
    words += ["task.perplexity.lengths=[32,128]", "task.perplexity.chunk=128"]
    done = subprocess.run(
        [sys.executable, str(CRASHING), str(runs), *words],
        **{"cwd": tmp_path, "capture_output": True, "text": True},
    )
    assert done.returncode == 1, done.stderr
    kept = {name: RunFolder.open(runs / name).rows() for name in names}
    for name in "az":
        assert {row["length"] for row in kept[name]} == {32, 128}
        assert {row["status"] for row in kept[name]} == {"ok"}
    (row,) = kept["broken"]  # which could not even be opened
    assert (row["run"], row["task"], row["status"]) == ("broken", "perplexity", "failed")
    assert row["reason"] == "AssertionError: this cannot be"
    (row,) = kept["killed"]  # the latest of two
    assert (row["run"], row["task"], row["status"]) == ("killed", "perplexity", "failed")
    assert row["reason"].startswith("the process was ended by SIGKILL")
    assert row["train_steps"] == 300
    assert row["time"]
    assert done.stderr.count("Traceback") == 2  # of what nobody foresaw, in both evaluations
    killed = "the process was ended by SIGKILL (the system does this when memory runs out)"
    for name, reason in (("killed", killed), ("broken", "AssertionError: this cannot be")):
        assert done.stderr.count(f"/{name}: failed: {reason}\n") == 2
        assert f") failed: {reason}" in done.stdout
    assert (tmp_path / "page.html").exists() == (report != "null")


def crashing(at: str):
    """A function that is called here and "crashes" at a run, as often as it comes to it."""

    def apart(function, *arguments):
        try:
            function(*arguments)
        except KeyboardInterrupt:
            raise RunError(f"ended at {at}") from None

    def measure(folder):
        yield {"run": folder.name, "arm": "x"}
        yield Begun({"run": folder.name}, ["first", "second", "third"])
        yield {"row": 1}
        yield Begun({"run": folder.name}, ["second", "third"])
        if folder.name == at:
            raise KeyboardInterrupt
        yield Measured({"run": folder.name}, [{"row": 1}])

    return apart, lambda: measure


@pytest.mark.parametrize("at", ["a", "b", "c"])
def test_what_was_found_before_the_crash_is_kept_in_order(at, tmp_path):
    folders = [RunFolder(tmp_path / name) for name in "abc"]
    for folder in folders:
        folder.path.mkdir()
    apart, prepare = crashing(at)
    found = [*measure_each(prepare, folders, apart)]
    assert [one.record["run"] for one in found] == ["a", "b", "c"]
    for one in found:
        failed = one.record["run"] == at
        assert one.rows[0] == {"row": 1}
        assert len(one.rows) == 1 + 2 * failed
        if failed:
            assert one.rows[1]["reason"] == f"ended at {at}"
            assert (one.rows[1]["run"], one.rows[1]["status"]) == (at, "failed")
            kept = folders["abc".index(at)].rows()
            assert [row["task"] for row in kept] == ["second", "third"]
            assert [row | {"time": kept[0]["time"]} for row in one.rows[1:]] == kept
    assert sum(len(folder.rows()) for folder in folders) == 2


def test_what_cannot_begin_is_reported_at_once(tmp_path):
    def prepare():
        raise UserError("device=foo: is not available here. Use device=auto.")

    with pytest.raises(UserError, match="device=foo"):
        [*measure_each(prepare, [RunFolder(tmp_path)])]
