"""Matrix states: the chunked forms against the loop and the textbook's, by chunk size and length.

    python kernels/bench/matrix_state.py [--lengths 8192 65536] [--rounds 5] [--json FILE]

float32, one sequence, width 128 in heads of 64 channels. Linear attention without decay (`none`),
with one per head (`head`) and per channel (`channel`); the delta rule (`delta`), with a decay per
head (`gated`) and RWKV-7's with one per channel (`general`). The textbook's chunked form of linear
attention divides keys by their decay since the chunk's start (Yang 2023, GLA, section 4.2), which
overflows where decays are strong and ours does not; here they are mild enough for it. All forms
take turns in one process; times are the least of the rounds. Memory is the growth of a fresh
process over its inputs.
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

from zoo.ops import delta_rule, delta_rule_chunked, linear_attention
from zoo.ops.runtime.allocator import tune_allocator

HEADS, HEAD = 2, 64
LINEAR, DELTA = ["none", "head", "channel"], ["delta", "gated", "general"]
KINDS = LINEAR + DELTA
CHUNKS = [16, 32, 64, 128]
SWEEP_LENGTH = 4096  # tokens, of the chunk sizes and of the loop


def inputs(kind: str, length: int) -> dict[str, torch.Tensor]:
    """Arguments of the op of that kind as a fresh layer gives them."""
    torch.manual_seed(0)
    shape = (1, length, HEADS, HEAD)
    q, k, v = torch.randn(3, *shape)
    unit = F.normalize(torch.randn(shape), dim=-1)
    rate = torch.rand(shape[:3] if kind in ("head", "gated") else shape)
    found = {"q": q, "k": k / HEAD, "v": v}
    if kind in ("head", "channel"):
        found["log_decay"] = -0.1 * rate
    elif kind == "general":
        found |= {"a": -unit, "b": torch.rand(shape) * unit, "log_decay": -0.6 * rate}
    elif kind in DELTA:
        found |= {"k": 0.5 * unit, "a": -unit}
    if kind == "gated":
        found["log_decay"] = -rate
    return {name: x.requires_grad_() for name, x in found.items()}


def textbook(q, k, v, log_decay=None, *, chunk: int) -> torch.Tensor:
    """Linear attention in chunks of a loop, the keys divided by their decay since the start."""
    state, ys = q.new_zeros(1, HEADS, HEAD, HEAD), []
    w = torch.zeros_like(q[..., :1]) if log_decay is None else log_decay
    w = (w if w.dim() == 4 else w[..., None]).transpose(1, 2)
    parts = [a.transpose(1, 2).split(chunk, 2) for a in (q, k, v)]
    for q_c, k_c, v_c, w_c in zip(*parts, w.split(chunk, 2), strict=True):
        since = w_c.cumsum(2)
        reads, earlier, end = q_c * since.exp(), k_c * (-since).exp(), since[:, :, -1:]
        ys.append((reads @ earlier.mT).tril() @ v_c + reads @ state)
        state = end.exp().mT * state + (k_c * (end - since).exp()).mT @ v_c
    return torch.cat(ys, 2).transpose(1, 2)


def output(tensors: dict[str, torch.Tensor], backend: str) -> torch.Tensor:
    if "a" in tensors:
        return delta_rule.diagonal_plus_rank_one(**tensors, backend=backend)[0]
    return linear_attention.linear_attention(**tensors, backend=backend)[0]


def seconds(
    tensors: dict[str, torch.Tensor], form: Callable[..., torch.Tensor], gradient: bool
) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(gradient):
        y = form(tensors)
        if gradient:
            torch.autograd.grad(y.sum(), list(tensors.values()))
    return time.perf_counter() - start


def with_chunk(chunk: int, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    module = delta_rule_chunked if "a" in tensors else linear_attention
    kept, module.CHUNK_TOKENS = module.CHUNK_TOKENS, chunk
    try:
        return output(tensors, "torch")
    finally:
        module.CHUNK_TOKENS = kept


def forms_of(kind: str) -> dict[str, Callable[..., torch.Tensor]]:
    """Ours by chunk size, the loop, and the textbook's by chunk size."""
    forms: dict[str, Callable[..., torch.Tensor]] = {str(c): partial(with_chunk, c) for c in CHUNKS}
    forms["loop"] = partial(output, backend="reference")
    if kind in LINEAR:
        for chunk in CHUNKS:
            forms[f"book {chunk}"] = lambda tensors, chunk=chunk: textbook(**tensors, chunk=chunk)
    return forms


def sweep(kind: str, rounds: int) -> list[dict]:
    """A row per form, at `SWEEP_LENGTH`."""
    tensors, rows, forms = inputs(kind, SWEEP_LENGTH), [], forms_of(kind)
    for phase, gradient in (("forward", False), ("forward+backward", True)):
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(rounds + 1):  # the first only warms up
            for name, form in forms.items():
                times[name].append(seconds(tensors, form, gradient))
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
    ours = partial(output, backend="torch")
    seconds(inputs(kind, 64), ours, True)
    tensors = inputs(kind, length)
    before = memory("VmRSS")
    seconds(tensors, ours, True)
    return memory("VmHWM") - before


def by_length(kind: str, lengths: list[int], rounds: int) -> list[dict]:
    rows = []
    for length in lengths:
        tensors = inputs(kind, length)
        ours = partial(output, backend="torch")
        spent = min(seconds(tensors, ours, True) for _ in range(rounds))
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
    columns = list(forms_of(LINEAR[0]))
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
