"""How the cost of every architecture grows: a training step by length, a decoded token by prompt.

    python kernels/bench/growth.py [--models NAME ...] [--lengths 8192 65536] [--json FILE]

Every `configs/model/*.yaml` at size small, sized as `match=params` sizes it and with the windows
that training at 1024 tokens gives it, one sequence of bytes.
A step is forward, loss and backward. Each architecture has a process of its own, so that peak
memory is its own; there the two lengths (the two prompts) take turns, and the figure is the median
of the ratios. Cost and memory grow as length^exponent; 1 is linear. Memory is what a step adds to
the process at its peak.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import record

from zoo.config.compose import compose
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.ops.runtime.allocator import tune_allocator

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 256
TRAINED = 1024  # seq_len, xPos's window
PROMPTS = (1024, 16384)
DECODED = 64  # tokens per turn


def build(name: str, length: int) -> Backbone:
    config = compose("train", [f"model={name}", "size=small", f"seq_len={length}"])
    torch.manual_seed(0)
    return build_model(config, VOCABULARY)[0]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def memory(field: str) -> int:
    """Bytes of this process by /proc; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(field)), 0)


def growth(name: str, lengths: list[int], rounds: int) -> dict:
    """Seconds of a step at each length, in turns, and the memory each adds at its peak."""
    model = build(name, TRAINED)

    def step(length: int) -> None:
        model.loss(torch.randint(VOCABULARY, (1, length + 1))).backward()
        model.zero_grad()

    step(256)
    before, peaks = memory("VmRSS"), {}
    for length in sorted(lengths):  # the first turn warms up and measures the memory
        step(length)
        peaks[length] = memory("VmHWM") - before
    times = [
        {length: seconds(lambda n=length: step(n)) for length in lengths} for _ in range(rounds)
    ]
    short, long = min(lengths), max(lengths)
    ratio = statistics.median(turn[long] / turn[short] for turn in times)
    octaves = math.log(long / short)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_s": {str(n): min(turn[n] for turn in times) for n in lengths},
        "peak_bytes": {str(n): peaks[n] for n in lengths},
        "exponent": math.log(ratio) / octaves,
        "memory_exponent": math.log(peaks[long] / peaks[short]) / octaves if before else None,
    }


def decode(name: str, rounds: int) -> dict:
    """Milliseconds per token one by one after each prompt, in turns."""
    model = build(name, TRAINED).eval().requires_grad_(False)
    states = {n: model(torch.randint(VOCABULARY, (1, n)), model.empty_state(1))[1] for n in PROMPTS}

    def turn(prompt: int) -> None:
        for _ in range(DECODED):
            _, states[prompt] = model(torch.zeros(1, 1, dtype=torch.long), states[prompt])

    times = [{n: seconds(lambda n=n: turn(n)) for n in PROMPTS} for _ in range(rounds + 1)][1:]
    short, long = PROMPTS
    return {
        "decode_ms": {str(n): min(t[n] for t in times) / DECODED * 1e3 for n in PROMPTS},
        "decode_ratio": statistics.median(t[long] / t[short] for t in times),
        "state_bytes": {str(n): model.state_bytes(n) for n in PROMPTS},
    }


def measure(name: str, lengths: list[int], rounds: int) -> dict:
    """The row of one architecture; quadratic ones are not read at the longest length."""
    tune_allocator()
    recurrent = build(name, TRAINED).recurrent
    row = {"model": name, "recurrent": recurrent}
    if recurrent:
        row |= growth(name, lengths, rounds)
    return row | decode(name, 2 * rounds + 1)


def apart(name: str, options: argparse.Namespace) -> dict:
    """`measure` in a process of its own; one that fails keeps its row."""
    words = [
        "--one",
        name,
        "--rounds",
        str(options.rounds),
        "--lengths",
        *map(str, options.lengths),
    ]
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, env={**os.environ}
    )
    if done.returncode:
        return {"model": name, "failed": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def line(row: dict) -> str:
    if "failed" in row:
        return f"{row['model']:16} failed: {row['failed']}"
    figures = [f"decode {' '.join(f'{ms:.2f}' for ms in row['decode_ms'].values())} ms"]
    figures += [f"ratio {row['decode_ratio']:.2f}"]
    if row["recurrent"]:
        spent = " ".join(f"{s:.2f}" for s in row["step_s"].values())
        figures = (
            [f"step {spent} s", f"exponent {row['exponent']:.2f}"]
            + ([f"memory {row['memory_exponent']:.2f}"] if row["memory_exponent"] else [])
            + figures
        )
    return f"{row['model']:16} {'recurrent' if row['recurrent'] else 'growing':10}" + "  ".join(
        figures
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = sorted(path.stem for path in (ROOT / "configs/model").glob("*.yaml"))
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--lengths", type=int, nargs=2, default=[8192, 65536])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in the fresh process
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(options.one, options.lengths, options.rounds)) + "\n")
        return
    rows = []
    for name in options.models:
        rows.append(apart(name, options))
        sys.stdout.write(line(rows[-1]) + "\n")
        sys.stdout.flush()
    record(options.json, lengths=options.lengths, prompts=PROMPTS, rows=rows)


if __name__ == "__main__":
    main()
