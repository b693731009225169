"""Masked tokens: the published shares, and nothing shown differently where nothing is predicted."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from zoo.data.masking import mask_tokens

VOCABULARY = 50


def test_the_published_shares_are_chosen_masked_replaced_and_kept():
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=200_000)
    shown, chosen = mask_tokens(tokens, VOCABULARY, (1,))
    masked = shown == VOCABULARY
    assert abs(chosen.mean() - 0.15) < 0.003
    assert abs(masked[chosen].mean() - 0.8) < 0.01
    kept = (shown == tokens)[chosen].mean()  # a random token is the same one now and then
    assert abs(kept - (0.1 + 0.1 / VOCABULARY)) < 0.01


@given(length=st.integers(1, 40), seed=st.integers(0, 1000))
def test_tokens_not_chosen_are_shown_as_they_are_and_one_is_always_chosen(length, seed):
    tokens = np.arange(length) % VOCABULARY
    shown, chosen = mask_tokens(tokens, VOCABULARY, (seed,))
    assert chosen.any()
    assert (shown[~chosen] == tokens[~chosen]).all()
    assert ((shown >= 0) & (shown <= VOCABULARY)).all()
    again, _ = mask_tokens(tokens, VOCABULARY, (seed,))
    assert (again == shown).all()
