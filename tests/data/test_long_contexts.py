"""Generated examples hold what their question needs, at any size; files are read or refused."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.data.long_contexts import (
    COMMON,
    COMMON_TIMES,
    GENERATED,
    HOPS,
    MOVES,
    OTHER_TIMES,
    PLACES,
    read_examples,
    sentences,
)
from zoo.errors import UserError

TEXT = [f"Sentence {i} of a book." for i in range(50)]
FIELDS = ("context", "input", "answers")


def made(name: str, size: int, seed: int = 0):
    return GENERATED[name](np.random.default_rng(seed), size, TEXT)


@given(st.sampled_from(sorted(GENERATED)), st.integers(0, 60), st.integers(0, 2**31))
def test_an_example_follows_from_its_seed_and_size(name, size, seed):
    one = made(name, size, seed)
    assert one == made(name, size, seed)
    assert one.answers
    assert len(made(name, size + 20, seed).context) > len(one.context)


@given(st.integers(0, 60), st.integers(0, 2**31))
def test_the_answers_are_the_variables_that_the_chain_leads_to(size, seed):
    example = made("variable_tracking", size, seed)
    assigned = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", example.context)
    values: dict[str, str] = {}
    for name, source in assigned:  # each after the one before
        values[name] = values.get(source, source)
    sought = re.search(r"the value (\d{5})\?", example.question)[1]
    assert [*values] == example.answers
    assert {*values.values()} == {sought}
    assert len(assigned) == HOPS + 1
    assert len(re.findall(r"[.]", example.context)) == size + HOPS + 1


@given(st.integers(0, 40), st.integers(0, 2**31))
def test_common_words_come_more_often_than_the_others(size, seed):
    example = made("common_words", size, seed)
    numbers, words = zip(*re.findall(r"(\d+)\. (\w+)", example.context), strict=True)
    assert [*map(int, numbers)] == [*range(1, len(words) + 1)]
    counts = Counter(words)
    assert {word for word, n in counts.items() if n == COMMON_TIMES} == {*example.answers}
    assert sum(n == OTHER_TIMES for n in counts.values()) == size
    assert len(counts) == size + COMMON == len(example.answers) + size


@given(st.integers(0, 60), st.integers(0, 2**31))
def test_somebody_is_where_they_last_went(size, seed):
    example = made("babilong", size, seed)
    moves = re.findall(r"(\w+) went to the (\w+)\.", example.context)
    sought = re.search(r"Where is (\w+) at", example.question)[1]
    assert len(moves) == MOVES
    assert [dict(moves)[sought]] == example.answers
    assert {*example.answers} <= {*PLACES}
    assert len(re.findall(r"Sentence \d+ of a book\.", example.context)) == size


def test_a_text_is_cut_into_sentences_and_lines():
    assert sentences("One  two. Three?\n\nfour\nfive! ") == ["One two.", "Three?", "four", "five!"]


def test_records_of_a_file_are_examples_and_others_are_refused_by_place(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"context": "A text.", "input": "Why?", "answers": ["so", "thus"]}]
    rows += [{"context": "B", "input": "How?", "answers": "well"}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first, second = read_examples(file, FIELDS, "Read.")
    assert first == ("Read.", "A text.", "Why?", ["so", "thus"])
    assert second.answers == ["well"]
    assert next(read_examples(file, ("context", "", "input"), "")).question == ""
    for fields, said in (
        (("text", "input", "answers"), r"fields=text: .*data\.jsonl:1 has no text of that name"),
        (("context", "input", "right"), r"fields=right: .*data\.jsonl:1 has no text or list"),
    ):
        with pytest.raises(UserError, match=said):
            next(read_examples(file, fields, ""))
    with pytest.raises(UserError, match="is no file of records"):
        next(read_examples(tmp_path / "data.csv", FIELDS, ""))


def test_parquet_is_read_as_json_lines_are(tmp_path):
    pyarrow, parquet = (pytest.importorskip(f"pyarrow{name}") for name in ("", ".parquet"))
    row = {"context": "A text.", "input": "Why?", "answers": ["so"], "more": 1}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "data.parquet")
    (example,) = read_examples(tmp_path / "data.parquet", FIELDS, "")
    assert example == ("", "A text.", "Why?", ["so"])
