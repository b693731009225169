"""Demonstrations for recall in context: items, each with a label that a prompt states.

    lines      "zibofa: C" in a line of its own, an item of random syllables and a letter; the
               question is "zibofa:"
    symbols    a key and its value, as data=recall and data=mqar have them; the question is the key

Items are drawn without repetition, labels independently of each other.
"""

import inspect
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np

from zoo.data.examples import SyntheticData
from zoo.data.tokenizers import Tokenizer

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
    """Items in lines of text, with the first `labels` letters as labels."""
    syllables = ["".join(one) for one in product(CONSONANTS, VOWELS)]
    items = len(syllables) ** SYLLABLES

    def drawn() -> Iterator[Demonstration]:
        for number in generator.permutation(items).tolist():
            places = np.unravel_index(number, [len(syllables)] * SYLLABLES)
            word, label = "".join(syllables[n] for n in places), int(generator.integers(labels))
            shown = tokenizer.tokens(f"{word}: {LETTERS[label]}\n")
            yield Demonstration(shown, tokenizer.tokens(f"{word}:"), label)

    return Demonstrations(drawn(), items, [tokenizer.tokens(f" {one}") for one in LETTERS[:labels]])


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
