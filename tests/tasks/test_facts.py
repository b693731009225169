"""Facts: who reads the sign finds the key; who finds any key is right once in so many."""

import re

import numpy as np
import pytest
from fakes import Finder, make_context, measure, text_store

from zoo.data.passkey import DIGITS, END, QUESTION, STATEMENT
from zoo.errors import UserError
from zoo.tasks.facts import Facts

SMALL = {"depths": 5, "repeats": 8, "candidates": 10}
FACT = re.compile(rf"{re.escape(STATEMENT[:-1])}(.)(\d{{4}}){re.escape(END)}")


class FactFinder(Finder):
    """Writes the key behind the sign that is queried; or, without reading it, the first key."""

    def __init__(self, reads_sign: bool):
        super().__init__(memory=10**6)
        self.reads_sign, self.queried = reads_sign, set()

    def next(self, text: bytes) -> int | None:
        words = text.decode()
        before, question, behind = words.rpartition(QUESTION[:-1])
        if not question or not behind or len(behind) > DIGITS:
            return None
        facts = FACT.findall(before)
        self.queried.add(behind[0])
        key = dict(facts)[behind[0]] if self.reads_sign else facts[0][1]
        return ord(key[len(behind) - 1])


def context(model, folder):
    text = np.random.default_rng(0).integers(97, 123, size=3000)
    return make_context(model, folder, text_store(text), train_length=400)


def test_who_reads_the_sign_finds_every_fact(tmp_path):
    model = FactFinder(reads_sign=True)
    (row,) = measure(Facts, context(model, tmp_path), lengths=[400], **SMALL)
    assert (row["accuracy"], row["exact"], row["count"]) == (1, 1, 40)
    texts = [bytes(row).decode() for prompt in model.prompts for row in prompt.tolist()]
    assert len(texts) == 40
    for text in texts:
        facts = FACT.findall(text)
        assert len({sign for sign, _ in facts}) == len({key for _, key in facts}) == 8
        assert len(text) == 400 - DIGITS
    places = [[sign for sign, _ in FACT.findall(text)].index(text[-1]) for text in texts]
    assert places == [0, 2, 4, 5, 7] * 8  # nearest to the depths 0, 1/4 .. 1
    assert len(model.queried) > 8


def test_who_finds_a_key_but_not_whose_it_is_is_right_where_that_is_the_first(tmp_path):
    (row,) = measure(Facts, context(FactFinder(False), tmp_path), lengths=[400], **SMALL)
    assert row["exact_by_depth"] == row["correct_by_depth"] == [8, 0, 0, 0, 0]


def test_fewer_candidates_than_facts_and_a_text_too_short_for_them_are_refused(tmp_path):
    model = context(FactFinder(True), tmp_path)
    with pytest.raises(UserError, match=r"task\.facts\.candidates=4: must be at least the number"):
        Facts(facts=5, candidates=4).check()
    with pytest.raises(UserError, match=r"task\.facts\.lengths=200: must be at least .* the facts"):
        list(measure(Facts, model, lengths=[200], **SMALL))
