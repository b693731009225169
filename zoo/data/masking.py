"""Masked tokens for encoders: a pure function of its key (Devlin 2019, BERT, section 3.1)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

CHOSEN = 0.15  # share of the tokens to be predicted
MASKED, RANDOM = 0.8, 0.1  # of those: shown as the mask token, as any other token; the rest as is


def mask_tokens(
    tokens: Int[np.ndarray, " t"], vocab_size: int, key: Sequence[int]
) -> tuple[Int[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
    """What the model is shown, and where it predicts; the mask token is `vocab_size`.

    At least one token is chosen, so that a loss over them exists. `key` seeds the choice.
    """
    generator = np.random.default_rng(key)
    chosen = _choose(len(tokens), generator)
    how = generator.random(len(tokens))
    shown = np.where(chosen & (how < MASKED), vocab_size, tokens)
    strange = chosen & (how >= MASKED) & (how < MASKED + RANDOM)
    other = generator.integers(vocab_size, size=len(tokens))
    return np.where(strange, other, shown), chosen


def chosen_count(count: int, key: Sequence[int]) -> int:
    """How many of `count` tokens `mask_tokens` chooses under `key`, whatever they are."""
    return int(_choose(count, np.random.default_rng(key)).sum())


def _choose(count: int, generator: np.random.Generator) -> Bool[np.ndarray, " t"]:
    draw = generator.random(count)
    return draw < max(CHOSEN, np.nextafter(draw.min(), 1.0))


def mask_windows(
    windows: Int[np.ndarray, "b t"], vocab_size: int, keys: Sequence[Sequence[int]]
) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """`mask_tokens` of each window, with its own key."""
    masked = [
        mask_tokens(*pair) for pair in zip(windows, [vocab_size] * len(keys), keys, strict=True)
    ]
    shown, chosen = zip(*masked, strict=True)
    return np.stack(shown), np.stack(chosen)
