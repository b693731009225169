"""Which window of the text each row of each training step reads: pure functions of (seed, step).

Nothing is kept between calls, so any step can be had at once, in any process, after any restart.
The random numbers are raw generator output, which numpy keeps the same for ever.
"""

from functools import lru_cache

import numpy as np

from zoo.errors import refuse


def window_starts(
    n_tokens: int, seq_len: int, batch_size: int, seed: int, step: int, contiguous: bool = False
) -> np.ndarray:
    """Where the `batch_size` windows of a step start, int64; a window is seq_len + 1 tokens.

    Without `contiguous`: each epoch cuts the text into windows that share only their border token
    (the last target of one is the first input of the next), from a fresh shift and in a fresh
    order; a batch may end one epoch and begin another. With it: row r continues row r of the step
    before, see `stream_restarts`. Raises UserError where the text is too short.
    """
    if contiguous:
        first, windows, entry = _streams(n_tokens, seq_len, batch_size, seed)
        return first + (entry + step) % windows * seq_len
    windows = windows_per_epoch(n_tokens, seq_len)
    places = (divmod(i, windows) for i in range(step * batch_size, (step + 1) * batch_size))
    starts = [_epoch(n_tokens, seq_len, seed, epoch)[place] for epoch, place in places]
    return np.array(starts, dtype=np.int64)


def stream_restarts(
    n_tokens: int, seq_len: int, batch_size: int, seed: int, step: int
) -> np.ndarray:
    """Which rows of a contiguous step do not continue the step before, bool (batch_size,).

    Each row owns an equal stretch of the text, enters it at the same seeded window of it and goes
    back to its beginning at its end, so that all rows start anew together and a batch has one
    state. All start at step 0.
    """
    _, windows, entry = _streams(n_tokens, seq_len, batch_size, seed)
    return np.full(batch_size, step == 0 or (entry + step) % windows == 0)


def windows_per_epoch(n_tokens: int, seq_len: int) -> int:
    """Constant, whatever the shift: where the text allows, one window is left for it to move in."""
    if n_tokens < seq_len + 1:
        rule = f"needs {seq_len + 1:,} tokens, and the training text has {n_tokens:,}"
        refuse("seq_len", seq_len, rule, "Use a smaller seq_len or more text")
    return max(1, n_tokens // seq_len - 1)


@lru_cache(maxsize=4)
def _epoch(n_tokens: int, seq_len: int, seed: int, epoch: int) -> np.ndarray:
    """The starts of an epoch's windows, in order."""
    windows = windows_per_epoch(n_tokens, seq_len)
    shifts = n_tokens - windows * seq_len  # at least seq_len where there are two windows or more
    raw = _raw(seed, epoch, 1 + windows)
    return np.argsort(raw[1:], kind="stable") * seq_len + int(raw[0]) % shifts


@lru_cache(maxsize=4)
def _streams(
    n_tokens: int, seq_len: int, batch_size: int, seed: int
) -> tuple[np.ndarray, int, int]:
    """Where each row's first window starts (b,), windows per row, the window they enter at."""
    stretch = (n_tokens - 1) // batch_size
    windows = stretch // seq_len
    if windows < 1:
        refuse(
            "batch_size",
            batch_size,
            f"needs {batch_size * seq_len + 1:,} tokens with seq_len={seq_len} (windows side by "
            f"side), and the training text has {n_tokens:,}",
            "Use a smaller batch_size or seq_len, or more text",
        )
    entry, *shift = _raw(seed, 0, 1 + batch_size).tolist()
    spare = stretch - windows * seq_len  # tokens that fill no window
    first = np.arange(batch_size) * stretch + [row % (spare + 1) for row in shift]
    return first, windows, entry % windows


def _raw(seed: int, epoch: int, count: int) -> np.ndarray:
    """uint64 (count,)."""
    return np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
