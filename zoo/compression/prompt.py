"""A prompt as a compression sees it: pieces of text, and which of them are what.

    piece            the fewest tokens that are whole characters, mostly one; kept or dropped whole
    instruction      x_ins, the pieces that say what to do
    demonstrations   x_dems, each of them a range of pieces: examples, documents, paragraphs
    question         x_que, the pieces at the end

A compression method is a function (scorer, prompt, budget, options) -> the pieces that are kept, by
their numbers, in the order in which they are read.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from zoo.compression.scorer import Scorer
from zoo.data.tokenizers import Tokenizer
from zoo.errors import refuse

Method = Callable[..., list[int]]


class Piece(NamedTuple):
    """Whole characters of a text and their tokens."""

    text: str
    tokens: tuple[int, ...]


class Prompt(NamedTuple):
    """A prompt in pieces; `instruction`, `demonstrations` and `question` follow each other."""

    pieces: list[Piece]
    instruction: range
    demonstrations: list[range]
    question: range

    def size(self, numbers: Sequence[int] | range | None = None) -> int:
        """Tokens of these pieces; of all where none are given."""
        chosen = range(len(self.pieces)) if numbers is None else numbers
        return sum(len(self.pieces[number].tokens) for number in chosen)

    def tokens(self, numbers: Sequence[int] | range) -> list[int]:
        """The tokens of these pieces, one after another."""
        return [token for number in numbers for token in self.pieces[number].tokens]

    def text(self, numbers: Sequence[int] | range) -> str:
        return "".join(self.pieces[number].text for number in numbers)


def pieces_of(text: str, tokenizer: Tokenizer) -> list[Piece]:
    """Cut a text into pieces.

    Raises:
        UserError: the text does not come back from its tokens.
    """
    document = text.encode()
    try:
        found = tokenizer.encode_checked(document)
    except ValueError as error:
        refuse("text", text, str(error).partition(": ")[2] or str(error))
    tokens, sizes = found if isinstance(found, tuple) else (found, [1] * len(found))
    pieces, waiting, start, stop = [], [], 0, 0
    for token, size in zip(tokens[:-1], sizes[:-1], strict=True):
        waiting.append(token)
        stop += size
        if stop == len(document) or (stop > start and document[stop] & 0xC0 != 0x80):
            pieces.append(Piece(document[start:stop].decode(), tuple(waiting)))
            waiting, start = [], stop
    if waiting or start < len(document):  # what the last token does not cover
        before = pieces.pop() if pieces else Piece("", ())
        rest = document[start:].decode()
        pieces.append(Piece(before.text + rest, (*before.tokens, *waiting)))
    return pieces


def prompt_of(text: str, tokenizer: Tokenizer, instruction: str = "", question: str = "") -> Prompt:
    """A prompt: an instruction, a text whose paragraphs are its demonstrations, a question."""
    pieces, ranges = [], []
    for part in (instruction, *paragraphs(text), question):
        own = pieces_of(part, tokenizer) if part else []
        ranges.append(range(len(pieces), len(pieces) + len(own)))
        pieces += own
    return Prompt(pieces, ranges[0], [one for one in ranges[1:-1] if len(one)], ranges[-1])


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text, each with the blank lines after it."""
    start = 0
    for found in re.finditer(r"\n\s*\n", text):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def compressed(
    method: Method,
    scorer: Scorer | None,
    prompt: Prompt,
    *,
    rate: float | None,
    tokens: int | None = None,
) -> list[int]:
    """The pieces that a method keeps of a prompt; all of one that is within the budget.

    Args:
        rate: tokens kept over tokens there are, above 0 and below 1.
        tokens: the most tokens, instead of a rate, which a method may meet within half a unit.

    Raises:
        UserError: the budget is less than the method's smallest unit, or than what stays beside it
            of instruction and question, and nothing would be left.
    """
    size = prompt.size()
    budget = max(round((rate or 1) * size) if tokens is None else tokens, 1)
    if size <= budget:
        return [*range(len(prompt.pieces))]
    kept = method(scorer, prompt, budget)
    while tokens is not None and budget > 1 and prompt.size(kept) > tokens:
        budget = max(budget - prompt.size(kept) + tokens, 1)
        kept = method(scorer, prompt, budget)
    option, value = ("rate", rate) if tokens is None else ("tokens", tokens)
    if tokens is not None and prompt.size(kept) > tokens:
        rule = f"{prompt.size(kept)} tokens of instruction and question stay whole"
        refuse(option, value, rule, "Keep more, or shorten them")
    if not kept:
        rule = f"leaves nothing of a prompt of {size} tokens, as no unit of it is within {budget}"
        refuse(option, value, rule, "Keep more of it, or cut it into smaller units")
    return kept
