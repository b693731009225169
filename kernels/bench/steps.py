"""Whole training steps against other implementations, and how the cost grows with the length.

    python kernels/bench/steps.py [--json FILE]

Each comparison alternates the two sides in one process and reports the median of the ratios.
The long steps run in processes of their own, so that peak memory is theirs alone.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from record import record
from torch import nn

from zoo.mixers.feed_forward import SwiGLU
from zoo.mixers.mamba import Mamba
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.backbone import Backbone
from zoo.ops.runtime.allocator import tune_allocator

WIDTH, LAYERS, HEADS, VOCABULARY = 128, 4, 4, 256


def ours(kind: str, **options: bool) -> Backbone:
    mixer, second = (
        (Mamba, None) if kind == "mamba" else (partial(SoftmaxAttention, heads=HEADS), SwiGLU)
    )
    return Backbone(
        vocab_size=VOCABULARY, width=WIDTH, layers=LAYERS, mixers=[mixer], feed_forwards=[second],
        **options,
    )  # fmt: skip


def theirs(kind: str) -> nn.Module:
    import transformers

    if kind == "mamba":
        config = transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=16,
            use_mambapy=True,
        )  # fmt: skip
        return transformers.MambaForCausalLM(config)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, intermediate_size=344,
        num_attention_heads=HEADS, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def stepper(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """One optimiser step: forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        if isinstance(model, Backbone):
            loss = model.loss(tokens)
        else:
            loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def versus(kind: str, length: int, repeats: int) -> dict:
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (1, length + 1))
    mine, other = stepper(ours(kind), tokens), stepper(theirs(kind), tokens)
    mine(), other()
    pairs = [(seconds(mine), seconds(other)) for _ in range(repeats)]
    return {
        "what": f"{kind} step, L={length}, against transformers",
        "ours_s": statistics.median(a for a, _ in pairs),
        "theirs_s": statistics.median(b for _, b in pairs),
        "times_faster": statistics.median(b / a for a, b in pairs),
    }


def long_step(kind: str, length: int, checkpoint: bool) -> dict:
    """Three steps of one sequence in this process: the fastest, and the process's peak memory."""
    tune_allocator()
    torch.manual_seed(0)
    step = stepper(
        ours(kind, checkpoint_activations=checkpoint), torch.randint(VOCABULARY, (1, length + 1))
    )
    times = [seconds(step) for _ in range(3)]
    return {"seconds": min(times), "median_s": statistics.median(times), "peak_bytes": peak()}


def peak() -> int:
    """Most memory this process has held; of Linux's two counters the one that exec starts anew."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def long_step_apart(kind: str, length: int, checkpoint: bool = False) -> dict:
    command = [sys.executable, __file__, "--step", kind, str(length), str(int(checkpoint))]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    name = f"{kind} step, L={length}" + (", activations recomputed" if checkpoint else "")
    return {"what": name, **json.loads(printed.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--step", nargs=3, metavar=("KIND", "LENGTH", "CHECKPOINT"))
    options = parser.parse_args()
    if options.step:
        kind, length, checkpoint = options.step
        sys.stdout.write(json.dumps(long_step(kind, int(length), checkpoint == "1")) + "\n")
        return
    rows = []
    for measure in (
        partial(versus, "mamba", 8192, 3),
        partial(versus, "transformer", 2048, 21),
        partial(long_step_apart, "mamba", 8192),
        partial(long_step_apart, "mamba", 65536),
        partial(long_step_apart, "mamba", 65536, True),
    ):
        rows.append(measure())
        figures = "  ".join(f"{k} {v:.4g}" for k, v in rows[-1].items() if k != "what")
        sys.stdout.write(f"{rows[-1]['what']:<55}{figures}\n")
    growth = rows[3]["seconds"] / rows[2]["seconds"]
    rows.append({"what": "mamba step, cost 8192 -> 65536", "growth": growth})
    sys.stdout.write(f"{rows[-1]['what']:<55}growth {growth:.3g} for 8 times the tokens\n")
    record(options.json, rows=rows)


if __name__ == "__main__":
    main()
