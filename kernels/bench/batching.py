"""Writing after many prompts of different lengths: one at a time, and eight at a time.

    python kernels/bench/batching.py [--json FILE] [--rounds 3] [--prompts 16] [--tokens 32]

A Llama of random weights in the shape of SmolLM2-135M (30 layers unless given), prompts of 16 to
256 random tokens, on one thread. Each round writes both ways, in turn, and both write the same
tokens; seconds are CPU time, the ratio is the median over the rounds.
"""

import argparse
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import record

from zoo.mixers.feed_forward import SwiGLU
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.backbone import Backbone
from zoo.model.generation import Sampling, Writer
from zoo.model.scoring import write_many

ROWS = 8


def one_at_a_time(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    found = []
    for prompt in prompts:
        writer = Writer(model)
        writer.read(prompt)
        found.append([*writer.write(tokens, Sampling())])
    return found


def together(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    how = {"tokens": tokens, "sampling": Sampling(), "stops": lambda *_: False, "rows": ROWS}
    return write_many(model, prompts, **how)


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--json", type=Path)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--prompts", type=int, default=16)
    words.add_argument("--layers", type=int, default=30)
    words.add_argument("--tokens", type=int, default=32)
    given = words.parse_args()
    draw = random.Random(0)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Backbone(
        vocab_size=49152,
        width=576,
        layers=given.layers,
        mixers=[partial(SoftmaxAttention, heads=9, kv_heads=3)],
        feed_forwards=[partial(SwiGLU, hidden_width=1536)],
    )
    model.eval().requires_grad_(False)
    lengths = [draw.randint(16, 256) for _ in range(given.prompts)]
    prompts = [[draw.randrange(model.vocab_size) for _ in range(length)] for length in lengths]
    seconds: dict[str, list[float]] = {"one at a time": [], "together": []}
    for _ in range(given.rounds):
        texts = []
        for name, write in (("one at a time", one_at_a_time), ("together", together)):
            began = time.process_time()
            texts.append(write(model, prompts, given.tokens))
            seconds[name].append(time.process_time() - began)
        if texts[0] != texts[1]:
            raise RuntimeError("the two write different texts")
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    written = given.prompts * given.tokens
    row: dict[str, Any] = {
        "layers": given.layers,
        "prompts": given.prompts,
        "tokens": given.tokens,
        "rows": ROWS,
        "seconds": seconds,
    }
    row["times_faster"] = statistics.median(ratios)
    sys.stdout.write(
        f"{given.prompts} prompts, {written} tokens: {written / min(seconds['one at a time']):.1f} "
        f"tokens a second one at a time, {written / min(seconds['together']):.1f} with {ROWS} "
        f"together, {row['times_faster']:.2f} times as many\n"
    )
    record(given.json, rows=[row])


if __name__ == "__main__":
    main()
