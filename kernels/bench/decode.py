"""Writing token by token against `transformers.generate`, on one checkpoint in the same threads.

    python kernels/bench/decode.py [--json FILE] [--rounds 5] [--tokens 32] [--only llama mamba]

Checkpoints of random weights in the shape of SmolLM2-135M (30 layers, 9 heads over 3 key/value
heads) and of Mamba-130m are saved by `transformers` and opened by both. Each round reads a prompt
and writes behind it, once with either, in turn; ratios are medians over the rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from record import record

from zoo.config.compose import compose
from zoo.config.validate import plain
from zoo.model.generation import Sampling, Writer
from zoo.model.pretrained import load_pretrained, pretrained_config
from zoo.pretrained.checkpoint import read_checkpoint

SHAPES = {  # the published ones
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 100_000.0,
            "tie_word_embeddings": True,
        },
    ),
    "mamba": (
        transformers.MambaForCausalLM,
        transformers.MambaConfig,
        {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24},
    ),
}
PROMPTS = {"llama": (512, 8128), "mamba": (512,)}


def opened(kind: str, folder: Path) -> tuple[Any, Any]:
    """Their model and ours, of one checkpoint."""
    model, config, shape = SHAPES[kind]
    torch.manual_seed(0)
    theirs = model(config(**shape)).eval()
    theirs.save_pretrained(folder)
    described, _ = read_checkpoint(folder, None)
    data = plain(compose("train").data)
    ours = load_pretrained(pretrained_config(described, folder, data, folder))
    return theirs, ours.eval().requires_grad_(False)


def write_ours(model: Any, prompt: list[int], count: int) -> list[int]:
    writer = Writer(model)
    writer.read(prompt)
    return [*writer.write(count, Sampling())]


@torch.inference_mode()
def write_theirs(model: Any, prompt: list[int], count: int) -> list[int]:
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = torch.tensor([prompt])
    found = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=count, **how)
    return found[0, len(prompt) :].tolist()


def timed(write: Callable[..., list[int]], model: Any, prompt: list[int], count: int) -> Any:
    """Seconds of the prompt with its first token, seconds of a token after it, the tokens."""
    began = time.perf_counter()
    write(model, prompt, 1)
    first = time.perf_counter()
    tokens = write(model, prompt, count + 1)
    prefill = first - began
    return prefill, (time.perf_counter() - first - prefill) / count, tokens


def compared(kind: str, models: tuple[Any, Any], length: int, rounds: int, count: int) -> dict:
    theirs, ours = models
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(ours.vocab_size, (length,), generator=generator).tolist()
    found: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        *one, tokens = timed(write_ours, ours, prompt, count)
        *other, expected = timed(write_theirs, theirs, prompt, count)
        if tokens != expected:
            raise RuntimeError(f"{kind}: the two write different texts")
        found["ours"].append(one)
        found["theirs"].append(other)
    pairs = [*zip(found["ours"], found["theirs"], strict=True)]
    row: dict[str, Any] = {"model": kind, "prompt": length, "tokens": count, "rounds": found}
    for place, name in enumerate(("prefill", "token")):
        row[f"{name}_ratio"] = statistics.median(b[place] / a[place] for a, b in pairs)
        row[f"{name}_seconds"] = statistics.median(a[place] for a, _ in pairs)
    sys.stdout.write(
        f"{kind:<6} after {length:>5}: prefill {row['prefill_seconds']:7.3f} s, "
        f"{row['prefill_ratio']:.2f} x transformers; token {1000 * row['token_seconds']:7.2f} ms, "
        f"{row['token_ratio']:.2f} x\n"
    )
    sys.stdout.flush()
    return row


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--json", type=Path)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--tokens", type=int, default=32)
    words.add_argument("--only", nargs="+", choices=SHAPES, default=[*SHAPES])
    words.add_argument("--prompts", nargs="+", type=int)
    given = words.parse_args()
    rows = []
    for kind in given.only:
        with TemporaryDirectory() as folder:
            models = opened(kind, Path(folder))
            for length in given.prompts or PROMPTS[kind]:
                rows.append(compared(kind, models, length, given.rounds, given.tokens))
    record(given.json, rows=rows)


if __name__ == "__main__":
    main()
