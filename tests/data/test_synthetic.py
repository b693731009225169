"""Synthetic tasks: every label is what a reader who follows the definition word by word says."""

import itertools
import re

import numpy as np
import pytest

from zoo.data import synthetic
from zoo.data.synthetic import NO_LABEL
from zoo.errors import UserError

SETTINGS = {
    "parity": {},
    "word_problem": {"group": "S3"},
    "recall": {"keys": 5, "values": 7},
    "mqar": {"symbols": 20, "pairs": 4, "rewritten": 2},
    "selective_copying": {"symbols": 8, "copied": 4},
    "copying": {"symbols": 9},
    "induction": {"symbols": 6},
    "k_hop": {"symbols": 3, "hops": 2},
}
TASKS = [
    name
    for name, value in vars(synthetic).items()
    if callable(value) and getattr(value, "__module__", "") == synthetic.__name__
    if not name.startswith("_") and name not in ("Examples", "check_task")
]


def generate(name, rows=64, length=32, seed=0, **settings):
    generator = np.random.default_rng(seed)
    return getattr(synthetic, name)(generator, rows, length, **(SETTINGS[name] | settings))


def test_every_task_has_settings_here():
    assert sorted(TASKS) == sorted(SETTINGS)


# Readers: tokens of one row -> {place: label}, from the definitions, with plain loops.


def read_parity(tokens, **_):
    return {i: sum(tokens[: i + 1]) % 2 for i in range(len(tokens))}


def read_word_problem(tokens, group):
    elements = list(itertools.permutations(range(int(group[1]))))
    product, labels = tuple(range(int(group[1]))), {}
    for i, token in enumerate(tokens):
        product = tuple(elements[token][x] for x in product)  # first what came before
        labels[i] = elements.index(product)
    return labels


def read_recall(tokens, **_):
    meaning, labels = {}, {}
    for i in range(0, len(tokens), 2):
        if tokens[i] in meaning:
            labels[i] = meaning[tokens[i]]
        meaning[tokens[i]] = tokens[i + 1]
    return labels


def read_selective_copying(tokens, symbols, copied):
    data = [token for token in tokens if token < symbols]
    assert len(data) == copied
    return dict(zip(range(len(tokens) - copied, len(tokens)), data, strict=True))


def read_copying(tokens, symbols):
    n = tokens.index(symbols)
    return {n + i: tokens[i] for i in range(n)}


def read_induction(tokens, symbols):
    return {len(tokens) - 1: tokens[tokens.index(symbols) + 1]}


def read_k_hop(tokens, hops, **_):
    def hop(i):
        earlier = [j for j in range(i) if tokens[j] == tokens[i]]
        return earlier[-1] + 1 if earlier else None

    labels = {}
    for i in range(len(tokens)):
        place = i
        for _ in range(hops):
            place = None if place is None else hop(place)
        if place is not None:
            labels[i] = tokens[place]
    return labels


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "mqar"])
def test_labels_are_what_the_definition_says(name):
    examples = generate(name)
    for tokens, labels in zip(*map(np.ndarray.tolist, examples[:2]), strict=True):
        found = {i: label for i, label in enumerate(labels) if label != NO_LABEL}
        assert found == globals()[f"read_{name}"](tokens, **SETTINGS[name])


def test_every_key_is_queried_once_for_its_last_value():
    examples, settings = generate("mqar"), SETTINGS["mqar"]
    stated = 2 * (settings["pairs"] + settings["rewritten"])
    changed = 0
    for tokens, labels in zip(*map(np.ndarray.tolist, examples[:2]), strict=True):
        pairs = list(zip(tokens[0:stated:2], tokens[1:stated:2], strict=True))
        meaning = dict(pairs)
        changed += sum(meaning[key] != value for key, value in pairs)
        queried = {i: label for i, label in enumerate(labels) if label != NO_LABEL}
        assert sorted(tokens[i] for i in queried) == sorted(meaning)
        assert all(i >= stated and i % 2 == 0 for i in queried)
        assert all(meaning[tokens[i]] == label for i, label in queried.items())
        assert all(1 <= key < 10 <= value for key, value in pairs)
    assert changed > 64  # nearly two in every row: a rewritten key has lost its first value


def test_gaps_of_queries_follow_the_power_law():
    labels = generate("mqar", rows=4096, length=64, pairs=1, rewritten=0).labels
    gaps = (np.argmax(labels != NO_LABEL, 1) - 2) // 2 + 1
    space = np.arange(1, 32)
    expected = space**-0.99 / (space**-0.99).sum()
    found = np.bincount(gaps, minlength=32)[1:] / 4096
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / 4096)


@pytest.mark.parametrize("name", SETTINGS)
def test_symbols_are_those_declared_and_answers_are_equally_likely(name):
    examples = generate(name, rows=2048)
    labels = examples.labels[examples.labels != NO_LABEL]
    assert examples.tokens.min() == 0 or name == "mqar"
    assert examples.tokens.max() < examples.symbols
    counts = np.unique(labels, return_counts=True)[1]
    assert len(counts) == examples.answers
    rows = min(len(labels), 2048)  # labels of one row may depend on each other
    share = 1 / examples.answers
    assert np.abs(counts / len(labels) - share).max() < 5 * np.sqrt(share * (1 - share) / rows)


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_and_seeds_differ_and_a_seed_gives_the_same_again(name):
    one, again, other = generate(name), generate(name), generate(name, seed=1)
    assert (one.tokens == again.tokens).all()
    assert (one.labels == again.labels).all()
    assert (one.tokens != other.tokens).any()
    assert len({row.tobytes() for row in one.tokens}) == len(one.tokens)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_docstring_shows_a_row_of_the_task(name):
    text = getattr(synthetic, name).__doc__
    tokens, labels = (
        re.search(rf"^ +{word} +(.*)$", text, re.M)[1] for word in ("tokens", "labels")
    )
    tokens, _, settings = tokens.partition("    ")
    settings = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", settings)}
    examples = getattr(synthetic, name)(np.random.default_rng(0), 1, 12, **settings)
    assert examples.tokens[0].tolist() == [int(token) for token in tokens.split()]
    shown = [NO_LABEL if label == "." else int(label) for label in labels.split()]
    assert examples.labels[0].tolist() == shown


@pytest.mark.parametrize("group", ["Z2", "Z7", "S4", "A5"])
def test_groups_are_groups(group):
    table = synthetic._multiplication(group)
    n = len(table)
    everything = np.arange(n)
    assert n == {"Z2": 2, "Z7": 7, "S4": 24, "A5": 60}[group]
    assert (np.sort(table, 0) == everything[:, None]).all()
    assert (np.sort(table, 1) == everything).all()
    a, b, c = np.random.default_rng(0).integers(n, size=(3, 200))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()


@pytest.mark.parametrize(
    ("name", "length", "settings", "said"),
    [
        ("recall", 7, {}, "length=7"),
        ("mqar", 12, {}, "length=12"),
        ("mqar", 64, {"pairs": 10}, "pairs=10"),
        ("mqar", 64, {"rewritten": 5}, "rewritten=5"),
        ("mqar", 64, {"power": 0.0}, "power=0"),
        ("selective_copying", 6, {}, "length=6"),
        ("selective_copying", 6, {"copied": 0}, "copied=0"),
        ("copying", 5, {}, "length=5"),
        ("induction", 2, {}, "length=2"),
        ("k_hop", 8, {"hops": 0}, "hops=0"),
        ("word_problem", 8, {"group": "S9"}, "S9"),
    ],
)
def test_impossible_settings_are_refused(name, length, settings, said):
    with pytest.raises(UserError, match=re.escape(said)):
        generate(name, length=length, **settings)
