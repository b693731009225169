"""What guessing scores on a synthetic task: the best of a few fixed rules that associate nothing.

    itself    every label is the token that was just read
    before    it is the token before that
    frequent  it is the answer that was stated most often so far, of several the first

Chance, 1 / answers, is of guesses that read nothing. These read, and look nothing up: of four
values, of which a query has one as its answer, the most frequent is right in more than a quarter of
all cases. A model at their level has not learned to associate.
"""

import numpy as np
from jaxtyping import Int

from zoo.data.synthetic import NO_LABEL, Examples


def best_guess(examples: Examples) -> float:
    """The share of labels that the best of the rules predicts. ValueError where there are none."""
    tokens, labels = examples.tokens, examples.labels
    labelled = labels != NO_LABEL
    if not labelled.any():
        raise ValueError("no token has a label")
    before = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=NO_LABEL)
    rules = (tokens, before, most_frequent(examples))
    return max(float((rule == labels)[labelled].mean()) for rule in rules)


def most_frequent(examples: Examples) -> Int[np.ndarray, "b t"]:
    """At each token the answer that was stated most often up to it; NO_LABEL before the first."""
    tokens, every = examples.tokens, np.arange(len(examples.tokens))
    is_answer = np.zeros(examples.symbols, bool)
    is_answer[examples.labels[examples.labels != NO_LABEL]] = True
    counts = np.zeros((len(tokens), examples.symbols), np.int64)
    most, best = np.zeros(len(tokens), np.int64), np.full(len(tokens), NO_LABEL)
    found = np.full_like(tokens, NO_LABEL)
    for t in range(tokens.shape[1]):
        if examples.stated is None or t < examples.stated:
            read = tokens[:, t]
            counts[every, read] += is_answer[read]
            more = counts[every, read] > most
            most, best = np.where(more, counts[every, read], most), np.where(more, read, best)
        found[:, t] = best
    return found
