"""Guesses without association: by plain loops over what each synthetic task generates."""

import functools
from collections import Counter

import numpy as np
import pytest
from building import train_config

from zoo.config.groups import choices, corpora
from zoo.data.examples import SyntheticData
from zoo.data.guesses import best_guess, most_frequent
from zoo.data.synthetic import NO_LABEL, Examples, mqar
from zoo.training.data import open_data

TASKS = [name for name in choices("data") if name not in corpora()]


def plainly(examples: Examples) -> float:
    """The best of: the token, the token before it, the first of the most frequent answers."""
    answers = set(examples.labels[examples.labels != NO_LABEL].tolist())
    right = Counter()
    count = 0
    for tokens, labels in zip(examples.tokens.tolist(), examples.labels.tolist(), strict=True):
        seen: Counter = Counter()
        best = None
        for t, (token, label) in enumerate(zip(tokens, labels, strict=True)):
            if token in answers and (examples.stated is None or t < examples.stated):
                seen[token] += 1
                if best is None or seen[token] > seen[best]:
                    best = token
            if label != NO_LABEL:
                count += 1
                right["itself"] += token == label
                right["before"] += t > 0 and tokens[t - 1] == label
                right["frequent"] += best == label
    return max(right.values()) / count


@functools.cache
def task_of(name: str) -> SyntheticData:
    data = open_data(train_config(f"data={name}", "size=tiny", "seq_len=32").data, 32)
    assert isinstance(data, SyntheticData)
    return data


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [32, 128])
def test_a_guess_scores_what_its_rules_do_by_plain_loops(name, length):
    examples = task_of(name).examples("test", 0, 0, 32, length)
    assert best_guess(examples) == pytest.approx(plainly(examples), abs=1e-12)
    assert best_guess(examples) == best_guess(task_of(name).examples("test", 0, 0, 32, length))


def test_guesses_look_at_nothing_that_a_causal_model_has_not_read():
    for name in TASKS:
        examples = task_of(name).examples("test", 0, 0, 16, 32)
        whole, part = most_frequent(examples), examples._replace(tokens=examples.tokens[:, :20])
        np.testing.assert_array_equal(most_frequent(part), whole[:, :20])


@pytest.mark.parametrize(("length", "least"), [(32, 0.28), (512, 0.28)])
def test_the_most_frequent_of_four_values_is_right_more_often_than_one_in_four(length, least):
    examples = mqar(np.random.default_rng(5), 2000, length)
    assert least < best_guess(examples) < 0.32


def test_rows_without_labels_have_no_guess():
    none = Examples(np.zeros((1, 4), int), np.full((1, 4), NO_LABEL), 2, 2)
    with pytest.raises(ValueError, match="no token has a label"):
        best_guess(none)
