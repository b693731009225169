"""From a document's bytes to its tokens: bytes by default, or a local `tokenizers` JSON."""

import codecs
import errno
import hashlib
import importlib
import importlib.util
import itertools
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.errors import refuse

BYTES = "bytes"

Encode = Callable[[bytes], array]
Decode = Callable[..., Iterator[str]]  # (tokens, before=())
BEFORE = "\n", "a", "."  # texts that a text may be behind: with one of them it is not merged
CONTEXT = 16  # tokens before a text that its first character may depend on


class Tokenizer(NamedTuple):
    """`encode` maps one document's UTF-8 bytes to its tokens, the end-of-document token last.

    `encode_checked` gives them with the number of bytes of each (None: one each), and raises
    ValueError where the document does not come back from them as it was. `decode` gives the text of
    tokens in pieces, while they come: a character waits until its last byte is there. `before` are
    tokens that they follow, for tokenizers that write a word's space only behind another word.
    """

    name: str  # "bytes", or the file's name and the hash of its contents
    vocab_size: int
    end: int  # the token that ends a document
    encode: Encode  # to unsigned 1, 2 or 4 byte integers
    encode_checked: Callable[[bytes], array | tuple[array, array]]
    decode: Decode
    bos: int | None = None  # the token that begins a text, for models trained with one
    draws: bool = False  # whether its file draws tokens at random, which is switched off
    stop_tokens: frozenset[int] = frozenset()  # at which what a model writes ends, beside `end`

    @property
    def ends(self) -> frozenset[int]:
        """The tokens at which what a model writes ends."""
        return self.stop_tokens | {self.end}

    def start(self, text: str) -> list[int]:
        """The tokens of a text that is read from its beginning: `bos`, if any, and its own."""
        return ([] if self.bos is None else [self.bos]) + self.tokens(text)

    def prompt(self, text: str) -> list[int]:
        """The tokens of `start`; of an empty text at least the one that begins a document."""
        return self.start(text) or [self.end]

    def tokens(self, text: str) -> list[int]:
        """The text's tokens, without the one that ends a document; lone surrogates are U+FFFD."""
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.encode(whole.encode()).tolist()[:-1]

    def further(self, text: str) -> list[int]:
        """The tokens of a text behind another: without the space that some tokenizers, Llama 2's
        among them, put before every text."""
        for before in BEFORE:
            begin, whole = self.tokens(before), self.tokens(before + text)
            if whole[: len(begin)] == begin:
                return whole[len(begin) :]
        return self.tokens(text)


def open_tokenizer(
    choice: str,
    end_token: int | None = None,
    bos_token: int | None = None,
    stop_tokens: Sequence[int] | None = None,
) -> Tokenizer:
    """ "bytes" (token = byte, 0 ends a document) or the path of a `tokenizers` JSON file.

    Each document ends with `end_token`, one of the file's own; without it the vocabulary gets one
    more token, the highest. What a model reads from its beginning begins with `bos_token`, if
    given. What it writes ends at each of `stop_tokens`, too. The truncation, padding and special
    tokens the file may set are switched off.
    Raises UserError as `check_tokenizer` does, and where the file is no tokeniser or has no such
    token.
    """
    if choice == BYTES:
        for name, value in (("end_token", end_token), ("bos_token", bos_token)):
            if value is not None:
                rule = "bytes end a document with 0, and begin none"
                refuse(f"data.{name}", value, rule, "Leave it out")
        return BYTE_TOKENIZER
    name = identify_tokenizer(choice)
    model, draws = _opened(choice)
    end = size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    for option, token in (("end_token", end_token), ("bos_token", bos_token)):
        if token is not None and not 0 <= token < size:
            refuse(f"data.{option}", token, f"must be a token of {choice}, 0 to {size - 1}")
    if end_token is not None:
        name, end = f"{name}, {end_token} ends", end_token
    if bos_token is not None:
        name = f"{name}, {bos_token} begins"
    code = "H" if max(size, end + 1) <= 2**16 else "I"

    def encode(document: bytes) -> array:
        return array(code, [*model.encode(document.decode(), add_special_tokens=False).ids, end])

    def encode_checked(document: bytes) -> tuple[array, array]:
        text = document.decode()
        encoding = model.encode(text, add_special_tokens=False)
        returned = model.decode(encoding.ids, skip_special_tokens=False)
        if returned != text:
            raise ValueError(f"data.tokenizer={choice}: {_first_change(text, returned)}")
        sizes = bytes_by_token(text, encoding.offsets)
        return array(code, [*encoding.ids, end]), array("H", sizes)

    def decode(tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        context = [*before][-CONTEXT:]
        stream = importlib.import_module("tokenizers.decoders").DecodeStream(ids=context or None)
        came = context
        given = model.decode(context, skip_special_tokens=False)
        for token in tokens:
            came.append(token)
            if piece := stream.step(model, token):
                given += piece
                yield piece
        if rest := model.decode(came, skip_special_tokens=False)[len(given) :]:
            yield rest  # of a character that was not finished

    functions = encode, encode_checked, decode
    stops = frozenset(stop_tokens or ())
    return Tokenizer(name, max(size, end + 1), end, *functions, bos_token, draws, stops)


def tokenizer_of(options: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a data configuration (configs/data). Raises as `open_tokenizer` does."""
    more = (options.get(name) for name in ("end_token", "bos_token", "stop_tokens"))
    return open_tokenizer(options["tokenizer"], *more)


def _opened(choice: str) -> tuple[Any, bool]:
    """The `tokenizers` model of a file, and whether it drew tokens. UserError where it is none."""
    try:
        model = importlib.import_module("tokenizers").Tokenizer.from_file(choice)
    except Exception as error:  # the library raises bare Exception
        message = " ".join(str(error).split()).removesuffix(".")
        rule = f"is no tokenizers JSON file ({message})"
        refuse("data.tokenizer", choice, rule, f"Name another file, or use {BYTES}")
    model.no_truncation()
    model.no_padding()
    draws = False
    for sampled in ("dropout", "alpha", "nbest_size"):  # a text would have other tokens each time
        if (value := getattr(model.model, sampled, None)) is not None:
            draws = draws or bool(value)
            setattr(model.model, sampled, None)
    return model, draws


def bos_of(choice: str) -> int | None:
    """The token that a `tokenizers` JSON file puts before a text; None where it puts none.

    Read from its post-processor, as `transformers` 5 does, whatever add_bos_token says beside it.
    What it puts behind a text is left out: a text that is written on has no end.

    Raises:
        UserError: where it puts several, or the file is no tokenizer.
    """
    identify_tokenizer(choice)
    model, _ = _opened(choice)
    plain = model.encode("a", add_special_tokens=False).ids
    whole = model.encode("a", add_special_tokens=True).ids
    places = range(len(whole) - len(plain) + 1)
    found = next((i for i in places if whole[i : i + len(plain)] == plain), 0)
    if found > 1:
        rule = f"puts {found} tokens before a text, and one or none is supported"
        refuse("data.tokenizer", choice, rule, "Use another checkpoint")
    return whole[0] if found else None


def bytes_by_token(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The number of the text's UTF-8 bytes of each token, and of the end: the rest and one more.

    `spans` are the tokens' (start, stop) in characters. Bytes that no span covers count with the
    token after them; those of a span that several tokens share, as where a character is cut into
    its bytes, are shared out among them.
    """
    widths = (1 + (c > "\x7f") + (c > "\u07ff") + (c > "\uffff") for c in text)
    to_byte = [*itertools.accumulate(widths, initial=0)]
    sizes, covered, start = [], 0, 0
    while start < len(spans):
        stop = start + 1
        while stop < len(spans) and spans[stop] == spans[start]:
            stop += 1
        reached = max(covered, to_byte[spans[start][1]])
        each, more = divmod(reached - covered, stop - start)
        sizes += [each + (i < more) for i in range(stop - start)]
        covered, start = reached, stop
    sizes.append(to_byte[-1] - covered + 1)
    if max(sizes) >= 2**16:
        raise ValueError(
            f"a token stands for {max(sizes):,} bytes and may for at most 65,535. Use another "
            "data.tokenizer"
        )
    return sizes


def _first_change(text: str, returned: str) -> str:
    """Where a text first differs from what a tokeniser made of it."""
    same = next(
        (i for i, pair in enumerate(zip(text, returned, strict=False)) if pair[0] != pair[1]),
        min(len(text), len(returned)),
    )
    given, came = text[same : same + 12], returned[same : same + 12]
    return (
        f"text must come back from its tokens as it was, but {given!r} at character {same:,} "
        f"became {came!r}. Use a lossless tokenizer (byte-level BPE, say) or data.tokenizer={BYTES}"
    )


def encode_bytes(document: bytes) -> array:
    return array("B", document + b"\0")


def decode_bytes(tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    del before
    return codecs.iterdecode((bytes([token]) for token in tokens), "utf-8", errors="replace")


BYTE_TOKENIZER = Tokenizer(BYTES, 256, 0, encode_bytes, encode_bytes, decode_bytes)


def identify_tokenizer(choice: str) -> str:
    """The tokeniser's name, cheaply: nothing is imported, its file is only hashed.

    Raises UserError where `choice` is neither "bytes" nor a readable file, or where the optional
    package is missing. Nothing is ever downloaded.
    """
    if choice == BYTES:
        return BYTES
    try:
        if os.path.exists(choice) and not os.path.isfile(choice):  # a pipe is read for ever
            raise OSError(errno.EINVAL, "no regular file")
        digest = hashlib.sha256(Path(choice).read_bytes()).hexdigest()
    except OSError as error:
        rule = f"must be {BYTES} or a tokenizers JSON file that can be read ({error.strerror})"
        refuse("data.tokenizer", choice, rule, "Nothing is downloaded")
    if importlib.util.find_spec("tokenizers") is None:
        rule, advice = "needs the package tokenizers", f"pip install tokenizers, or use {BYTES}"
        refuse("data.tokenizer", choice, rule, f"Run {advice}")
    return f"{Path(choice).name}@{digest[:12]}"
