"""Writing token by token against `transformers.generate`, on one checkpoint in the same threads.

    PYTHONPATH=. python kernels/bench/decode.py [--json FILE] [--rounds 5] [--tokens 16]
        [--only llama mamba] [--prompts 512 8128] [--forms float32 bfloat16 int8 int4]

Checkpoints of random weights in the shape of SmolLM2-135M (30 layers, 9 heads over 3 key/value
heads) and of Mamba-130m are saved by `transformers` and opened by both. Prompts are read once; then
each writer in turn writes `tokens` behind its own, round by round. Writers are ours in every form
of the weights, `transformers` in float32 and bfloat16, and ours in float32 with PyTorch's matrix
products ("plain products") wherever half of a block is not one call of a kernel. What no writer can
be faster than is a row of each form too: one read of the weights that a token reads, at the rate at
which this thread reads memory. A row has wall and CPU seconds a token of every round; ratios are
medians over the rounds. In float32 both sides must write the same text.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from record import record

from zoo.config.compose import compose
from zoo.config.validate import plain
from zoo.model.generation import Sampling, Writer
from zoo.model.pretrained import load_pretrained
from zoo.model.quantization import quantize
from zoo.ops import linear
from zoo.pretrained.checkpoint import read_checkpoint
from zoo.pretrained.options import pretrained_config

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
PROMPTS = {"llama": (512, 8128), "mamba": (32,)}
FORMS = ["float32", "bfloat16", "int8", "int4"]
PLAIN, THEIRS = "plain products", "transformers"
ONE_READ = "one read of"


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


class Ours:
    """This package's writer, in one form of the weights."""

    def __init__(self, model: Any, form: str) -> None:
        self.plain = form == PLAIN
        model = copy.deepcopy(model)
        if form in ("int8", "int4"):
            quantize(model, form)
        self.writer = Writer(model.to(getattr(torch, form)) if form == "bfloat16" else model)

    def read(self, prompt: list[int]) -> list[int]:
        self.writer.read(prompt)
        return self.write(1)

    def write(self, count: int) -> list[int]:
        before = linear.MAX_ROWS
        linear.MAX_ROWS = -1 if self.plain else before
        try:
            return [*self.writer.write(count, Sampling())]
        finally:
            linear.MAX_ROWS = before


class OneRead:
    """What a token costs at least: all weights are read once.

    As one sum over a buffer of as many bytes: a call for each of 300 arrays takes 2 ms by itself.
    """

    def __init__(self, ours: Ours) -> None:
        parameters = [*ours.writer.model.parameters()]
        parts = [part for one in parameters for part in getattr(one, "parts", None) or (one,)]
        count = sum(part.numel() * part.element_size() for part in parts)
        self.buffer = torch.ones(count // 8, dtype=torch.int64)

    def read(self, prompt: list[int]) -> list[int]:
        del prompt
        return self.write(1)

    def write(self, count: int) -> list[int]:
        """Read all of them so many times; there are no tokens."""
        for _ in range(count):
            self.buffer.sum()
        return []


class Theirs:
    """`transformers.generate`, going on from the cache of the call before where there is one."""

    def __init__(self, model: Any, form: str) -> None:
        self.model = copy.deepcopy(model).to(getattr(torch, form.split()[-1]))
        keeps = not hasattr(model.config, "state_size")
        self.cache = transformers.DynamicCache() if keeps else None
        self.text: list[int] = []

    def read(self, prompt: list[int]) -> list[int]:
        self.text = [*prompt]
        return self.write(1)

    @torch.inference_mode()
    def write(self, count: int) -> list[int]:
        how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if self.cache is not None:
            how["past_key_values"] = self.cache
        text = torch.tensor([self.text])
        mask = torch.ones_like(text)
        found = self.model.generate(text, attention_mask=mask, max_new_tokens=count, **how)
        new = found[0, len(self.text) :].tolist()
        self.text += new
        return new


def clocks(writer: Ours | OneRead | Theirs, count: int) -> tuple[list[float], list[int]]:
    """Wall and CPU seconds of a token, and the tokens.

    Who reads the whole text again at each call is measured by the difference of two calls.
    """
    again = isinstance(writer, Theirs) and writer.cache is None
    first, tokens = _timed(writer, 1) if again else ([0.0, 0.0], [])
    whole, more = _timed(writer, count + again)
    return [(b - a) / count for a, b in zip(first, whole, strict=True)], tokens + more


def _timed(writer: Ours | OneRead | Theirs, count: int) -> tuple[list[float], list[int]]:
    began = time.perf_counter(), time.process_time()
    tokens = writer.write(count)
    return [time.perf_counter() - began[0], time.process_time() - began[1]], tokens


def compared(
    kind: str, models: tuple[Any, Any], length: int, rounds: int, count: int, forms: list[str]
) -> list[dict]:
    theirs, ours = models
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(ours.vocab_size, (length,), generator=generator).tolist()
    writers: dict[str, Ours | OneRead | Theirs] = {PLAIN: Ours(ours, PLAIN)}
    forms_of = {form: Ours(ours, form) for form in forms}
    writers |= forms_of
    writers |= {f"{ONE_READ} {form}": OneRead(one) for form, one in forms_of.items()}
    narrow = [form for form in forms if form in ("float32", "bfloat16")]
    writers |= {f"{THEIRS} {form}": Theirs(theirs, form) for form in narrow}
    texts = {name: writer.read(prompt) for name, writer in writers.items()}
    found: dict[str, list[list[float]]] = {name: [] for name in writers}
    for _ in range(rounds):
        for name, writer in writers.items():
            seconds, tokens = clocks(writer, count)
            found[name].append(seconds)
            texts[name] += tokens
    shared = min(len(texts[PLAIN]), len(texts[f"{THEIRS} float32"]))
    for name in ("float32", f"{THEIRS} float32"):
        if texts[name][:shared] != texts[PLAIN][:shared]:
            raise RuntimeError(f"{kind}: {name} writes another text")
    return [_row(kind, length, count, name, found) for name in writers]


def _row(
    kind: str, length: int, count: int, name: str, found: dict[str, list[list[float]]]
) -> dict[str, Any]:
    """The figures of a writer; ratios are how many times its time the others take."""
    row: dict[str, Any] = {"model": kind, "prompt": length, "tokens": count, "writer": name}
    row["rounds"] = found[name]
    for place, clock in enumerate(("wall", "cpu")):
        row[clock] = statistics.median(one[place] for one in found[name])
        for other in (f"{THEIRS} float32", PLAIN):
            pairs = zip(found[other], found[name], strict=True)
            ratios = [b[place] / a[place] for b, a in pairs]
            row[f"{clock}: {other}"] = [min(ratios), statistics.median(ratios), max(ratios)]
    least, ratio, most = row[f"cpu: {THEIRS} float32"]
    sys.stdout.write(
        f"{kind:<6} after {length:>5}, {name:<22} {1000 * row['cpu']:7.2f} ms of CPU time, "
        f"{1000 * row['wall']:7.2f} ms; {ratio:.2f} ({least:.2f} to {most:.2f}) x transformers, "
        f"{row[f'cpu: {PLAIN}'][1]:.2f} x plain products\n"
    )
    sys.stdout.flush()
    return row


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--json", type=Path)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--tokens", type=int, default=16)
    words.add_argument("--only", nargs="+", choices=SHAPES, default=[*SHAPES])
    words.add_argument("--prompts", nargs="+", type=int)
    words.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    given = words.parse_args()
    forms = [form for form in FORMS if form in {*given.forms, "float32"}]
    rows = []
    for kind in given.only:
        with TemporaryDirectory() as folder:
            models = opened(kind, Path(folder))
        for length in given.prompts or PROMPTS[kind]:
            rows += compared(kind, models, length, given.rounds, given.tokens, forms)
            record(given.json, rows=rows)


if __name__ == "__main__":
    main()
