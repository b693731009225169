"""Builds, checks and times the CUDA kernels on this machine: `make gpu-check`, under 8 minutes.

    python kernels/bench/gpu_check.py [--out FILE]      check and time; FILE is the JSON record
    python kernels/bench/gpu_check.py --table FILE      README's table of a record
    python kernels/bench/gpu_check.py --rehearse        every step in small, on the CPU

Runs from a plain checkout with any Python that has torch 2.11 or newer with CUDA, and nothing else.
Each step of `STEPS` is a process of its own (gpu_steps.py) with a time limit, and runs however the
others fared; the record is written after each, with what a step that was ended had found by then.
A step whose package is missing is left out. Exit code: 0, 1 where a step did not come out right, 2
without a GPU.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("gpu_steps.py")
BUDGET = 480  # seconds, over all steps
# Exit codes of a step, beside 0; 1 is Python's own, of an exception.
CODES = {0: "right", 3: "left out", 4: "wrong"}


class Step(NamedTuple):
    name: str
    limit: float  # seconds
    command: tuple[str, ...] = ()  # the worker's, unless another is given


OPS = ("selective_scan", "causal_conv", "wkv4", "linear_recurrence", "aft_window")
TRAINED = ("mamba bf16-mixed", "mamba 32-true", "transformer bf16-mixed", "gla bf16-mixed")
LIBRARIES = ("mamba_ssm", "causal_conv1d", "fla", "xformers")

# In this order. An op has a step of its own: after a fault a process can do no more on the device.
STEPS = [
    *(Step("machine", 30), Step("build", 60)),
    *(Step(f"accuracy {op}", 30) for op in OPS),
    Step("sanitizer", 40),
    *(Step(f"times {op}", 30) for op in OPS),
    Step("attention", 30),
    *(Step(f"train {what}", 60) for what in TRAINED),
    *(Step("decode", 40), Step("resume", 60)),
    *(Step(f"library {name}", 30) for name in LIBRARIES),
    *(Step("mamba_130m_step", 60), Step("other lengths", 120)),
]


def run_steps(
    steps: Sequence[Step], out: Path, *, budget: float = BUDGET, rehearse: bool = False
) -> dict[str, Any]:
    """Run every step in a process of its own; returns the record, which `out` holds after each."""
    began = time.monotonic()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record: dict[str, Any] = {"date": date, "rehearsed": rehearse, "steps": {}}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        for step in steps:
            left = budget - (time.monotonic() - began)
            if left < 1:
                record["steps"][step.name] = {"status": "no time left", "seconds": 0.0}
            else:
                say(f"--- {step.name}")
                outcome, found = run_step(step, Path(work), min(step.limit, left), rehearse)
                record["steps"][step.name] = outcome
                record[step.name] = found
            _write(out, record)
    return record


def run_step(
    step: Step, work: Path, limit: float, rehearse: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How one step came out, and what it found: all of it, or as far as it got."""
    part, errors = work / f"{step.name}.json", work / f"{step.name}.err"
    flags = ["--rehearse"] if rehearse else []
    command = step.command or (sys.executable, str(WORKER), step.name, str(part), *flags)
    began = time.monotonic()
    with open(errors, "w", encoding="utf-8") as sink:
        # A session of its own: what a step has started ends with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=sink,
            start_new_session=True,
            env=os.environ | {"XDG_CACHE_HOME": str(work / "cache"), "WANDB_MODE": "disabled"},
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with_children(process)
    outcome: dict[str, Any] = {
        "status": status(code),
        "seconds": round(time.monotonic() - began, 1),
    }
    lines = [line for line in errors.read_text("utf-8", "replace").splitlines() if line.strip()]
    if outcome["status"] != "right":
        ended = f"no answer in {limit:.0f} s" if code is None else f"exit code {code}"
        outcome["reason"] = lines[-1] if lines and code is not None else ended
        outcome["stderr"] = lines[-20:]
        say(f"{outcome['status']}: {step.name}: {outcome['reason']}")
    try:
        return outcome, json.loads(part.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return outcome, {}


def status(code: int | None) -> str:
    if code is None:
        return "timed out"
    return CODES.get(code, "failed")


def with_children(process: subprocess.Popen) -> None:
    """End a step's process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write(out: Path, record: dict[str, Any]) -> None:
    draft = out.with_name(f".{out.name}.tmp")
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draft.replace(out)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def summary(record: dict[str, Any]) -> list[str]:
    """A line for each step: how it came out, how long it took, what was wrong."""
    lines = []
    for name, outcome in record["steps"].items():
        why = outcome.get("reason", "")
        lines.append(
            f"{outcome['status']:<13}{outcome['seconds']:6.1f} s  {name}{why and ': '}{why}"
        )
        for case, found in record.get(name, {}).items():
            if isinstance(found, dict) and "error" in found:
                lines.append(f"{'':<24}{case}: {found['error']}")
            if isinstance(found, dict) and found.get("right") is False:
                worst = max(found["errors"].items(), key=lambda item: _size(item[1]))
                lines.append(f"{'':<24}{case}: {worst[0]} {worst[1]:.1e}")
    return lines


def _size(error: float) -> float:
    return error if error == error else float("inf")


def exit_code(record: dict[str, Any]) -> int:
    found = {outcome["status"] for outcome in record["steps"].values()}
    return 0 if found <= {"right", "left out"} else 1


WIDTH, STATES, WKV_WIDTH, RECURRENCE_WIDTH, AFT_WINDOW = 1536, 16, 768, 1024, 32
WORDS = {
    "selective_scan": f"selective scan, {WIDTH} channels, {STATES} states",
    "wkv4": f"WKV-4, {WKV_WIDTH} channels",
    "aft_window": f"AFT, {WKV_WIDTH} channels, window {AFT_WINDOW}",
    "linear_recurrence": f"linear recurrence, {RECURRENCE_WIDTH} channels",
    "causal_conv": f"causal convolution + silu, {WIDTH} channels",
}
AGAINST = {
    "selective_scan_cuda": "mamba-ssm's kernel",
    "step_through_time": "a kernel that steps through time",
    "torch": "chunked PyTorch",
}


def found_by(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """What the steps of a kind have found, together."""
    steps = (found for name, found in record.items() if name.partition(" ")[0] == kind)
    return {case: row for found in steps for case, row in found.items()}


def table(record: dict[str, Any]) -> list[str]:
    """README's table of a record, in Markdown: times of ops whose accuracy came out right."""
    machine, times = record.get("machine", {}), found_by(record, "times")
    versions = machine.get("versions", {})
    copies = machine.get("copy_bytes_per_second", float("nan")) / 1e12
    lines = [
        f"`make gpu-check` on one {machine.get('device')}, {record['date'][:10]}, torch "
        f"{versions.get('torch')}, CUDA {versions.get('cuda')}; bfloat16, one sequence of 65536 "
        f"tokens, medians; copies run at {copies:.2f} TB/s there.",
        "",
        "| what | forward | backward | against |",
        "|---|---|---|---|",
    ]
    wrong = {
        case.split()[0]
        for case, found in found_by(record, "accuracy").items()
        if not found.get("right")
    }
    for name, words in WORDS.items():
        row = times.get(f"{name} b=1 t=65536")
        if row is None or "native" not in row or name in wrong:
            continue
        ours = row["native"]
        rivals = [
            f"{outcome} "
            + ", ".join(f"{row[key][way] / ours[way]:.1f}x ({way})" for way in row[key])
            for key, outcome in AGAINST.items()
            if key in row
        ]
        shown = " | ".join(f"{ours[way]:.2f} ms" for way in ("forward", "backward"))
        lines.append(f"| {words} | {shown} | {'; '.join(rivals)} |")
    step = record.get("mamba_130m_step", {})
    if "native" in step:
        ours = step["native"]["milliseconds"]
        rival = ""
        if "mamba_ssm" in step:
            rival = f"with mamba-ssm's kernels {step['mamba_ssm']['milliseconds'] / ours:.2f}x"
        lines.append(f"| training step of Mamba, 130M parameters | {ours:.0f} ms | | {rival} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, check and time the CUDA kernels.")
    parser.add_argument("--out", type=Path, default=None, help="the JSON record")
    parser.add_argument("--table", type=Path, default=None, help="print the table of a record")
    parser.add_argument("--rehearse", action="store_true", help="in small, on the CPU")
    options = parser.parse_args()
    if options.table:
        say("\n".join(table(json.loads(options.table.read_text(encoding="utf-8")))))
        return 0
    if not options.rehearse:
        probe = subprocess.run([sys.executable, str(WORKER), "present"])
        if probe.returncode:
            return 2
    name = f"gpu-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.json"
    out = options.out or ROOT / "kernels" / "bench" / "results" / name
    record = run_steps(STEPS, out, rehearse=options.rehearse)
    say("\n".join(["", *summary(record), "", *table(record), "", f"written to {out}"]))
    return exit_code(record)


if __name__ == "__main__":
    sys.exit(main())
