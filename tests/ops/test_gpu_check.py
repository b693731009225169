"""The script that a GPU's owner runs works but for the GPU: here the CPU takes its place."""

import ast
import importlib.util
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zoo.errors import UserError
from zoo.ops.runtime import cuda

ROOT = Path(__file__).parents[2]
RECORDS = sorted(ROOT.glob("kernels/bench/results/gpu-*.json"))
LONG = 65536  # what README's table shows


def loaded(name: str):
    path = ROOT / "kernels" / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    before = list(sys.path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def script():
    return loaded("gpu_check")


@pytest.fixture
def on_cpu(monkeypatch):
    """The steps, with one small size per op; a run takes 2 ms, whatever it takes."""

    def milliseconds(run, repeats=15):
        run()
        return 2.0

    steps = loaded("gpu_steps")
    monkeypatch.setattr(steps, "DEVICE", "cpu")
    monkeypatch.setattr(steps, "CHECKED", SMALL)
    monkeypatch.setattr(steps, "milliseconds", milliseconds)
    monkeypatch.setattr(steps, "TIMED", (5,))
    monkeypatch.setattr(steps, "SCANNED", (5,))
    return steps


SMALL = {
    "selective_scan": [(2, 33, 5, 4, 30.0)],
    "causal_conv": [(2, 9, 19)],
    "wkv4": [(2, 33, 7, 1e-4)],
    "aft_window": [(64, 1, 17, 1), (2, 33, 7, 4)],
    "linear_recurrence": [(2, 33, 7)],
}


def test_every_op_is_checked_and_what_is_wrong_is_reported(on_cpu, monkeypatch):
    record = {}
    torch.manual_seed(0)
    assert on_cpu.check(record), record
    assert len(record) == 3 * sum(map(len, SMALL.values()))
    for name, (op, draw) in on_cpu.OPS.items():

        def slightly_wrong(*args, backend, op=op, **inputs):
            y, last = op(*args, backend=backend, **inputs)
            return (y * 1.02 if backend == "native" else y), last

        monkeypatch.setitem(on_cpu.OPS, name, (slightly_wrong, draw))
        monkeypatch.setattr(on_cpu, "CHECKED", {name: SMALL[name]})
        record = {}
        assert not on_cpu.check(record)
        assert not any(row["right"] for row in record.values())


def test_an_op_that_raises_is_reported_and_the_others_are_checked(on_cpu, monkeypatch):
    def broken(*args, **inputs):
        raise RuntimeError("an illegal memory access\nwas encountered")

    monkeypatch.setitem(on_cpu.OPS, "wkv4", (broken, on_cpu.OPS["wkv4"][1]))
    record = {}
    assert not on_cpu.check(record)
    outcome = "RuntimeError: an illegal memory access was encountered"
    failed = {case: row for case, row in record.items() if not row.get("right")}
    assert {case.split()[0] for case in failed} == {"wkv4"}
    assert {row["error"] for row in failed.values()} == {outcome}
    assert len(record) == 3 * sum(map(len, SMALL.values()))
    times = {}
    assert not on_cpu.time_ops(times, "wkv4")
    assert times == {"wkv4 b=1 t=5": {"error": outcome}}


def test_a_library_is_left_out_where_it_is_missing(on_cpu, monkeypatch):
    monkeypatch.setattr(on_cpu.libraries, "installed", lambda name: name == "xformers")
    with pytest.raises(ModuleNotFoundError, match="mamba-ssm is not installed"):
        on_cpu.run("library mamba_ssm", {})
    with pytest.raises(
        UserError, match=r"^backend=xformers: attend cannot run \(xformers is not available"
    ):
        on_cpu.run("library xformers", {})
    monkeypatch.setitem(on_cpu.LIBRARIES, "xformers", as_reference(on_cpu.LIBRARIES["xformers"]))
    record = {}
    assert on_cpu.run("library xformers", record)
    assert record["xformers"]["right"]


def as_reference(library):
    op, *others = library
    return (lambda backend, **inputs: op(backend="reference", **inputs), *others)


def test_times_become_readmes_table(script, on_cpu):
    record = {"date": "2026-01-02T03:04", "steps": {}}
    for op in script.OPS:
        record[f"times {op}"] = times = {}
        assert on_cpu.run(f"times {op}", times)
        (row,) = times.values()
        record[f"times {op}"] = {f"{op} b=1 t={LONG}": row}
        record[f"accuracy {op}"] = {f"{op} torch.float32 (1, 2)": {"right": True}}
    times = record["times wkv4"]
    times[f"wkv4 b=1 t={LONG}"]["step_through_time"] = {"forward": 44.0}
    record["machine"] = {"device": "card", "copy_bytes_per_second": 4e12}
    record["machine"]["versions"] = {"torch": "9", "cuda": "8"}
    record["mamba_130m_step"] = {
        "native": {"milliseconds": 100.0},
        "mamba_ssm": {"milliseconds": 130.0},
    }
    text = "\n".join(script.table(json.loads(json.dumps(record))))
    assert "one card, 2026-01-02, torch 9, CUDA 8" in text
    assert text.count("| 2.00 ms | 2.00 ms |") == len(SMALL)
    assert "steps through time 22.0x (forward); chunked PyTorch 1.0x (forward), 1.0x" in text
    assert "| 100 ms | | with mamba-ssm's kernels 1.30x |" in text
    record["accuracy wkv4"]["wkv4 torch.float32 (1, 2)"]["right"] = False
    assert "WKV-4" not in "\n".join(script.table(record))  # no time is worth anything of the wrong


def test_a_training_step_keeps_its_figures_before_the_audit(on_cpu, monkeypatch, tmp_path):
    """The audit may be ended with the step."""
    saved = []

    def audit(*_):
        saved.append(json.loads((tmp_path / "found.json").read_text()))
        raise TimeoutError

    def train(_):
        run = tmp_path / "found.runs" / "mamba"
        run.mkdir(parents=True)
        (run / "metrics.csv").write_text("step,loss\n1,5.5\n")
        (run / "run.json").write_text('{"parameters": 7, "status": "training"}')
        fit.audit_trained("model")

    fit = SimpleNamespace(audit_trained=audit)
    source = ast.parse((ROOT / "zoo/training/fit.py").read_text())
    imported = [
        name for node in source.body if isinstance(node, ast.ImportFrom) for name in node.names
    ]
    assert {*vars(fit)} <= {name.name for name in imported}, "the training calls another"
    monkeypatch.setitem(sys.modules, "zoo.training.fit", fit)
    monkeypatch.setitem(sys.modules, "zoo.cli.train", SimpleNamespace(main=train))
    monkeypatch.setattr(on_cpu, "OUT", tmp_path / "found.json")
    with pytest.raises(TimeoutError):
        on_cpu.run("train mamba 32-true", on_cpu.RECORD)
    assert saved[0]["steps"] == [{"step": "1", "loss": "5.5"}]
    assert saved[0]["parameters"] == 7
    assert fit.audit_trained is audit


FOUND = "import json, sys; json.dump({'case': {'error': 'as far as it got'}}, open(%r, 'w')); "
ENDS = {
    "fails": "raise RuntimeError('no such kernel')",
    "is wrong": "sys.exit(4)",
    "lacks a package": "sys.stderr.write('fla is not installed'); sys.exit(3)",
    "hangs": "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)",
    "dies": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "is right": "pass",
}


def test_a_step_that_fails_or_hangs_costs_its_own_time_alone(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.tempfile, "TemporaryDirectory", lambda **_: nullcontext(tmp_path))
    steps = []
    for name, end in ENDS.items():
        code = FOUND % str(tmp_path / f"{name}.json") + end
        limit = 1.0 if name == "hangs" else 20
        steps.append(script.Step(name, limit, (sys.executable, "-c", code)))
    out, written, write = tmp_path / "record.json", [], script._write

    def counting(out, record):
        write(out, record)
        written.append(len(json.loads(out.read_text())["steps"]))

    monkeypatch.setattr(script, "_write", counting)
    began = time.monotonic()
    record = script.run_steps(steps, out)
    assert time.monotonic() - began < 30
    assert {name: outcome["status"] for name, outcome in record["steps"].items()} == {
        "fails": "failed",
        "is wrong": "wrong",
        "lacks a package": "left out",
        "hangs": "timed out",
        "dies": "failed",
        "is right": "right",
    }
    assert record["steps"]["fails"]["reason"] == "RuntimeError: no such kernel"
    assert record["steps"]["dies"]["reason"] == "exit code -11"
    assert all(record[name] == {"case": {"error": "as far as it got"}} for name in ENDS)
    assert written == [1, 2, 3, 4, 5, 6]
    assert json.loads(out.read_text()) == record
    text = "\n".join(script.summary(record))
    assert "timed out" in text
    assert "no answer in 1 s" in text
    assert script.exit_code(record) == 1


def test_only_what_is_right_or_lacks_a_package_counts_as_right(script):
    for status, code in {"right": 0, "left out": 0, "wrong": 1, "timed out": 1}.items():
        steps = {"one": {"status": "right"}, "other": {"status": status}}
        assert script.exit_code({"steps": steps}) == code


def test_no_step_begins_when_the_time_is_over(script, tmp_path):
    steps = [script.Step("late", 20, (sys.executable, "-c", "pass"))]
    record = script.run_steps(steps, tmp_path / "record.json", budget=0.5)
    assert record["steps"]["late"]["status"] == "no time left"
    assert script.exit_code(record) == 1


def test_the_steps_come_in_the_order_of_what_matters(script):
    kinds = list(dict.fromkeys(step.name.partition(" ")[0] for step in script.STEPS))
    assert kinds == [
        *("machine", "build", "accuracy", "sanitizer", "times", "attention", "train"),
        *("decode", "resume", "library", "mamba_130m_step", "other"),
    ]
    assert script.BUDGET <= 480


@pytest.mark.slow
def test_the_whole_order_runs_on_the_cpu(script, tmp_path):
    record = script.run_steps(script.STEPS, tmp_path / "record.json", budget=1200, rehearse=True)
    wrong = {
        name: outcome for name, outcome in record["steps"].items() if outcome["status"] != "right"
    }
    assert {outcome["status"] for outcome in wrong.values()} <= {"left out"}, wrong
    assert {name.partition(" ")[0] for name in wrong} <= {"sanitizer", "library"}
    assert record["resume"]["killed_with"] == -9


def test_the_readme_of_the_kernels_has_the_table_of_the_latest_record(script):
    if not RECORDS:
        pytest.skip("no GPU has been measured yet")
    wanted = "\n".join(script.table(json.loads(RECORDS[-1].read_text()))[2:])
    assert wanted in (ROOT / "kernels/README.md").read_text()


def test_without_a_gpu_it_says_so_and_writes_nothing(script, monkeypatch, capfd, tmp_path):
    if cuda.absent() is None:
        pytest.skip("there is a GPU")
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out)])
    assert script.main() == 2
    assert not out.exists()
    assert capfd.readouterr().err.endswith("it needs an NVIDIA GPU and torch with CUDA\n")
