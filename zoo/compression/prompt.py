"""A prompt as a compression sees it: pieces of text, and which of them are what.

    piece            the fewest tokens that are whole characters, mostly one; kept or dropped whole
    instruction      x_ins, the pieces that say what to do
    demonstrations   x_dems, each of them a range of pieces: examples, documents, paragraphs
    question         x_que, the pieces at the end

A compression method is a function (scorer, prompt, budget, options) -> the pieces that are kept, by
their numbers, in the order in which they are read.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
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


def pieces_of(tokens: Sequence[int], tokenizer: Tokenizer) -> list[Piece]:
    """Cut tokens into pieces, which together are these tokens and their text."""
    taken: list[int] = []

    def read() -> Iterator[int]:
        for token in tokens:
            taken.append(token)
            yield token

    pieces: list[Piece] = []
    start = 0
    for text in tokenizer.decode(read()):  # as soon as its last byte is there
        if start == len(taken):  # what the last token ends with
            before = pieces.pop()
            pieces.append(Piece(before.text + text, before.tokens))
        else:
            pieces.append(Piece(text, tuple(taken[start:])))
        start = len(taken)
    if start < len(taken):  # tokens of no text
        before = pieces.pop() if pieces else Piece("", ())
        pieces.append(Piece(before.text, (*before.tokens, *taken[start:])))
    return pieces


def prompt_of(text: str, tokenizer: Tokenizer, instruction: str = "", question: str = "") -> Prompt:
    """A prompt: an instruction, a text whose paragraphs are its demonstrations, a question.

    Its pieces are cut from the tokens of all three together, as a model reads them.

    Raises:
        UserError: the text does not come back from its tokens.
    """
    whole = f"{instruction}{text}{question}"
    try:
        found = tokenizer.encode_checked(whole.encode())
    except ValueError as error:
        refuse("text", whole, str(error).partition(": ")[2] or str(error))
    tokens = found[0] if isinstance(found, tuple) else found
    pieces = pieces_of(tokens.tolist()[:-1], tokenizer)
    if "".join(piece.text for piece in pieces) != whole:
        refuse("text", whole, "must come back from its tokens one by one", "Use another model")
    return _in_parts(pieces, len(instruction), len(instruction) + len(text))


def prompt_from(tokens: Sequence[int], tokenizer: Tokenizer, question: Sequence[int]) -> Prompt:
    """The prompt of these tokens, and of a question's behind them."""
    pieces = pieces_of([*tokens, *question], tokenizer)
    behind, sizes = 0, accumulate(len(piece.tokens) for piece in pieces)
    for piece, size in zip(pieces, sizes, strict=True):
        behind += len(piece.text) if size <= len(tokens) else 0
    return _in_parts(pieces, 0, behind)


def _in_parts(pieces: list[Piece], begin: int, end: int) -> Prompt:
    """The prompt whose paragraphs are those of its text from character `begin` to `end`.

    A piece of two parts is the instruction's or the question's; of two paragraphs the first's.
    """
    text = "".join(piece.text for piece in pieces)
    edges = [0, begin, *accumulate(map(len, paragraphs(text[begin:end])), initial=begin)][:-1]
    sizes = [0] * (len(edges) + 1)  # pieces of instruction, paragraphs and question
    stop = 0
    for piece in pieces:
        start, stop = stop, stop + len(piece.text)
        sizes[len(edges) if stop > end else bisect_right(edges, start) - 1] += 1
    ranges = [range(first, last) for first, last in pairwise(accumulate(sizes, initial=0))]
    return Prompt(pieces, ranges[0], [one for one in ranges[1:-1] if one], ranges[-1])


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
