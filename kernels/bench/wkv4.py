"""WKV of RWKV-4 and the window of AFT-conv: ours in C, in PyTorch, and as loops over the tokens.

    python kernels/bench/wkv4.py [--lengths 8192 65536] [--rounds 5] [--json FILE]

float32, one sequence, width 256; AFT with 32 biases per channel. All forms take turns in one
process on the same threads, so that a ratio (median over rounds) means something on a machine that
others use; the times are the least of the rounds. A loop runs over LOOP tokens and its time is
multiplied up, which flatters it: over more it keeps more alive.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from record import processor, record

from zoo.ops.aft import aft_window
from zoo.ops.native import tune_allocator
from zoo.ops.wkv4 import wkv4

WIDTH, TAPS, LOOP = 256, 32, 1024
OPS = {"wkv4": wkv4, "aft_window": aft_window}
FORMS = {"native": "native", "torch": "torch", "loop": "reference"}  # form -> backend


def inputs(op: str, length: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """k, v and w; for WKV, w and u of a fresh RWKV-4 layer in the middle of a model."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, length, WIDTH)
    if op == "wkv4":
        share = torch.arange(WIDTH) / (WIDTH - 1)
        more = [torch.exp(-5 + 8 * share**1.35), torch.randn(WIDTH)]
    else:
        more = [torch.randn(1, WIDTH, TAPS)]
    return tuple(a.to(dtype).requires_grad_() for a in (k, v, *more))


def seconds(op: str, form: str, length: int, gradient: bool) -> float:
    """Of one call, for a loop as if it went on as over its first LOOP tokens."""
    tokens = min(length, LOOP) if form == "loop" else length
    arguments, dy = inputs(op, tokens), torch.ones(1, tokens, WIDTH)
    start = time.perf_counter()
    with torch.set_grad_enabled(gradient):
        y, _ = OPS[op](*arguments, backend=FORMS[form])
    if gradient:
        torch.autograd.grad(y, arguments, dy)
    return (time.perf_counter() - start) * length / tokens


def compare(op: str, length: int, rounds: int) -> list[dict]:
    """A row per form: least milliseconds, and how many times longer than native it takes."""
    rows = []
    for phase, gradient in (("forward", False), ("forward+backward", True)):
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(rounds + 1):  # the first only warms up
            for form, spent in times.items():
                spent.append(seconds(op, form, length, gradient))
        for form, spent in times.items():
            pairs = zip(spent[1:], times["native"][1:], strict=True)
            ratio = statistics.median(one / native for one, native in pairs)
            row = {"op": op, "length": length, "phase": phase, "form": form}
            rows.append(row | {"ms": min(spent[1:]) * 1e3, "times_native": ratio})
    return rows


def gradient_errors(op: str, length: int = 1024) -> list[float]:
    """||native float32 - reference float64|| / ||reference float64|| of each gradient."""
    dy, gradients = torch.randn(1, length, WIDTH), {}
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        arguments = inputs(op, length, dtype)
        y, _ = OPS[op](*arguments, backend=backend)
        gradients[backend] = torch.autograd.grad(y, arguments, dy.to(dtype))
    pairs = zip(gradients["native"], gradients["reference"], strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tuned, errors = tune_allocator(), {op: gradient_errors(op) for op in OPS}
    rows = [
        row
        for op in OPS
        for length in options.lengths
        for row in compare(op, length, options.rounds)
    ]
    record(
        options.json,
        allocator=tuned,
        rows=rows,
        gradient_errors=errors,
        loop_extrapolated_from=LOOP,
    )
    lines = [f"{processor()}, {torch.get_num_threads()} threads, width {WIDTH}, float32"]
    lines += [f"{'op':11} {'tokens':>7} {'phase':17} {'form':8} {'ms':>9} {'x native':>9}"]
    lines += [
        f"{r['op']:11} {r['length']:7} {r['phase']:17} {r['form']:8} {r['ms']:9.1f} "
        f"{r['times_native']:9.1f}"
        for r in rows
    ]
    lines += [f"a loop's times are those of {LOOP} tokens, multiplied up"]
    lines += [
        f"gradient errors of {op} (k, v, w ..): {', '.join(f'{e:.0e}' for e in found)}"
        for op, found in errors.items()
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
