"""Synthetic tasks: sequences with labels, which show in minutes what an architecture can compute.

Each task is a function (generator, rows, length, its own settings) -> `Examples`. A label is at
the token from whose output it is to be predicted; loss and accuracy are taken there alone. Symbols
are 0, 1, 2 ...; `length` counts every token of a row, so that a model trained on short rows is
tested on long ones of the same task.

    parity              the sum of the bits so far, modulo 2: state tracking
    word_problem        the product so far in a finite group: state tracking beyond parity
    recall              the value that a key had before, for every repeated key (in-context recall)
    mqar                key-value pairs first, then the keys again, far apart (associative recall)
    selective_copying   a few symbols scattered among blanks, to be written in order
    copying             a string and the same string again
    induction           what followed the one earlier occurrence of a marker
    k_hop               induction applied k times

The docstrings' examples are `numpy.random.default_rng(0)`, one row of 12 tokens; . is no label.
"""

from collections.abc import Callable
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from zoo.errors import UserError, choose, refuse

NO_LABEL = -100  # what PyTorch's cross-entropy leaves out


class Examples(NamedTuple):
    """Rows of a task: what is read, and what is to be predicted from the output at each token."""

    tokens: Int[np.ndarray, "b t"]
    labels: Int[np.ndarray, "b t"]  # NO_LABEL where there is no question
    symbols: int  # that tokens and labels are made of: the vocabulary
    answers: int  # of these, equally likely, that a label can be: chance is 1 / answers
    stated: int | None = None  # first tokens, which state all answers; None: any token may


Task = Callable[..., Examples]


def check_task(name: str, task: Task, length: int) -> Examples:
    """One row of a task under its settings. Raises UserError, one line, where it has none."""
    try:
        return task(np.random.default_rng(0), 1, length)
    except UserError as error:
        message = str(error).removesuffix(".").replace("length=", "seq_len=", 1)
        raise UserError(f"{message} (data={name}).") from None


def parity(generator: np.random.Generator, rows: int, length: int) -> Examples:
    """Label every bit with the sum of the bits so far, modulo 2 (Deletang 2023, arXiv 2207.02098).

    tokens   1  1  1  0  0  0  0  0  0  1  1  1
    labels   1  0  1  1  1  1  1  1  1  0  1  0
    """
    bits = generator.integers(2, size=(rows, length))
    return Examples(bits, bits.cumsum(1) % 2, 2, 2)


def word_problem(
    generator: np.random.Generator, rows: int, length: int, *, group: str = "S3"
) -> Examples:
    """Label every element of a group with the product so far (Merrill 2024, arXiv 2404.08819).

    `group` is Z2 .. Z9 (cyclic), S3 .. S5 (symmetric) or A4, A5 (alternating); a product with the
    next element on the left. S5 and A5 are not solvable: their word problem is complete for NC1,
    beyond recurrences with diagonal transitions.

    tokens   5  3  3  1  1  0  0  0  1  4  3  5
    labels   5  1  2  4  2  2  2  2  4  3  4  1
    """
    table = _multiplication(group)
    elements = generator.integers(len(table), size=(rows, length))
    labels = elements.copy()
    for t in range(1, length):
        labels[:, t] = table[elements[:, t], labels[:, t - 1]]
    return Examples(elements, labels, len(table), len(table))


def recall(
    generator: np.random.Generator, rows: int, length: int, *, keys: int = 16, values: int = 16
) -> Examples:
    """Label every key seen before with its value; pairs follow each other to the end.

    In-context recall of MAD (Poli 2024, arXiv 2403.17844, section 3.1), every repeated key queried.
    Keys are 0 .. keys - 1, values the symbols after them; a row draws what each key means.

    tokens   2  3  1  3  1  3  0  3  0  3  0  3    keys=3, values=3
    labels   .  .  .  .  3  .  .  .  3  .  3  .
    """
    _require(length >= 4 and length % 2 == 0, "length", length, "even, at least 4")
    _require(keys >= 2, "keys", keys, "at least 2")
    _require(values >= 2, "values", values, "at least 2")
    queried = generator.integers(keys, size=(rows, length // 2))
    meaning = generator.integers(keys, keys + values, size=(rows, keys))
    answers = np.take_along_axis(meaning, queried, 1)
    known = np.zeros_like(queried, dtype=bool)
    for key in range(keys):
        at = queried == key
        known |= at & (at.cumsum(1) > 1)
    tokens = np.stack([queried, answers], -1).reshape(rows, length)
    labels = np.full_like(tokens, NO_LABEL)
    labels[:, ::2] = np.where(known, answers, NO_LABEL)
    return Examples(tokens, labels, keys + values, values)


def mqar(
    generator: np.random.Generator,
    rows: int,
    length: int,
    *,
    symbols: int = 64,
    pairs: int = 4,
    rewritten: int = 0,
    power: float = 0.01,
) -> Examples:
    """State key-value pairs, then query every key once: multi-query associative recall.

    Arora 2023 (Zoology, arXiv 2312.04927, section 4). Keys are 1 .. symbols/2 - 1, values the upper
    half of the symbols. A query is at an even place after the pairs, its gap g drawn with
    probability ~ power g^(power - 1), no two at the same; all other tokens are random filler.
    `rewritten` of the keys are stated again with another value, which then is the answer.

    tokens   6 12  3  8  3  0  6  0  2 13 10 14    symbols=16, pairs=2
    labels   .  .  .  .  8  . 12  .  .  .  .  .
    """
    half, stated = symbols // 2, 2 * (pairs + rewritten)
    room = (length - stated) // 2
    _require(1 <= pairs < half, "pairs", pairs, f"1 to {half - 1}, the keys there are")
    _require(0 <= rewritten <= pairs, "rewritten", rewritten, "at most pairs")
    _require(room >= pairs, "length", length, f"at least {stated + 2 * pairs}")
    _require(power > 0, "power", power, "above 0")
    tokens = generator.integers(symbols, size=(rows, length))
    labels = np.full_like(tokens, NO_LABEL)
    keys = 1 + _distinct(generator, rows, half - 1, pairs)
    values = generator.integers(half, symbols, size=(rows, pairs))
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    if rewritten:
        again = _distinct(generator, rows, pairs, rewritten)
        fresh = generator.integers(half, symbols, size=(rows, rewritten))
        np.put_along_axis(values, again, fresh, 1)
        tokens[:, 2 * pairs : stated : 2] = np.take_along_axis(keys, again, 1)
        tokens[:, 2 * pairs + 1 : stated : 2] = fresh
    gaps = (power - 1) * np.log(np.arange(1, room + 1))  # log-probabilities, up to a constant
    drawn = np.argsort(-gaps - generator.gumbel(size=(rows, room)), 1)[:, :pairs]
    queries = stated + 2 * drawn
    np.put_along_axis(tokens, queries, keys, 1)
    np.put_along_axis(labels, queries, values, 1)
    return Examples(tokens, labels, symbols, symbols - half, stated)


def selective_copying(
    generator: np.random.Generator, rows: int, length: int, *, symbols: int = 8, copied: int = 4
) -> Examples:
    """Scatter `copied` symbols among blanks, then request them in order, a marker for each.

    Gu & Dao 2023 (Mamba, arXiv 2312.00752, section 4.1.1). The blank is `symbols`, the marker
    `symbols` + 1; a row ends with its markers.

    tokens   6  5  8  8  4  8  2  8  9  9  9  9
    labels   .  .  .  .  .  .  .  .  6  5  4  2
    """
    blanks = length - copied
    _require(symbols >= 2, "symbols", symbols, "at least 2")
    _require(copied >= 1, "copied", copied, "at least 1")
    _require(blanks >= copied, "length", length, f"at least {2 * copied}")
    tokens = np.full((rows, length), symbols)
    labels = np.full_like(tokens, NO_LABEL)
    data = generator.integers(symbols, size=(rows, copied))
    places = np.sort(_distinct(generator, rows, blanks, copied), 1)
    np.put_along_axis(tokens, places, data, 1)
    tokens[:, blanks:], labels[:, blanks:] = symbols + 1, data
    return Examples(tokens, labels, symbols + 2, symbols, blanks)


def copying(
    generator: np.random.Generator, rows: int, length: int, *, symbols: int = 26
) -> Examples:
    """Request a random string a second time, symbol by symbol (Jelassi 2024, arXiv 2402.01032).

    A row is n random symbols, the separator `symbols` and the first n - 1 of them again, where
    n = length / 2; the last n outputs are to be the string.

    tokens  22 16 13  7  8  1 26 22 16 13  7  8
    labels   .  .  .  .  .  . 22 16 13  7  8  1
    """
    _require(length >= 4 and length % 2 == 0, "length", length, "even, at least 4")
    _require(symbols >= 2, "symbols", symbols, "at least 2")
    n = length // 2
    string = generator.integers(symbols, size=(rows, n))
    separator, nothing = np.full((rows, 1), symbols), np.full((rows, n), NO_LABEL)
    tokens = np.concatenate([string, separator, string[:, :-1]], 1)
    return Examples(tokens, np.concatenate([nothing, string], 1), symbols + 1, symbols, n)


def induction(
    generator: np.random.Generator, rows: int, length: int, *, symbols: int = 16
) -> Examples:
    """Label the last token, a marker, with what followed the one marker before it.

    Gu & Dao 2023 (Mamba, arXiv 2312.00752, section 4.1.2). The marker is `symbols`.

    tokens  13 10  8  4  4 16  1  0  2 13 10 16
    labels   .  .  .  .  .  .  .  .  .  .  .  1
    """
    _require(length >= 3, "length", length, "at least 3")
    _require(symbols >= 2, "symbols", symbols, "at least 2")
    tokens = generator.integers(symbols, size=(rows, length))
    labels = np.full_like(tokens, NO_LABEL)
    marker, every = generator.integers(length - 2, size=rows), np.arange(rows)
    tokens[every, marker] = tokens[:, -1] = symbols
    labels[:, -1] = tokens[every, marker + 1]
    return Examples(tokens, labels, symbols + 1, symbols)


def k_hop(
    generator: np.random.Generator, rows: int, length: int, *, symbols: int = 4, hops: int = 2
) -> Examples:
    """Label every token with the symbol that `hops` steps of induction lead to.

    One step goes from place i to the place after the last earlier occurrence of token i
    (Sanford 2024, arXiv 2402.09268, section 4.1). Where there is none there is no label.

    tokens   3  2  2  1  1  0  0  0  0  3  2  3
    labels   .  .  2  .  1  .  0  0  0  .  .  1
    """
    _require(hops >= 1, "hops", hops, "at least 1")
    _require(symbols >= 2, "symbols", symbols, "at least 2")
    _require(length >= 3, "length", length, "at least 3")
    tokens = generator.integers(symbols, size=(rows, length))
    every = np.arange(rows)
    step = np.full((rows, length + 1), length)  # `length` is no place, and leads to none
    last = np.full((rows, symbols), length)
    for i in range(length):
        step[:, i] = np.minimum(last[every, tokens[:, i]] + 1, length)
        last[every, tokens[:, i]] = i
    place = np.tile(np.arange(length), (rows, 1))
    for _ in range(hops):
        place = np.take_along_axis(step, place, 1)
    padded = np.pad(tokens, ((0, 0), (0, 1)), constant_values=NO_LABEL)
    return Examples(tokens, np.take_along_axis(padded, place, 1), symbols, symbols)


def _distinct(generator: np.random.Generator, rows: int, below: int, count: int) -> np.ndarray:
    """(rows, count) different integers 0 .. below - 1, in random order."""
    return np.argsort(generator.random((rows, below)), 1)[:, :count]


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        option = "length" if name == "length" else f"data.task.{name}"
        refuse(option, value, f"must be {rule}")


@cache
def _multiplication(group: str) -> Int[np.ndarray, "n n"]:
    """Row a, column b: the number of a b, which does b first."""
    known = [f"Z{n}" for n in range(2, 10)] + ["S3", "S4", "S5", "A4", "A5"]
    kind, n = choose("data.task.group", group, known)[0], int(group[1])
    elements = list(permutations(range(n)))
    if kind == "A":
        elements = [p for p in elements if _inversions(p) % 2 == 0]
    elif kind == "Z":
        elements = [tuple((i + shift) % n for i in range(n)) for shift in range(n)]
    number = {p: i for i, p in enumerate(elements)}
    rows = [[number[tuple(a[i] for i in b)] for b in elements] for a in elements]
    return np.array(rows)


def _inversions(p: tuple[int, ...]) -> int:
    return sum(p[i] > p[j] for j in range(len(p)) for i in range(j))
