"""From a document's bytes to its tokens: bytes by default, a local `tokenizers` JSON when asked."""

import hashlib
import importlib
import importlib.util
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from zoo.errors import UserError

BYTES = "bytes"

Encode = Callable[[bytes], array]


class Tokenizer(NamedTuple):
    """`encode` maps one document's UTF-8 bytes to its tokens, the end-of-document token last."""

    name: str  # "bytes", or the file's name and the hash of its contents
    vocab_size: int
    encode: Encode  # to unsigned 1, 2 or 4 byte integers


def open_tokenizer(choice: str) -> Tokenizer:
    """ "bytes" (token = byte, 0 ends a document) or the path of a `tokenizers` JSON file.

    A file's vocabulary gets one more token, the highest, that ends each document; the truncation
    and padding the file may ask for are switched off. Raises UserError as `check_tokenizer` does,
    and where the file is no tokeniser.
    """
    if choice == BYTES:
        return Tokenizer(BYTES, 256, encode_bytes)
    name = identify_tokenizer(choice)
    try:
        model = importlib.import_module("tokenizers").Tokenizer.from_file(choice)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"data.tokenizer: {choice} is not a tokenizers JSON: {error}") from error
    model.no_truncation()
    model.no_padding()
    end = max(model.get_vocab(with_added_tokens=True).values()) + 1
    code = "H" if end < 2**16 else "I"

    def encode(document: bytes) -> array:
        return array(code, [*model.encode(document.decode(), add_special_tokens=False).ids, end])

    return Tokenizer(name, end + 1, encode)


def encode_bytes(document: bytes) -> array:
    return array("B", document + b"\0")


def identify_tokenizer(choice: str) -> str:
    """The tokeniser's name, cheaply: nothing is imported, its file is only hashed.

    Raises UserError where `choice` is neither "bytes" nor a readable file, or where the optional
    package is missing. Nothing is ever downloaded.
    """
    if choice == BYTES:
        return BYTES
    try:
        digest = hashlib.sha256(Path(choice).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"data.tokenizer: {choice!r} is neither {BYTES!r} nor a tokenizers JSON file "
            f"that can be read ({error.strerror}); nothing is downloaded"
        ) from error
    if importlib.util.find_spec("tokenizers") is None:
        raise UserError(
            f"data.tokenizer={choice} needs the package tokenizers (pip install tokenizers); "
            f"data.tokenizer={BYTES} needs none"
        )
    return f"{Path(choice).name}@{digest[:12]}"
