"""Delta rule: the chunked form against the loop, by chunk size, and its cost by length.

    python kernels/bench/delta_rule.py [--lengths 8192 65536] [--rounds 5] [--json FILE]

float32, one sequence, width 128 in heads of 64 channels. `delta` is DeltaNet's rule, `gated` has a
decay per head, `general` is RWKV-7's with a decay per channel. All forms take turns in one process;
times are the least of the rounds. Memory is the growth of a fresh process over its inputs.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from record import processor, record

from zoo.ops import delta_rule as op
from zoo.ops.native import tune_allocator

HEADS, HEAD = 2, 64
KINDS = ["delta", "gated", "general"]
CHUNKS = [16, 32, 64, 128]
SWEEP_LENGTH = 4096  # tokens, of the chunk sizes and of the loop


def inputs(kind: str, length: int) -> dict[str, torch.Tensor]:
    """Arguments of `diagonal_plus_rank_one` as a fresh layer of each kind gives them."""
    torch.manual_seed(0)
    shape = (1, length, HEADS, HEAD)
    q, k, v = torch.randn(3, *shape)
    unit = F.normalize(torch.randn(shape), dim=-1)
    rate = torch.rand(shape[:3] if kind == "gated" else shape)
    if kind == "general":
        found = {"k": k, "a": -unit, "b": torch.rand(shape) * unit, "log_decay": -0.6 * rate}
    else:
        found = {"k": 0.5 * unit, "a": -unit}
    if kind == "gated":
        found["log_decay"] = -rate
    return {name: x.requires_grad_() for name, x in {"q": q, "v": v, **found}.items()}


def seconds(tensors: dict[str, torch.Tensor], backend: str, gradient: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(gradient):
        y, _ = op.diagonal_plus_rank_one(**tensors, backend=backend)
        if gradient:
            torch.autograd.grad(y.sum(), list(tensors.values()))
    return time.perf_counter() - start


def with_chunk(chunk: int, tensors: dict[str, torch.Tensor], gradient: bool) -> float:
    kept, op.CHUNK = op.CHUNK, chunk
    try:
        return seconds(tensors, "torch", gradient)
    finally:
        op.CHUNK = kept


def sweep(kind: str, rounds: int) -> list[dict]:
    """A row per chunk size and one of the loop, at `SWEEP_LENGTH`."""
    tensors, rows = inputs(kind, SWEEP_LENGTH), []
    forms: dict[str, Callable[..., float]] = {str(c): partial(with_chunk, c) for c in CHUNKS}
    forms["loop"] = partial(seconds, backend="reference")
    for phase, gradient in (("forward", False), ("forward+backward", True)):
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(rounds + 1):  # the first only warms up
            for name, form in forms.items():
                times[name].append(form(tensors=tensors, gradient=gradient))
        for name, spent in times.items():
            row = {"kind": kind, "length": SWEEP_LENGTH, "phase": phase, "chunk": name}
            rows.append(row | {"ms": min(spent[1:]) * 1e3})
    return rows


def memory(field: str) -> int:
    """Bytes of this process by /proc (getrusage's peak would include the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_growth(kind: str, length: int) -> int:
    """Bytes that one forward and backward add to this process at their peak."""
    seconds(inputs(kind, 64), "torch", True)
    tensors = inputs(kind, length)
    before = memory("VmRSS")
    seconds(tensors, "torch", True)
    return memory("VmHWM") - before


def by_length(kind: str, lengths: list[int], rounds: int) -> list[dict]:
    rows = []
    for length in lengths:
        tensors = inputs(kind, length)
        spent = min(seconds(tensors, "torch", True) for _ in range(rounds))
        row = {"kind": kind, "length": length, "phase": "forward+backward", "ms": spent * 1e3}
        if Path("/proc/self/status").exists():
            command = [sys.executable, __file__, "--peak", kind, str(length)]
            row["peak_bytes"] = int(
                subprocess.run(command, capture_output=True, check=True, text=True).stdout
            )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # in the fresh process
    options = parser.parse_args()
    if options.peak:
        kind, length = options.peak
        sys.stdout.write(str(peak_growth(kind, int(length))))
        return
    tuned = tune_allocator()
    chunks = [row for kind in KINDS for row in sweep(kind, options.rounds)]
    lengths = [row for kind in KINDS for row in by_length(kind, options.lengths, options.rounds)]
    record(options.json, allocator=tuned, chunks=chunks, lengths=lengths)
    lines = [f"{processor()}, {torch.get_num_threads()} threads, {HEADS} heads of {HEAD}, float32"]
    columns = [*map(str, CHUNKS), "loop"]
    lines += ["", f"ms at {SWEEP_LENGTH} tokens by chunk", f"{'':26}" + _cells(columns)]
    for kind in KINDS:
        for phase in ("forward", "forward+backward"):
            found = [r["ms"] for r in chunks if (r["kind"], r["phase"]) == (kind, phase)]
            lines += [f"{kind:9}{phase:17}" + _cells([f"{ms:.0f}" for ms in found])]
    lines += ["", "forward+backward", f"{'':9}" + _cells(["tokens", "ms", "GB", "exponent"])]
    for kind in KINDS:
        before = None
        for row in (r for r in lengths if r["kind"] == kind):
            peak = f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else ""
            power = f"{_exponent(before, row):.3f}" if before else ""
            lines += [f"{kind:9}" + _cells([str(row["length"]), f"{row['ms']:.0f}", peak, power])]
            before = row
    sys.stdout.write("\n".join(lines) + "\n")


def _cells(values: list[str]) -> str:
    return "".join(f"{value:>10}" for value in values)


def _exponent(first: dict, second: dict) -> float:
    return math.log(second["ms"] / first["ms"]) / math.log(second["length"] / first["length"])


if __name__ == "__main__":
    main()
