"""A text that several processes read together costs what it costs one, and one row says so.

tests/parallel has every architecture and extension, in float64.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from building import ROOT
from test_evaluate import run_eval, run_folder

from zoo.errors import UserError
from zoo.runs.folder import RunFolder

READING = Path(__file__).with_name("reading.py")


def test_rows_of_two_processes_are_those_of_one_and_a_lost_process_is_said(tmp_path):
    runs = tmp_path / "runs"
    models = {"a": "mamba", "b": "transformer", "killed": "transformer", "raises": "transformer"}
    models |= {"first": "transformer", "second": "mamba"}
    for name, model in models.items():
        run_folder(runs / name, f"model={model}")
    words = ["run=any", "task=length_extension", "report=null", "threads=1"]
    words += ["task.perplexity.units=2", "task.perplexity.lengths=[1,32,300]"]
    words += ["task.perplexity.chunk=40", "task.passkey.lengths=[100,101]"]
    words += ["task.passkey.repeats=2", "task.passkey.depths=3", "task.passkey.candidates=3"]
    words += ["task.passkey.chunk=40"]
    done = subprocess.run(
        [sys.executable, str(READING), str(runs), *words],
        **{"cwd": tmp_path, "capture_output": True, "text": True},
    )
    assert done.returncode == 1, done.stderr
    kept = {name: RunFolder.open(runs / name).rows() for name in models}
    for name in "ab":
        one, two = ([row for row in kept[name] if row.get("ranks") == n] for n in (None, 2))
        places = [(row["task"], row.get("protocol"), row["length"]) for row in one]
        assert places == [(row["task"], row.get("protocol"), row["length"]) for row in two]
        assert len(places) == 8
        for alone, row in zip(one, two, strict=True):
            if row["task"] == "passkey":
                assert row["status"] == alone["status"] == "ok", row["reason"]
                for of in ("correct_by_depth", "exact_by_depth", "state_bytes", "prompt_flops"):
                    assert row[of] == alone[of]
            elif row["length"] == 1:
                assert row["status"] == "not_applicable"
                assert row["reason"] == "1 tokens cannot be split over 2 processes"
            else:
                assert row["status"] == alone["status"] == "ok", row["reason"]
                assert row["nll_sum"] == pytest.approx(alone["nll_sum"], rel=1e-12)
                assert row["unit_bits"] == pytest.approx(alone["unit_bits"], rel=1e-12)
                assert row["state_bytes"] == alone["state_bytes"]
    for name, reason in (
        ("killed", "process 2 of 2 was ended by SIGKILL"),
        ("raises", "process 1 of 2: RuntimeError: no such layer"),
    ):
        failed = [row for row in kept[name] if row["status"] == "failed"]
        assert [row["task"] for row in failed] == ["perplexity", "passkey"]
        for row in failed:
            assert row["reason"].startswith(reason)
            assert row["ranks"] == 2
    for name, reason in (
        ("first", "process 1 of 2 was ended by SIGKILL"),
        ("second", "process 2 of 2 was ended by SIGKILL"),
    ):
        rows = [row for row in kept[name] if row.get("ranks")]
        failed = [row for row in rows if row["status"] == "failed"]
        assert [row["task"] for row in failed] == ["perplexity", "passkey"]
        assert all(row["reason"].startswith(reason) for row in failed), failed
        found = [row for row in rows if row["status"] == "ok"]
        sessions = {row["length"]: row["session"] for row in found}
        assert len(found) == 6
        # What was found of the longest length is not measured again.
        assert (sessions[300] != sessions[32]) == (name == "second")
        assert sessions[32] == sessions[100] == sessions[101]
    assert "Traceback" not in done.stderr, done.stderr


def test_without_processes_nothing_is_measured(tmp_path):
    folder = run_folder(tmp_path / "a")
    with pytest.raises(UserError, match=r"^sequence_parallel=2: needs processes that are forked"):
        run_eval([folder], "task=perplexity", "sequence_parallel=2")
    assert not folder.rows()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["sequence_parallel=2", "device=cuda"], "device=cuda: sequence_parallel splits"),
        (["sequence_parallel=0"], "sequence_parallel=0: must be"),
        (["sequence_parallel=257"], "sequence_parallel=257: must be"),
    ],
)
def test_the_program_refuses_in_one_line(words, line, tmp_path):
    run_folder(tmp_path / "a")
    command = [sys.executable, str(ROOT / "eval.py"), "run=a", "task=perplexity", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"eval.py: {line}")
