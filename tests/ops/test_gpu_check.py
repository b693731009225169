"""The script that a GPU's owner runs works but for the GPU: here the CPU stands in for it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RECORDS = sorted(ROOT.glob("kernels/bench/results/gpu-*.json"))
LONG = 65536  # what README's table shows


@pytest.fixture(scope="module")
def script():
    path = ROOT / "kernels" / "bench" / "gpu_check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    assert spec is not None
    assert spec.loader is not None
    before = list(sys.path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture
def on_cpu(script, monkeypatch):
    """One small size per op; a run takes 2 ms, whatever it takes."""

    def milliseconds(run, repeats=15):
        run()
        return 2.0

    monkeypatch.setattr(script, "DEVICE", "cpu")
    monkeypatch.setattr(script, "CHECKED", SMALL)
    monkeypatch.setattr(script, "milliseconds", milliseconds)
    monkeypatch.setattr(script, "TIMED", (5,))
    monkeypatch.setattr(script, "SCANNED", (5,))
    return script


SMALL = {
    "selective_scan": [(2, 33, 5, 4, 30.0)],
    "causal_conv": [(2, 9, 19)],
    "wkv4": [(2, 33, 7, 1e-4)],
    "aft_window": [(64, 1, 17, 1), (2, 33, 7, 4)],
    "linear_recurrence": [(2, 33, 7)],
}


def test_every_op_is_checked_and_what_is_wrong_is_told(on_cpu, monkeypatch):
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


def test_libraries_are_asked_where_they_are_and_a_failure_is_told(on_cpu, monkeypatch):
    monkeypatch.setattr(on_cpu.libraries, "installed", lambda name: name == "xformers")
    record = {}
    on_cpu.check_libraries(record)
    assert record.pop("xformers").startswith("UserError: attend: xformers is not available")
    assert set(record.values()) == {"not installed"}
    monkeypatch.setitem(on_cpu.LIBRARIES, "xformers", as_reference(on_cpu.LIBRARIES["xformers"]))
    on_cpu.check_libraries(record)
    assert record["xformers"]["right"]


def as_reference(library):
    op, *others = library
    return (lambda backend, **inputs: op(backend="reference", **inputs), *others)


def test_times_become_readmes_table(on_cpu, monkeypatch):
    monkeypatch.setattr(on_cpu, "step_through_time", lambda given: lambda: 0 * given["k"])
    times = {}
    on_cpu.time_ops(times)
    assert {case.split()[0] for case in times} == set(SMALL)
    assert times["wkv4 b=1 t=5"]["differs_from_steps"] == pytest.approx(1.0)
    times = {case.replace("t=5", f"t={LONG}"): row for case, row in times.items()}
    times[f"wkv4 b=1 t={LONG}"]["step_through_time"] = {"forward": 44.0}
    record = {"device": "card", "date": "2026-01-02T03:04", "milliseconds": times}
    record |= {"versions": {"torch": "9", "cuda": "8"}, "ceilings": {"copy_bytes_per_second": 4e12}}
    record["mamba_130m_step"] = {
        "native": {"milliseconds": 100.0},
        "mamba_ssm": {"milliseconds": 130.0},
    }
    text = "\n".join(on_cpu.table(json.loads(json.dumps(record))))
    assert "one card, 2026-01-02, torch 9, CUDA 8" in text
    assert text.count("| 2.00 ms | 2.00 ms |") == len(SMALL)
    assert "steps through time 22.0x (forward); chunked PyTorch 1.0x (forward), 1.0x" in text
    assert "| 100 ms | | with mamba-ssm's kernels 1.30x |" in text


def test_readme_has_the_table_of_the_latest_record(script):
    if not RECORDS:
        pytest.skip("no GPU has been measured yet")
    wanted = "\n".join(script.table(json.loads(RECORDS[-1].read_text()))[2:])
    assert wanted in (ROOT / "README.md").read_text()


def test_without_a_gpu_it_says_so_and_writes_nothing(script, monkeypatch, capsys, tmp_path):
    if script.cuda.absent() is None:
        pytest.skip("there is a GPU")
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out)])
    assert script.main() == 2
    assert not out.exists()
    assert capsys.readouterr().err.endswith("it needs an NVIDIA GPU and torch with CUDA\n")
