"""A run's or a checkpoint's model with its tokenizer: text in, logits and text out."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from zoo.config.compose import compose
from zoo.config.domains import Positive, check
from zoo.config.effects import check_extension
from zoo.config.longrope_factors import with_found_factors
from zoo.config.schema.data import Data
from zoo.config.schema.model import Extension
from zoo.config.schema.train import TrainConfig
from zoo.config.validate import plain
from zoo.data.tokenizers import Tokenizer, bos_of, open_tokenizer, tokenizer_of
from zoo.errors import refuse, refuse_path
from zoo.mixers.quantized_cache import CacheBits
from zoo.model.arithmetic import arithmetic
from zoo.model.backbone import Backbone
from zoo.model.checkpoint import load
from zoo.model.device import pick_device
from zoo.model.extend import extend
from zoo.model.generation import Sampling, Writer, write_text
from zoo.model.pretrained import load_pretrained
from zoo.model.scoring import write_texts
from zoo.model.weights import Weights, choose_weights, loaded_in, quantize_as
from zoo.ops.dtypes import wide_dtype
from zoo.pretrained.checkpoint import TOKENIZER, read_checkpoint
from zoo.pretrained.families import Description
from zoo.pretrained.options import pretrained_config
from zoo.runs.folder import RunFolder

TOKENS = 128  # that `generate` writes by default
Tokens = Sequence[int] | np.ndarray | Tensor  # of one dimension
Text = str | Tokens
ROWS = 8  # texts that `generate_many` writes at once by default


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A trained model that reads and writes text.

    Attributes:
        backbone: the model, under its extension.
        tokenizer: between text and its tokens.
        train_length: tokens of the windows that it was trained on.
        precision: of its arithmetic, by Lightning's name.
    """

    backbone: Backbone
    tokenizer: Tokenizer
    train_length: int
    precision: str = "32-true"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    def encode(self, text: str) -> list[int]:
        """The text's tokens as the model reads it: with the one that begins a text, if it was
        trained with one, and without the one that ends a document."""
        check("text", text, str)
        return self.tokenizer.start(text)

    def decode(self, tokens: Tokens) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return "".join(self.tokenizer.decode(self._tokens("tokens", tokens, Sequence[int])))

    def logits(self, text: Text) -> Float[Tensor, "t vocabulary"]:
        """The logits (t, vocabulary) after each token of a text, read as a whole.

        Row i says what may follow token i. Raises UserError for an empty text, and one that is
        longer than the model can read.
        """
        tokens = self._tokens("text", text)
        if not tokens:
            refuse("text", "", "must have at least one token")
        most = self.backbone.max_length
        if most is not None and len(tokens) > most:
            rule = f"the model reads at most {most:,} tokens, and the text has {len(tokens):,}"
            refuse("text", self.decode(tokens), rule, "Shorten it")
        batch = torch.tensor([tokens], device=self.device)
        with arithmetic(self.backbone, self.precision, self.device):
            found = self.backbone(batch)[0]
        return found.to(wide_dtype(found)).clone()

    def generate(
        self,
        prompt: Text,
        *,
        tokens: int = TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> str:
        """The text that the model writes after a prompt, without the prompt; see `stream`."""
        how = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop}
        return "".join(self.stream(prompt, tokens=tokens, **how))

    def stream(
        self,
        prompt: Text,
        *,
        tokens: int = TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield what the model writes after a prompt, each piece as soon as it is sure.

        Args:
            prompt: a text or its tokens; an empty one begins a document.
            tokens: the most that are written. A document's end ends the text, too, and each token
                that a checkpoint names as an end.
            temperature, top_p, seed: how a token is chosen, see `Sampling`.
            stop: texts at which writing ends; they are left out.

        Raises:
            UserError: for a value that is not allowed, a model that cannot write (it reads both
                ways), and a text longer than it can read; before anything is written.
        """
        sampling, words = self._checked(tokens, temperature, top_p, seed, stop)
        writer = self.writer(prompt)
        writer.check_length(tokens)
        return write_text(writer, self.tokenizer, tokens, sampling, words)

    def generate_many(
        self,
        prompts: Sequence[Text],
        *,
        tokens: int = TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        rows: int = ROWS,
    ) -> list[str]:
        """The texts that the model writes after each of many prompts, of any lengths.

        Up to `rows` of them are written at once, each as `generate` writes it; the weights are read
        once for all. What prompts begin with alike is read and kept once. Arguments and errors are
        those of `stream`.
        """
        check("rows", rows, Positive, ROWS)
        prompts = [_plain(one) for one in prompts] if isinstance(prompts, list | tuple) else prompts
        check("prompts", prompts, Sequence[str | Sequence[int]])
        sampling, words = self._checked(tokens, temperature, top_p, seed, stop)
        texts = []
        for prompt in prompts:
            writer = self.writer(prompt)
            writer.check_length(tokens)
            texts.append(writer.unread)
        how = {"tokens": tokens, "sampling": sampling, "stop": words, "rows": rows}
        how["precision"] = self.precision
        return [one.text for one in write_texts(self.backbone, self.tokenizer, texts, **how)]

    @staticmethod
    def _checked(
        tokens: int, temperature: float, top_p: float, seed: int, stop: str | Sequence[str]
    ) -> tuple[Sampling, list[str]]:
        """How tokens are chosen, and the texts to stop at. UserError for what is not allowed."""
        check("tokens", tokens, Positive, TOKENS)
        check("stop", stop, str | Sequence[str])
        words = [stop] if isinstance(stop, str) else [*stop]
        if "" in words:
            refuse("stop", stop, "must not hold an empty text", "Leave it out")
        return Sampling(temperature=temperature, top_p=top_p, seed=seed), words

    def writer(self, prompt: Text = "") -> Writer:
        """A text that begins with a prompt; an empty one begins a document.

        Tokens are read as they are; a text begins as `encode` begins it.
        """
        writer = Writer(self.backbone, self.precision)
        writer.read(self._tokens("prompt", prompt) or self.tokenizer.prompt(""))
        return writer

    def _tokens(self, name: str, given: Any, kind: Any = str | Sequence[int]) -> list[int]:
        """The tokens of the argument `name`. UserError where it is of no such kind, or a token is
        none of the model's."""
        tokens = _plain(given)
        check(name, tokens, kind)
        found = self.encode(tokens) if isinstance(tokens, str) else [*map(int, tokens)]
        last = self.backbone.vocab_size - 1
        if bad := [token for token in found if not 0 <= token <= last]:
            refuse(name, bad[0], f"must be of the model's tokens, 0 to {last}")
        return found


def _plain(given: Any) -> Any:
    """An array of NumPy or PyTorch as lists; all else as it is."""
    return given.tolist() if hasattr(given, "tolist") else given


def load_language_model(
    path: str | Path,
    *words: str,
    device: str = "auto",
    weights: str | None = None,
    kv_cache: str | None = None,
) -> LanguageModel:
    """Open a run or a checkpoint, under an extension if one is named.

    Args:
        path: a run's folder, the folder of a `transformers` checkpoint, or a GGUF file.
        words: options of the extension as eval.py takes them: "extension=yarn",
            "extension.factor=8".
        device: auto (an accelerator where there is one), cpu, cuda, cuda:1, mps.
        weights: the form of their numbers, see zoo.model.weights.
        kv_cache: int8 or int4: of cached keys and values, see zoo.mixers.quantized_cache.

    Raises:
        UserError: where nothing there can be opened, an option is wrong, the extension does not act
            on the model, or the run was trained on a synthetic task, which has no text.
    """
    check("path", path, str | Path)
    check("device", device, str, "auto")
    check("weights", weights, Weights | None, None)
    check("kv_cache", kv_cache, CacheBits | None, None)
    for word in words:
        check("words", word, str)
        if not word.startswith(("extension=", "extension.")):
            name = word.partition("=")[0]
            named = name in ("device", "weights", "kv_cache")
            advice = f"Give {name}= as an argument" if named else "Use extension=<name>"
            refuse("words", word, "is no option of an extension", advice)
    place, where = Path(path), pick_device(device)
    options = [*words, f"weights={'null' if weights is None else weights}"]
    chosen = compose("eval", ["run=x", *options])
    extension = chosen.extension
    check_extension(extension, [word.partition("=")[0] for word in words])
    if os.path.isfile(place / "run.json"):  # false for what no file can be called
        folder = RunFolder.open(place)
        config = folder.config
        tokenizer = _tokenizer_of(config.data)
        form = choose_weights(chosen.weights, config, where)
        backbone = load(folder, where, loaded_in(form))
        extension = Extension.model_validate(with_found_factors(plain(extension), place))
    elif os.path.isfile(place) or os.path.isfile(place / "config.json"):
        config, tokenizer, described = _read(place)
        form = choose_weights(chosen.weights, config, where)
        backbone = load_pretrained(config, loaded_in(form), described)
        backbone = backbone.to(where).eval().requires_grad_(False)
    else:
        refuse_path(place, "is no run and no checkpoint", "Give a run folder, such as runs/<name>")
    extend(backbone, extension, config.seq_len)
    return LanguageModel(
        backbone=quantize_as(backbone, form, kv_cache),
        tokenizer=tokenizer,
        train_length=config.seq_len,
        precision=config.trainer.precision,
    )


def _read(checkpoint: Path) -> tuple[TrainConfig, Tokenizer, Description]:
    """The configuration and tokenizer of a checkpoint, without a text to measure it on."""
    if checkpoint.is_dir() and not (checkpoint / TOKENIZER).is_file():
        refuse_path(checkpoint, f"has no {TOKENIZER}", "Save the model's fast tokenizer there")
    with TemporaryDirectory() as folder:
        described, file = read_checkpoint(checkpoint, Path(folder))
        more = described.end_token, bos_of(str(file)), described.end_tokens
        tokenizer = open_tokenizer(str(file), *more)
    data = plain(compose("train").data)
    config = pretrained_config(described, checkpoint, data, Path("runs"))
    return config, tokenizer, described


def _tokenizer_of(data: Data) -> Tokenizer:
    if data.task is not None:
        refuse("data", data.name, "is a task and no text", "Open a run that was trained on text")
    return tokenizer_of(data.options)
