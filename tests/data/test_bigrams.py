"""The bigram model is the one it says it is, and its file is of the text beside it."""

import math
from array import array
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from zoo.data import bigrams
from zoo.data.bigrams import Bigrams, bigrams_of
from zoo.data.corpora import open_corpus
from zoo.data.store import TokenStore, write_store


def by_hand(train: list[int], text: list[int], vocab_size: int) -> list[float]:
    """Witten & Bell's method C from its definition, one token at a time."""
    pairs, singles = Counter(pairwise(train)), Counter(train[1:])
    costs = []
    for a, b in pairwise(text):
        follows = len({second for first, second in pairs if first == a})
        before = sum(n for (first, _), n in pairs.items() if first == a)
        single = (singles[b] + 1) / (len(train) - 1 + vocab_size)
        p = (pairs[a, b] + follows * single) / (before + follows) if follows else single
        costs.append(-math.log(p))
    return costs


@pytest.mark.parametrize("vocab_size", [6, 5000])
def test_a_score_is_that_of_witten_and_bell(vocab_size, monkeypatch):
    monkeypatch.setattr(bigrams, "BLOCK_TOKENS", 7)  # counts are put together from blocks
    train, text = (np.random.default_rng(i).integers(5, size=50) ** 2 % 6 for i in (1, 2))
    train, text = train[train != 4], np.append(text, 5)
    counted = Bigrams.count(train.astype(np.uint8), vocab_size)
    assert counted.counts.sum() == len(train) - 1
    found = counted.nats(np.stack([text, text[::-1]]).astype(np.uint16))
    for row, tokens in zip(found, (text, text[::-1]), strict=True):
        assert row == pytest.approx(by_hand(train.tolist(), tokens.tolist(), vocab_size))


def test_probabilities_sum_to_one_after_every_token():
    counted = Bigrams.count(np.array([0, 1, 2, 1, 2, 0, 3]), 5)
    for first in range(5):
        rows = np.array([[first, second] for second in range(5)])
        assert np.exp(-counted.nats(rows)).sum() == pytest.approx(1)


def store(folder, text: bytes) -> TokenStore:
    write_store(folder / "train", [("a", text)], lambda document: array("B", document))
    return TokenStore.open(folder / "train")


def test_counts_are_kept_beside_the_text_and_never_taken_for_another(tmp_path, monkeypatch):
    one, other = store(tmp_path / "one", b"abcabd" * 9), store(tmp_path / "two", b"zyzyx" * 9)
    first, second = bigrams_of(one, 256), bigrams_of(other, 256)
    file = tmp_path / "one" / "bigrams.npz"
    (tmp_path / "two" / "bigrams.npz").replace(file)
    again = bigrams_of(one, 256)  # counted anew, and written
    assert again.pairs.tolist() == first.pairs.tolist() != second.pairs.tolist()
    file.write_bytes(file.read_bytes()[:60])
    assert bigrams_of(one, 256).counts.tolist() == first.counts.tolist()
    monkeypatch.setattr(Bigrams, "count", None)
    assert bigrams_of(one, 256).pairs.tolist() == first.pairs.tolist()
    assert sorted(path.name for path in file.parent.iterdir()) == ["bigrams.npz", "train"]


def test_a_corpus_says_what_bigrams_score_on_what_it_holds_out(tmp_path):
    for split, words in (("train", "ab" * 50), ("valid", "ab" * 20), ("test", "ba" * 20)):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text(words)
    spec = {"name": "text", "path": str(tmp_path), "tokenizer": "bytes", "eval_documents": "whole"}
    corpus = open_corpus(spec, tmp_path / "cache")
    summary = corpus.summary
    assert "bigram_nats" not in summary["train"]
    for split in ("valid", "test"):
        nats = corpus.bigrams.nats(corpus.text(split)).mean()
        assert summary[split]["bigram_nats"] == pytest.approx(nats, abs=1e-4)
        assert summary[split]["bigram_bits"] == pytest.approx(nats / math.log(2), abs=1e-4)
