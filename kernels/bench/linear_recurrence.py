"""The gated linear recurrence: ours in C, in PyTorch, and as a loop over the tokens.

    python kernels/bench/linear_recurrence.py [--lengths 8192 65536] [--rounds 5] [--json FILE]

float32, one sequence, width 768. All forms take turns in one process on the same threads, so that a
ratio (median over rounds) means something on a machine that others use; the times are the least of
the rounds. A loop runs over LOOP tokens and its time is multiplied up, which flatters it: over more
it keeps more alive. `GB/s` are the bytes that must move, three sequences forward and five more
backward, over the time; a plain copy of one sequence into another takes its turn beside them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from record import processor, record

from zoo.ops.linear_recurrence import linear_recurrence
from zoo.ops.native import tune_allocator

WIDTH, LOOP = 768, 1024
FORMS = {"native": "native", "torch": "torch", "loop": "reference"}  # form -> backend
PHASES = {"forward": 3, "forward+backward": 8}  # and the sequences it must move


def inputs(length: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """a as in a fresh RG-LRU, whose gate is half open, and u."""
    torch.manual_seed(0)
    a = torch.empty(WIDTH).uniform_(0.9, 0.999) ** torch.rand(1, length, WIDTH)
    u = torch.randn(1, length, WIDTH)
    return a.to(dtype).requires_grad_(), u.to(dtype).requires_grad_()


def seconds(form: str, length: int, gradient: bool) -> float:
    """Of one call, for a loop as if it went on as over its first LOOP tokens.

    It follows an untimed one: the forms before may have given their memory back to the system.
    """
    tokens = min(length, LOOP) if form == "loop" else length
    arguments, dh = inputs(tokens), torch.ones(1, tokens, WIDTH)
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.set_grad_enabled(gradient):
            h, _ = linear_recurrence(*arguments, backend=FORMS[form])
        if gradient:
            torch.autograd.grad(h, arguments, dh)
        del h
    return (time.perf_counter() - start) * length / tokens


def seconds_to_copy(length: int) -> float:
    source, target = torch.zeros(2, length, WIDTH)
    start = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - start


def bandwidth(sequences: int, length: int, spent: float) -> float:
    """GB/s of so many float32 sequences."""
    return sequences * length * WIDTH * 4 / spent / 1e9


def compare(length: int, rounds: int) -> tuple[list[dict], float]:
    """A row per form: least milliseconds, and how many times longer than native it takes; and the
    GB/s of a copy, read and written bytes counted.
    """
    rows, copies = [], []
    for phase, sequences in PHASES.items():
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(rounds + 1):  # the first only warms up
            for form, spent in times.items():
                spent.append(seconds(form, length, gradient=phase != "forward"))
            copies.append(seconds_to_copy(length))
        for form, spent in times.items():
            pairs = zip(spent[1:], times["native"][1:], strict=True)
            ratio = statistics.median(one / native for one, native in pairs)
            least = min(spent[1:])
            row = {"length": length, "phase": phase, "form": form, "ms": least * 1e3}
            rows.append(
                row | {"times_native": ratio, "gb_per_s": bandwidth(sequences, length, least)}
            )
    return rows, bandwidth(2, length, min(copies))


def gradient_errors(length: int = 1024) -> list[float]:
    """||native float32 - reference float64|| / ||reference float64|| of each gradient."""
    dh, gradients = torch.randn(1, length, WIDTH), {}
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        arguments = inputs(length, dtype)
        h, _ = linear_recurrence(*arguments, backend=backend)
        gradients[backend] = torch.autograd.grad(h, arguments, dh.to(dtype))
    pairs = zip(gradients["native"], gradients["reference"], strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tuned, errors = tune_allocator(), gradient_errors()
    rows, copies = [], {}
    for length in options.lengths:
        found, copies[length] = compare(length, options.rounds)
        rows += found
    record(
        options.json,
        allocator=tuned,
        rows=rows,
        copy_gb_per_s=copies,
        gradient_errors=errors,
        loop_extrapolated_from=LOOP,
    )
    lines = [f"{processor()}, {torch.get_num_threads()} threads, width {WIDTH}, float32"]
    lines += [f"{'tokens':>7} {'phase':17} {'form':8} {'ms':>9} {'x native':>9} {'GB/s':>6}"]
    lines += [
        f"{r['length']:7} {r['phase']:17} {r['form']:8} {r['ms']:9.1f} {r['times_native']:9.1f} "
        f"{r['gb_per_s']:6.1f}"
        for r in rows
    ]
    lines += [f"{length:7} a copy {speed:44.1f} GB/s" for length, speed in copies.items()]
    lines += [f"a loop's times are those of {LOOP} tokens, multiplied up"]
    lines += [f"gradient errors of a, u: {', '.join(f'{e:.0e}' for e in errors)}"]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
