"""Demonstrations for recall in context: items, each with a label that a prompt states.

    lines      "zibofa: C" in a line of its own, an item of random syllables and a letter; the
               question is "zibofa:"
    symbols    a key and its value, as data=recall and data=mqar have them; the question is the key

Items are drawn without repetition, labels independently of each other.
"""

import inspect
from collections.abc import Iterator
from itertools import product, takewhile
from typing import NamedTuple, NoReturn

import numpy as np

from zoo.data.examples import SyntheticData
from zoo.data.tokenizers import Tokenizer
from zoo.errors import refuse

CONSONANTS, VOWELS, SYLLABLES = "bdfghjklmnprstvz", "aeiou", 3
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Demonstration(NamedTuple):
    """The tokens of an item with its label, those of the question after it, the label's number."""

    shown: list[int]
    question: list[int]
    label: int


class Demonstrations(NamedTuple):
    """All that may be drawn, in random order, and the tokens of every label."""

    drawn: Iterator[Demonstration]
    items: int  # how many there are
    labels: list[list[int]]


def lines(tokenizer: Tokenizer, labels: int, generator: np.random.Generator) -> Demonstrations:
    """Items in lines of text, with the first `labels` letters as labels.

    A label's tokens are those that a line has behind its question, up to what all lines end with.

    Raises:
        UserError: the tokenizer writes labels alike, or, here and while items are drawn, otherwise
            in one line than in another.
    """
    syllables = ["".join(one) for one in product(CONSONANTS, VOWELS)]
    items = len(syllables) ** SYLLABLES
    sample = syllables[0] * SYLLABLES
    written = [_behind(*_line(tokenizer, sample, one)) for one in LETTERS[:labels]]
    backwards = zip(*(one[::-1] for one in written), strict=False)
    alike = sum(1 for _ in takewhile(lambda tokens: len({*tokens}) == 1, backwards))
    names, end = [one[: len(one) - alike] for one in written], written[0][len(written[0]) - alike :]
    if len({*map(tuple, names)}) < labels or [] in names:
        _refuse("writes different labels alike")

    def drawn() -> Iterator[Demonstration]:
        for number in generator.permutation(items).tolist():
            places = np.unravel_index(number, [len(syllables)] * SYLLABLES)
            word, label = "".join(syllables[n] for n in places), int(generator.integers(labels))
            shown, question = _line(tokenizer, word, LETTERS[label])
            if _behind(shown, question) != [*names[label], *end]:
                _refuse("writes a label otherwise behind one item than behind another")
            yield Demonstration(shown, question, label)

    return Demonstrations(drawn(), items, names)


def _line(tokenizer: Tokenizer, item: str, label: str) -> tuple[list[int], list[int]]:
    """The tokens of an item with its label, and those of its question."""
    return tokenizer.tokens(f"{item}: {label}\n"), tokenizer.tokens(f"{item}:")


def _behind(shown: list[int], question: list[int]) -> list[int]:
    """The tokens of a line behind its question."""
    if shown[: len(question)] != question:
        _refuse("writes a question otherwise where its label follows")
    return shown[len(question) :]


def _refuse(rule: str) -> NoReturn:
    rule = f"cannot be measured, as the run's tokenizer {rule}"
    refuse("task", "many_shot", rule, "Measure another task")


def symbols(data: SyntheticData, generator: np.random.Generator) -> Demonstrations | None:
    """Keys with their values, every value a label; None where the data has none."""
    given = inspect.signature(data.task).parameters
    if data.name == "recall":
        count = given["keys"].default
        keys, values = range(count), range(count, count + given["values"].default)
    elif data.name == "mqar":
        half = given["symbols"].default // 2
        keys, values = range(1, half), range(half, given["symbols"].default)
    else:
        return None
    chosen = generator.integers(len(values), size=len(keys)).tolist()
    order = generator.permutation(len(keys)).tolist()
    drawn = (Demonstration([keys[n], values[chosen[n]]], [keys[n]], chosen[n]) for n in order)
    return Demonstrations(drawn, len(keys), [[one] for one in values])
