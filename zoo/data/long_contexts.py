"""Examples whose answer lies in a long text: generated to any length, or read from a file.

Generated ones are made after their papers, in words of this package, so that scores compare models
here and not with published figures:

    variable_tracking   a chain of variables in a filler, each assigned the one before; which have
                        the value of the first (RULER, Hsieh 2024, section 3, arXiv 2404.06654)
    common_words        a numbered list in which ten words come 30 times and the others 3 times;
                        which are the ten (the same)
    babilong            who went where, in sentences scattered over a text; where somebody is at
                        the end (BABILong, Kuratov 2024, section 2, arXiv 2406.10149; bAbI task 1)

An example follows from its seed and from `size`, which counts what is read around the answer:
sentences of filler, uncommon words, sentences of the text.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zoo.data.records import SUFFIXES, encoded, read_records
from zoo.errors import refuse, refuse_path


class Example(NamedTuple):
    """What is read, in this order, and the answers: all of a generated one, any of a file's."""

    instruction: str
    context: str
    question: str
    answers: list[str]


Make = Callable[[np.random.Generator, int, Sequence[str]], Example]
FILLER = ("The tide comes in.", "The tide goes out.", "Gulls cross the bay.", "Boats lie still.")
HOPS = 4  # assignments after the first
COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
PEOPLE = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")
MOVES = 8


def variable_tracking(rng: np.random.Generator, size: int, _text: Sequence[str]) -> Example:
    """A chain of HOPS + 1 variables among `size` sentences of filler."""
    letters = np.array([*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"])
    names: list[str] = []
    while len(names) <= HOPS:
        if (name := "".join(rng.choice(letters, 5))) not in names:
            names.append(name)
    value = str(rng.integers(10_000, 100_000))
    said = [f"VAR {names[0]} = {value}."]
    said += [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    filler = [FILLER[i % len(FILLER)] for i in range(size)]
    return Example(
        "The text below assigns values to variables. Follow the assignments.",
        " ".join(_scattered(rng, said, filler)),
        f"Which variables have the value {value}? The {HOPS + 1} variables are:",
        names,
    )


def common_words(rng: np.random.Generator, size: int, _text: Sequence[str]) -> Example:
    """A list of COMMON words, COMMON_TIMES each, and `size` others, OTHER_TIMES each."""
    words = _words(rng, COMMON + size)
    common, others = words[:COMMON], words[COMMON:]
    every = [*common * COMMON_TIMES, *others * OTHER_TIMES]
    order = rng.permutation(len(every))
    return Example(
        "The list below repeats some words more often than others.",
        " ".join(f"{i}. {every[at]}" for i, at in enumerate(order, 1)),
        f"Which {COMMON} words come most often? The {COMMON} words are:",
        common,
    )


def babilong(rng: np.random.Generator, size: int, text: Sequence[str]) -> Example:
    """MOVES sentences of who went where among `size` sentences of a text, which begin anywhere."""
    who, where = (rng.choice(names, MOVES) for names in (PEOPLE, PLACES))
    said = [f"{one} went to the {place}." for one, place in zip(who, where, strict=True)]
    start = int(rng.integers(len(text))) if text else 0
    around = [text[(start + i) % len(text)] for i in range(size)]
    sought = str(rng.choice(who))
    last = max(i for i, one in enumerate(who) if one == sought)
    return Example(
        "Sentences about people are hidden in the text below.",
        " ".join(_scattered(rng, said, around)),
        f"Where is {sought} at the end? {sought} is in the",
        [str(where[last])],
    )


GENERATED: dict[str, Make] = {
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "babilong": babilong,
}


def _scattered(rng: np.random.Generator, said: Sequence[str], around: Sequence[str]) -> list[str]:
    """The sentences of `said`, in their order, at random places among those of `around`."""
    places = np.sort(rng.integers(len(around) + 1, size=len(said)))
    found, begin = [], 0
    for sentence, place in zip(said, places.tolist(), strict=True):
        found += [*around[begin:place], sentence]
        begin = place
    return [*found, *around[begin:]]


def _words(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of three syllables, none of which is part of another."""
    found: dict[str, None] = {}
    while len(found) < count:
        consonants = rng.choice([*"bdfgklmnprstvz"], 3)
        vowels = rng.choice([*"aeiou"], 3)
        found["".join(map("".join, zip(consonants, vowels, strict=True)))] = None
    return [*found]


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, without what is empty."""
    parts = re.split(r"(?<=[.!?])\s+|\n+", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


def read_examples(path: Path, fields: Sequence[str], instruction: str) -> Iterator[Example]:
    """The examples of a file of records, .jsonl or .parquet (also .gz, .zst).

    Args:
        fields: names of the text, of the question (or "" where the text holds it) and of the
            answers, a text or a list of texts.

    Raises:
        UserError: a record has no such field, its value is no text, or an answer is empty.
    """
    text, question, answers = fields
    for number, record in read_records(kind_of(path), path, [name for name in fields if name]):
        place = f"{path}:{number}"
        found = {name: record.get(name) for name in (text, question) if name}
        for name, value in found.items():
            if not isinstance(value, str):
                rule = f"{place} has no text of that name"
                refuse("task.documents.fields", name, rule, f"Use {', '.join(record)}")
        right = record.get(answers)
        right = [right] if isinstance(right, str) else right
        if (
            not isinstance(right, list)
            or not right
            or not all(isinstance(x, str) and x.strip() for x in right)
        ):
            rule = f"{place} has no text or list of texts of that name"
            refuse("task.documents.fields", answers, rule, f"Use {', '.join(record)}")
        for part in (*filter(None, found.values()), *right):
            encoded(part, place)
        yield Example(instruction, found[text] or "", found.get(question) or "", right)


def kind_of(path: Path) -> str:
    """jsonl or parquet, by a file's name. UserError for any other."""
    for kind, suffix in SUFFIXES.items():
        if suffix in path.suffixes[-2:]:
            return kind
    advice = f"Give a file of {' or '.join(SUFFIXES.values())}"
    return refuse_path(path, "is no file of records", advice)
