"""Scores of answers are what their papers define, against counts and sequences tried one by one."""

import itertools
import string
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.tasks.answers import METRICS

WORDS = ["the", "cat", "sat", "sat", "a", "on", "the", "mat"]
CASES = [
    ("the cat sat", "the cat sat"),
    ("the cat sat", "the cat ran"),
    ("", "the cat"),
    ("...", "the cat"),
    ("the the the", "the cat the"),
    ("cat cat cat cat", "cat"),
    ("The CAT, sat.", "the cat sat"),
    ("it's a U.S. report", "its a US report"),
    ("semi-final", "semi final"),
    ("one\ntwo\n\nthree", "one two three"),
    ("sat cat the", "the cat sat"),
    ("a an the", "answer"),
    ("an", "The."),
    ("3.5 million", "3.5 millions"),
    ("caf\u00e9 au lait", "cafe au lait"),
]


def f_measure(common: int, one: int, other: int) -> Fraction:
    """The harmonic mean of common / one and common / other."""
    return Fraction(2 * common, one + other) if common else Fraction(0)


def common_of(one: list, other: list) -> int:
    """How many elements two lists have in common, each taken once."""
    left, count = [*other], 0
    for element in one:
        if element in left:
            left.remove(element)
            count += 1
    return count


def rouge_words(text: str) -> list[str]:
    """Lin 2004's tokens: letters and digits in lower case, whatever is between them a space."""
    kept = (c if c in string.ascii_lowercase + string.digits else " " for c in text.lower())
    return "".join(kept).split()


def rouge_n(written: str, right: str, n: int) -> Fraction:
    one, other = (
        [words[i : i + n] for i in range(len(words) - n + 1)]
        for words in (rouge_words(written), rouge_words(right))
    )
    return f_measure(common_of(one, other), len(one), len(other))


def rouge_l(written: str, right: str) -> Fraction:
    """By the longest of all subsequences of the one that the other has."""
    one, other = rouge_words(written), rouge_words(right)
    for size in range(min(len(one), len(other)), 0, -1):
        theirs = set(itertools.combinations(other, size))
        if any(some in theirs for some in itertools.combinations(one, size)):
            return f_measure(size, len(one), len(other))
    return Fraction(0)


def squad_words(text: str) -> list[str]:
    """Rajpurkar 2016's tokens: no punctuation, no articles, in lower case."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def squad_f1(written: str, right: str) -> Fraction:
    one, other = squad_words(written), squad_words(right)
    if not one or not other:
        return Fraction(one == other)
    return f_measure(common_of(one, other), len(one), len(other))


def check(written: str, answers: list[str]) -> None:
    found = METRICS["rouge"](written, answers)
    expected = {
        "score": max(rouge_l(written, one) for one in answers),
        "rouge1": max(rouge_n(written, one, 1) for one in answers),
        "rouge2": max(rouge_n(written, one, 2) for one in answers),
    }
    assert found == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-6)
    f1 = float(max(squad_f1(written, one) for one in answers))
    assert METRICS["f1"](written, answers)["score"] == pytest.approx(f1, abs=1e-6)
    same = any(squad_words(written) == squad_words(one) for one in answers)
    assert METRICS["exact"](written, answers)["score"] == float(same)


@pytest.mark.parametrize(("written", "right"), CASES)
def test_a_score_is_that_of_its_definition(written, right):
    check(written, [right])


@given(
    st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join),
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), min_size=1),
)
def test_a_score_is_the_best_over_the_right_answers(written, answers):
    check(written, answers[:3])


def test_scores_by_hand():
    assert METRICS["f1"]("a green door", ["the red door"])["score"] == pytest.approx(0.5)
    assert METRICS["exact"]("The Door.", ["window", "door"])["score"] == 1
    assert METRICS["exact"]("the doors", ["door"])["score"] == 0
    assert METRICS["found"]("X and y", ["x", "Y", "z"])["score"] == pytest.approx(2 / 3)
    found = METRICS["rouge"]("the cat sat", ["the cat ran", "dogs"])
    assert found == pytest.approx({"score": 2 / 3, "rouge1": 2 / 3, "rouge2": 0.5})
