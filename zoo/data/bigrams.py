"""A bigram model of a training text: the baseline that a model with any use of context beats.

Counts are kept in `bigrams.npz` beside the token stores of the corpus, and counted again where that
file is missing, damaged or of another text.
"""

import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from zoo.data.store import TokenStore

MAX_TOKENS = 2**26  # counted from the start of the text; more changes the baseline by nothing
BLOCK_TOKENS = 2**22
DENSE_VOCABULARY = 2**11  # up to this, counts of a block are an array over all pairs


@dataclass(frozen=True, eq=False)
class Bigrams:
    """How often each token follows each other one in a text.

    `pairs` are first * vocab_size + second, sorted, each once; `counts` how often they occur.
    """

    vocab_size: int
    pairs: Int[np.ndarray, " n"]
    counts: Int[np.ndarray, " n"]

    @classmethod
    def count(cls, tokens: Int[np.ndarray, " t"], vocab_size: int) -> "Bigrams":
        """Count the pairs of neighbours in a text."""
        pairs, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        last = min(len(tokens), MAX_TOKENS) - 1
        for start in range(0, last, BLOCK_TOKENS):
            block = tokens[start : min(last, start + BLOCK_TOKENS) + 1].astype(np.int64)
            keys = block[:-1] * vocab_size + block[1:]
            if vocab_size <= DENSE_VOCABULARY:
                dense = np.bincount(keys)
                more, times = dense.nonzero()[0], dense[dense > 0]
            else:
                more, times = np.unique(keys, return_counts=True)
            pairs, places = np.unique(np.concatenate([pairs, more]), return_inverse=True)
            summed = np.bincount(places, np.concatenate([counts, times]), len(pairs))
            counts = summed.astype(np.int64)  # sums below 2**53 are exact
        return cls(vocab_size, pairs, counts)

    def nats(self, tokens: Int[np.ndarray, "*b t"]) -> Float[np.ndarray, "*b t-1"]:
        """-log p of each token but the first, given the one before it.

        Smoothed by Witten & Bell (1991, method C): p(b | a) = (c(a b) + k(a) p(b)) / (c(a) + k(a)),
        where k(a) is how many different tokens follow a, and p(b) = (c(b) + 1) / (sum c + V).
        """
        before, after = (part.astype(np.int64) for part in (tokens[..., :-1], tokens[..., 1:]))
        firsts, seconds = np.divmod(self.pairs, self.vocab_size)
        follows = np.bincount(firsts, minlength=self.vocab_size)
        total = np.bincount(firsts, self.counts, self.vocab_size)
        single = np.bincount(seconds, self.counts, self.vocab_size) + 1
        single /= single.sum()
        keys = before * self.vocab_size + after
        places = np.searchsorted(self.pairs, keys).clip(max=len(self.pairs) - 1)
        seen = np.where(self.pairs[places] == keys, self.counts[places], 0)
        unseen = np.maximum(follows, 1)  # nothing known of a token: the single frequencies
        p = (seen + unseen[before] * single[after]) / (total + unseen)[before]
        return -np.log(p)


def bigrams_of(store: TokenStore, vocab_size: int) -> Bigrams:
    """The bigrams of a training split, from the file beside it where that is of this text."""
    file = store.folder.parent / "bigrams.npz"
    try:
        with np.load(file, allow_pickle=False) as known:
            if (str(known["sha256"]), int(known["vocab_size"])) == (store.sha256, vocab_size):
                return Bigrams(vocab_size, known["pairs"], known["counts"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # there is none, or it is damaged
    found = Bigrams.count(store.tokens, vocab_size)
    draft = file.with_name(f".bigrams.{os.getpid()}.tmp")
    with suppress(OSError):  # the folder is not ours to write
        with draft.open("wb") as out:
            about = {"sha256": store.sha256, "vocab_size": vocab_size}
            np.savez(out, **about, pairs=found.pairs, counts=found.counts)
        os.replace(draft, file)
    return found
