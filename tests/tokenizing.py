"""Tokenizers of every kind that a checkpoint may have, small enough to be made in a test."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zoo.data.tokenizers import BYTES, Tokenizer, open_tokenizer

if TYPE_CHECKING:
    import tokenizers


def library() -> Any:
    """The package; the test that needs it is skipped where it is missing."""
    return pytest.importorskip("tokenizers")


def byte_level() -> "tokenizers.Tokenizer":
    """As GPT-2, Llama 3 and Qwen have it."""
    alphabet = sorted(library().pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "th", "the"])}
    model = library().models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")])
    made = library().Tokenizer(model)
    made.pre_tokenizer = library().pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library().decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return made


def sentence_piece() -> "tokenizers.Tokenizer":
    """As Llama 1 and 2, Mistral and Gemma have it: words carry the space before them."""
    made = _pieces()
    made.pre_tokenizer = library().pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


def prepending() -> "tokenizers.Tokenizer":
    """The same, as files made from the original Llama 2 have it."""
    made, normalizers = _pieces(), library().normalizers
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    made.normalizer = normalizers.Sequence(steps)
    return made


def _pieces() -> "tokenizers.Tokenizer":
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["<unk>", "<s>", "</s>", *bytes_, "\u2581", *"theandc", "th", "the", "\u2581the"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    vocabulary = {token: i for i, token in enumerate(letters)}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    made = library().Tokenizer(library().models.BPE(vocab=vocabulary, merges=merges, **options))
    steps = [library().decoders.Replace("\u2581", " "), library().decoders.ByteFallback()]
    steps += [library().decoders.Fuse(), library().decoders.Strip(" ", 1, 0)]
    made.decoder = library().decoders.Sequence(steps)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


KINDS = {"byte level": byte_level, "sentence piece": sentence_piece, "prepending": prepending}
EVERY = (BYTES, *KINDS)


def opened(kind: str, folder: Path) -> Tokenizer:
    """One of EVERY."""
    if kind != BYTES:
        KINDS[kind]().save(str(folder / "tokenizer.json"))
    return open_tokenizer(BYTES if kind == BYTES else str(folder / "tokenizer.json"))
