"""Recurrences with a vector for a state: ours in C, in PyTorch, and as loops over the tokens.

    python kernels/bench/recurrences.py [--ops wkv4 ..] [--lengths 8192 65536] [--rounds 5]
                                        [--json FILE]

WKV of RWKV-4, the window of AFT-conv and the gated linear recurrence of Hawk; float32, one
sequence, width 256; AFT with 32 biases per channel. All forms take turns in one process on the same
threads, so that a ratio (median over rounds) means something on a machine that others use; the
times are the least of the rounds. A loop runs over LOOP tokens and its time is multiplied up, which
flatters it: over more it keeps more alive. `GB/s` are the bytes that must move, three sequences
forward and five more backward, over the time; a plain copy of one sequence into another takes its
turn beside them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from record import processor, record

from zoo.ops.aft import aft_window
from zoo.ops.linear_recurrence import linear_recurrence
from zoo.ops.runtime.allocator import tune_allocator
from zoo.ops.wkv4 import wkv4

WIDTH, TAPS, LOOP = 256, 32, 1024
OPS = {"wkv4": wkv4, "aft_window": aft_window, "linear_recurrence": linear_recurrence}
FORMS = {"native": "native", "torch": "torch", "loop": "reference"}  # form -> backend
PHASES = {"forward": 3, "forward+backward": 8}  # and the sequences it must move


def inputs(op: str, length: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """What a fresh layer in the middle of a model has: k, v, w and u of WKV, k, v and w of AFT; of
    the linear recurrence a, with the RG-LRU's gate half open, and u.
    """
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, length, WIDTH)
    if op == "wkv4":
        share = torch.arange(WIDTH) / (WIDTH - 1)
        found = [k, v, torch.exp(-5 + 8 * share**1.35), torch.randn(WIDTH)]
    elif op == "aft_window":
        found = [k, v, torch.randn(1, WIDTH, TAPS)]
    else:
        found = [torch.empty(WIDTH).uniform_(0.9, 0.999) ** torch.sigmoid(k), v]
    return tuple(a.to(dtype).requires_grad_() for a in found)


def seconds(op: str, form: str, length: int, gradient: bool) -> float:
    """Of one call, for a loop as if it went on as over its first LOOP tokens.

    It follows an untimed one: the forms before may have given their memory back to the system.
    """
    tokens = min(length, LOOP) if form == "loop" else length
    arguments, dy = inputs(op, tokens), torch.ones(1, tokens, WIDTH)
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.set_grad_enabled(gradient):
            y, _ = OPS[op](*arguments, backend=FORMS[form])
        if gradient:
            torch.autograd.grad(y, arguments, dy)
        del y
    return (time.perf_counter() - start) * length / tokens


def seconds_to_copy(length: int) -> float:
    source, target = torch.zeros(2, length, WIDTH)
    start = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - start


def bandwidth(sequences: int, length: int, spent: float) -> float:
    """GB/s of so many float32 sequences."""
    return sequences * length * WIDTH * 4 / spent / 1e9


def compare(op: str, length: int, rounds: int) -> list[dict]:
    """A row per form: least milliseconds, and how many times longer than native it takes; and the
    copy's beside them, read and written bytes counted.
    """
    rows, copies = [], []
    for phase, sequences in PHASES.items():
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(rounds + 1):  # the first only warms up
            for form, spent in times.items():
                spent.append(seconds(op, form, length, gradient=phase != "forward"))
            copies.append(seconds_to_copy(length))
        copy = bandwidth(2, length, min(copies))
        for form, spent in times.items():
            pairs = zip(spent[1:], times["native"][1:], strict=True)
            ratio = statistics.median(one / native for one, native in pairs)
            row = {"op": op, "length": length, "phase": phase, "form": form}
            row |= {"ms": min(spent[1:]) * 1e3, "times_native": ratio}
            speed = bandwidth(sequences, length, min(spent[1:]))
            rows.append(row | {"gb_per_s": speed, "copy_gb_per_s": copy})
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
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tuned, errors = tune_allocator(), {op: gradient_errors(op) for op in options.ops}
    rows = [
        row
        for op in options.ops
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
    lines += [
        f"{'op':18}{'tokens':>7}  {'phase':17}{'form':8}{'ms':>10}{'x native':>10}{'GB/s':>7}"
    ]
    lines += [
        f"{r['op']:18}{r['length']:7}  {r['phase']:17}{r['form']:8}{r['ms']:10.1f}"
        f"{r['times_native']:10.1f}{r['gb_per_s']:7.1f} (a copy {r['copy_gb_per_s']:.1f})"
        for r in rows
    ]
    lines += [f"a loop's times are those of {LOOP} tokens, multiplied up"]
    lines += [
        f"gradient errors of {op}, in the order of its arguments: "
        + ", ".join(f"{e:.0e}" for e in found)
        for op, found in errors.items()
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
