"""Tasks of lm-evaluation-harness beside ours: rows, reports, and what is missing."""

import json
import sys

import pytest
from building import train_on_text, write_harness_task

from zoo.cli.eval import main
from zoo.errors import UserError
from zoo.tasks.harness import Harness, _OfHarness, _row

FOUND = {
    "results": {
        "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4},
        "two": {"exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A", "ppl,none": 3.0},
    },
    "groups": {"both": {"acc,none": 0.4}},
    "higher_is_better": {"one": {"acc": True}, "two": {"exact_match": True, "ppl": False}},
    "n-samples": {"one": {"original": 9, "effective": 4}},
    "n-shot": {"one": 2},
}


def test_a_row_has_every_measure_of_its_task_and_says_which_way_is_better():
    declares = _OfHarness(title="harness", about="", quantities=())
    one, two = ({"subtask": name} | _row(name, FOUND) for name in ("one", "two"))
    assert (one["scores.acc"], one["score"], one["count"], one["shots"]) == (0.5, 0.5, 4, 2)
    assert one["standard_errors"] == {"acc_stderr": 0.1}
    (quantity,) = declares.plain(one)["quantities"]
    assert quantity["name"] == "one, acc"
    assert (quantity["better"], quantity["where"]) == ("higher", {"subtask": "one"})
    fields = {each["field"]: each["better"] for each in declares.plain(two)["quantities"]}
    assert fields == {"scores.exact_match (strict)": "higher", "scores.ppl": "lower"}
    assert _row("both", FOUND)["scores.acc"] == 0.4


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="task=harness: needs the package lm-eval"):
        Harness(tasks=["hellaswag"]).check()
    with pytest.raises(UserError, match=r"task\.harness\.tasks=null"):
        Harness().check()


def test_tasks_of_local_files_are_measured_of_a_run_and_reported(tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'zoo[eval]'")
    train_on_text(tmp_path, "trainer.max_steps=2", f"runs={tmp_path / 'runs'}")
    (run,) = (path.parent for path in (tmp_path / "runs").glob("*/run.json"))
    (tmp_path / "tasks").mkdir()
    write_harness_task(tmp_path / "tasks")
    options = [f"run={run}", "task=harness", f"task.harness.include={tmp_path / 'tasks'}"]
    options += ["logger=none", f"report={tmp_path / 'report.html'}"]
    assert main([*options, "task.harness.tasks=[squares]"]) == 0
    (row,) = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert (row["status"], row["subtask"], row["count"]) == ("ok", "squares", 12)
    assert 0 <= row["scores.acc"] <= 1
    assert "squares, acc" in (tmp_path / "report.html").read_text().lower()
    assert main([*options, "task.harness.tasks=[squares]", "extension=dca"]) == 0
    assert len((run / "results.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    assert main([*options, "task.harness.tasks=[no_such_task]"]) == 2
    assert "no_such_task" in capsys.readouterr().err.strip().splitlines()[-1]
