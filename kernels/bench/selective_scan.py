"""Selective scan, convolution, norm, rotations, merges: in C, in PyTorch, and public forms.

    python kernels/bench/selective_scan.py [--lengths 8192 65536] [--rounds 3] [--runs 3]
        [--json FILE]

float32, one sequence, width 256, state 16, heads of 32. All forms take turns in one process on the
same threads, so that a ratio means something on a machine that others use; a process lays memory
out once, so there are several. A time is the least of a run's rounds, a ratio their median; the
table shows the median run, and the range of the ratio over all rounds of all runs. The file has
every round. Memory is the growth of a fresh process over its inputs.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import processor, record

from zoo.ops.causal_conv import causal_conv
from zoo.ops.merge import merge
from zoo.ops.rms_norm import rms_norm
from zoo.ops.rotary import apply_rotary
from zoo.ops.runtime.allocator import tune_allocator
from zoo.ops.selective_scan import selective_scan

try:
    from mambapy.pscan import pscan
except ImportError:
    pscan = None

WIDTH, STATE, WINDOW, HEAD = 256, 16, 4, 32
MAMBAPY_BYTES = 140_000  # a token; it keeps several (t, d, n) tensors: 9 GB at 65536


def scan_inputs(length: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """x, dt, A, B, C, D with the steps and rates of a fresh Mamba layer."""
    torch.manual_seed(0)
    x, dt = torch.randn(1, length, WIDTH), torch.randn(1, length, WIDTH) * 0.5 - 4
    A = -torch.arange(1.0, STATE + 1).repeat(WIDTH, 1)
    B, C = torch.randn(2, 1, length, STATE)
    tensors = (x, dt, A, B, C, torch.ones(WIDTH))
    return tuple(a.to(dtype).requires_grad_() for a in tensors)


def conv_inputs(length: int) -> tuple[torch.Tensor, ...]:
    """x, weight, bias"""
    torch.manual_seed(0)
    shapes = [(1, length, WIDTH), (WIDTH, WINDOW), (WIDTH,)]
    return tuple(torch.randn(shape).requires_grad_() for shape in shapes)


def norm_inputs(length: int) -> tuple[torch.Tensor, ...]:
    """x, weight"""
    torch.manual_seed(0)
    return torch.randn(1, length, WIDTH).requires_grad_(), torch.ones(WIDTH).requires_grad_()


def rotary_inputs(length: int) -> tuple[torch.Tensor, ...]:
    """x"""
    torch.manual_seed(0)
    return (torch.randn(1, length, WIDTH // HEAD, HEAD).requires_grad_(),)


def merge_inputs(length: int) -> tuple[torch.Tensor, ...]:
    """out and lse of two parts"""
    torch.manual_seed(0)
    shapes = [(1, length, WIDTH // HEAD, HEAD), (1, length, WIDTH // HEAD)] * 2
    return tuple(torch.randn(shape).requires_grad_() for shape in shapes)


def mambapy_scan(x, dt, A, B, C, D):
    """The scan as users of mambapy write it around its `pscan`."""
    assert pscan is not None
    step = F.softplus(dt)
    decays = torch.exp(step.unsqueeze(-1) * A)
    hs = pscan(decays, (step * x).unsqueeze(-1) * B.unsqueeze(2))
    return (hs @ C.unsqueeze(-1)).squeeze(-1) + D * x


def conv1d_silu(x, weight, bias):
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=WINDOW - 1, groups=WIDTH)
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


INPUTS = {
    "selective_scan": scan_inputs,
    "causal_conv": conv_inputs,
    "rms_norm": norm_inputs,
    "rotary": rotary_inputs,
    "merge": merge_inputs,
}


def forms(op: str, length: int) -> dict[str, Callable]:
    if op == "rms_norm":
        return {
            name: lambda *a, name=name: rms_norm(*a, 1e-6, name) for name in ("native", "torch")
        }
    if op == "rotary":
        cos, sin = torch.randn(2, length, 1, HEAD // 2)
        return {
            name: lambda x, name=name: apply_rotary(x, cos, sin, name).flatten(2)
            for name in ("native", "torch", "reference")
        }
    if op == "merge":
        return {
            name: lambda a, b, c, d, name=name: merge([(a, b), (c, d)], name)[0].flatten(2)
            for name in ("native", "torch")
        }
    if op == "causal_conv":
        return {"native": lambda *a: causal_conv(*a, backend="native")[0], "conv1d": conv1d_silu}
    found: dict[str, Callable] = {
        name: lambda *a, name=name: selective_scan(*a, backend=name)[0]
        for name in ("native", "torch")
    }
    if pscan is not None and length * MAMBAPY_BYTES < memory("/proc/meminfo", "MemTotal") / 2:
        found["mambapy"] = mambapy_scan
    return found


def seconds(form: Callable, inputs: tuple, dy: torch.Tensor | None) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(dy is not None):
        y = form(*inputs)
    if dy is not None:
        torch.autograd.grad(y, inputs, dy)
    return time.perf_counter() - start


def compare(op: str, length: int, rounds: int) -> list[dict]:
    """A row per form: milliseconds and how many times longer than native it takes, each round."""
    inputs = INPUTS[op](length)
    dy, rows = torch.randn(1, length, WIDTH), []
    found = forms(op, length)
    for phase, gradient in (("forward", None), ("forward+backward", dy)):
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(rounds + 1):  # the first only warms up
            for name, form in found.items():
                times[name].append(seconds(form, inputs, gradient))
        for name, spent in times.items():
            pairs = zip(spent[1:], times["native"][1:], strict=True)
            row = {"op": op, "length": length, "phase": phase, "form": name}
            row["round_ms"] = [one * 1e3 for one in spent[1:]]
            rows.append(row | {"round_ratios": [one / native for one, native in pairs]})
    return rows


def summary(runs: list[list[dict]]) -> list[dict]:
    """The rows of all runs in one: the median run's time and ratio, and the range of ratios."""
    rows = []
    for same in zip(*runs, strict=True):
        row = {k: v for k, v in same[0].items() if not k.startswith("round")}
        row["ms"] = statistics.median(min(r["round_ms"]) for r in same)
        row["run_ratios"] = [statistics.median(r["round_ratios"]) for r in same]
        row["times_native"] = statistics.median(row["run_ratios"])
        every = [ratio for r in same for ratio in r["round_ratios"]]
        rows.append(row | {"lowest": min(every), "highest": max(every)})
    return rows


def memory(file: str, field: str) -> float:
    """Bytes by /proc (getrusage's peak would include the parent's); without it, no bound."""
    if not Path(file).exists():
        return math.inf
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_growth(length: int) -> int:
    """Bytes that one native forward and backward add to this process at their peak."""
    native, dy = forms("selective_scan", length)["native"], torch.randn(1, length, WIDTH)
    seconds(native, scan_inputs(64), dy[:, :64])  # loads the library, starts the threads
    inputs = scan_inputs(length)
    before = memory("/proc/self/status", "VmRSS")
    seconds(native, inputs, dy)
    return int(memory("/proc/self/status", "VmHWM") - before)


def gradient_errors(length: int = 1024) -> dict[str, float]:
    """||native float32 - reference float64|| / ||reference float64|| of each gradient."""
    dy, gradients = torch.randn(1, length, WIDTH), {}
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        inputs = scan_inputs(length, dtype)
        y, _ = selective_scan(*inputs, backend=backend)
        gradients[backend] = torch.autograd.grad(y, inputs, dy.to(dtype))
    names = ["x", "dt", "A", "B", "C", "D"]
    pairs = zip(names, gradients["native"], gradients["reference"], strict=True)
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in pairs}


def in_fresh_process(*words: str) -> Any:
    command = [sys.executable, __file__, *words]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=["run", "peak"], help=argparse.SUPPRESS)  # fresh process
    options = parser.parse_args()
    tuned = tune_allocator() if options.one != "peak" else None
    if options.one == "run":
        pairs = [(op, length) for op in INPUTS for length in options.lengths]
        rows = [row for op, length in pairs for row in compare(op, length, options.rounds)]
        sys.stdout.write(json.dumps(rows))
        return
    longest = max(options.lengths)
    if options.one == "peak":
        sys.stdout.write(str(peak_growth(longest)))
        return
    words = ["--lengths", *map(str, options.lengths), "--rounds", str(options.rounds)]
    runs = [in_fresh_process("--one", "run", *words) for _ in range(options.runs)]
    peak = None
    if Path("/proc/self/status").exists():
        peak = in_fresh_process("--one", "peak", *words)
    errors = gradient_errors()
    rows = summary(runs)
    record(
        options.json,
        allocator=tuned,
        rows=rows,
        peak_bytes=peak,
        gradient_errors=errors,
        runs=runs,
    )
    lines = [
        f"{processor()}, {torch.get_num_threads()} threads, width {WIDTH}, state {STATE}, float32, "
        f"{options.runs} runs of {options.rounds} rounds",
        f"{'op':15} {'tokens':>7} {'phase':17} {'form':8} {'ms':>9} {'x native':>9}  range",
    ]
    lines += [
        f"{r['op']:15} {r['length']:7} {r['phase']:17} {r['form']:8} {r['ms']:9.1f} "
        f"{r['times_native']:9.1f}  {r['lowest']:.1f} - {r['highest']:.1f}"
        for r in rows
    ]
    if peak is not None:
        lines += [f"memory of native forward+backward at {longest}: {peak / 1e9:.2f} GB"]
    lines += ["gradient error: " + ", ".join(f"d{k} {v:.0e}" for k, v in errors.items())]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
