"""Attention patterns against plain causal attention: time per scored pair, and peak memory.

    python kernels/bench/attention_patterns.py [--length 16384] [--trained 512] [--rounds 7]
                                               [--json FILE]

Forward of one layer's attention, turning of queries and keys included, float32, width 128 in heads
of 32. A remap that drops keys scores fewer pairs, so plain attention takes turns with it over as
many pairs: of one shorter text, which has fewer tokens to turn and to write, and of several still
shorter ones that make up as many tokens. Figures are medians of the ratios. Memory is what a
forward holds at its peak, against plain attention over the same text.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import processor, record
from torch import Tensor

from zoo.attention.dual_chunk import DualChunk
from zoo.attention.lm_infinite import LMInfinite
from zoo.attention.pattern import AttentionPattern
from zoo.attention.self_extend import SelfExtend
from zoo.attention.streaming_llm import StreamingLLM
from zoo.ops.attention import Part, attention
from zoo.ops.runtime.allocator import tune_allocator
from zoo.positions.rope import apply_rope, inverse_frequencies
from zoo.tasks.memory import peak_bytes

HEADS, HEAD = 4, 32
THETA = inverse_frequencies(HEAD)


def patterns(trained: int) -> dict[str, AttentionPattern]:
    def scaling(_: int):
        return THETA, 1.0

    return {
        "dca": DualChunk(scaling, original_length=trained),
        "streaming_llm": StreamingLLM(scaling, original_length=trained),
        "window": StreamingLLM(scaling, original_length=trained, sinks=0),
        "lm_infinite": LMInfinite(scaling, original_length=trained),
        "self_extend": SelfExtend(scaling, original_length=trained, group=64),
    }


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = apply_rope(q, THETA), apply_rope(k, THETA)
    return attention([Part(q, k, v, causal=True)])


def pairs(pattern: AttentionPattern, length: int) -> int:
    """Queries and keys that see each other."""
    width = pattern.nearest or 0
    total = sum(min(at + 1, width) for at in range(length))
    for block in pattern.blocks(range(length)):
        for view in pattern.views(block):
            t, n = len(view.rows or block), len(view.keys)
            total += t * (t + 1) // 2 if view.causal else t * n
    return total


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--trained", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tuned, length, rows = tune_allocator(), options.length, []
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, length, HEADS, HEAD)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        whole = peak_bytes(cpu, lambda: plain(q, k, v))
        for name, pattern in patterns(options.trained).items():
            count = pairs(pattern, length)
            short = min(length, round((math.sqrt(8 * count + 1) - 1) / 2))
            cut = [x[:, :short].contiguous() for x in (q, k, v)]
            each = min(length, round(2 * count / length))
            texts = [x[:, : length // each * each].unflatten(1, (-1, each))[0] for x in (q, k, v)]
            calls = (lambda: pattern(q, k, v, 0), lambda: plain(*cut), lambda: plain(*texts))  # noqa: B023
            times = [[seconds(call) for call in calls] for _ in range(options.rounds + 1)][1:]
            peak = peak_bytes(cpu, lambda: pattern(q, k, v, 0))  # noqa: B023
            row = {"pattern": name, "pairs": count, "plain_length": short, "texts_length": each}
            for i, kind in enumerate(("ms", "plain_ms", "texts_ms")):
                row[kind] = min(each[i] for each in times) * 1e3
            for i, kind in ((1, "times_plain"), (2, "times_texts")):
                row[kind] = statistics.median(each[0] / each[i] for each in times)
            row |= {"peak_bytes": peak, "plain_peak_bytes": whole}
            rows.append(row)
    record(options.json, allocator=tuned, length=length, trained=options.trained, rows=rows)
    lines = [f"{processor()}, {torch.get_num_threads()} threads, {length} tokens, trained on "]
    lines[0] += f"{options.trained}"
    heads = ("pairs", "ms", "x plain", "x texts", "MB", "x plain")
    lines.append(f"{'pattern':14}" + "".join(f"{head:>12}" for head in heads))
    for r in rows:
        line = f"{r['pattern']:14}{r['pairs']:12}{r['ms']:12.1f}"
        line += f"{r['times_plain']:12.2f}{r['times_texts']:12.2f}"
        line += f"{r['peak_bytes'] / 1e6:12.1f}{r['peak_bytes'] / r['plain_peak_bytes']:12.2f}"
        lines.append(line)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
