"""The order of the data is a pure function of (seed, step)."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.data import order
from zoo.data.order import stream_restarts, window_starts, windows_per_epoch
from zoo.errors import UserError

lengths = st.integers(1, 50)
seeds = st.integers(0, 2**40)
Shape = tuple[int, int, int, int]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """n_tokens, seq_len, batch_size, seed; long enough for every row to have a window."""
    seq_len, batch_size = draw(lengths), draw(st.integers(1, 6))
    n_tokens = batch_size * seq_len + 1 + draw(st.integers(0, 1000))
    return n_tokens, seq_len, batch_size, draw(seeds)


@given(shapes(), st.booleans(), st.randoms())
def test_any_step_can_be_drawn_at_any_time(shape: Shape, contiguous, rng: random.Random):
    steps = list(range(40))
    expected = {step: window_starts(*shape, step, contiguous).tolist() for step in steps}
    rng.shuffle(steps)
    for step in steps:
        order._epoch.cache_clear()
        order._streams.cache_clear()
        assert window_starts(*shape, step, contiguous).tolist() == expected[step]


@given(shapes(), st.booleans(), st.integers(0, 10**9))
def test_every_window_lies_in_the_text(shape: Shape, contiguous, step):
    n_tokens, seq_len, batch_size, _ = shape
    starts = window_starts(*shape, step, contiguous)
    assert starts.shape == (batch_size,)
    assert starts.dtype == np.int64
    assert starts.min() >= 0
    assert starts.max() + seq_len + 1 <= n_tokens


@given(st.integers(2, 2000), lengths, seeds, st.integers(0, 3))
def test_an_epoch_reads_every_window_once_without_overlap(n_tokens, seq_len, seed, epoch):
    if n_tokens < seq_len + 1:
        return
    windows = windows_per_epoch(n_tokens, seq_len)
    steps = range(epoch * windows, (epoch + 1) * windows)
    starts = np.sort([window_starts(n_tokens, seq_len, 1, seed, step)[0] for step in steps])
    assert (np.diff(starts) == seq_len).all()
    assert windows * seq_len > n_tokens - 2 * seq_len - 1  # less than two windows are left out


@given(shapes(), st.integers(0, 20))
def test_a_larger_batch_reads_the_same_windows_in_the_same_order(shape: Shape, step):
    n_tokens, seq_len, batch_size, seed = shape
    first = range(step * batch_size, (step + 1) * batch_size)
    singles = [window_starts(n_tokens, seq_len, 1, seed, i)[0] for i in first]
    assert window_starts(*shape, step).tolist() == singles


def test_epochs_and_seeds_differ():
    n_tokens, seq_len = 100_000, 100
    windows = windows_per_epoch(n_tokens, seq_len)
    first, second = (window_starts(n_tokens, seq_len, windows, 0, step) for step in (0, 1))
    other = window_starts(n_tokens, seq_len, windows, 1, 0)
    assert (first != second).any()
    assert (first != other).any()
    assert len({starts.min() for starts in (first, second, other)}) > 1  # the shift, too
    in_place = np.arange(windows) * seq_len + first.min()
    assert (first == in_place).mean() < 0.05


def test_every_token_is_read_in_some_epoch():
    n_tokens, seq_len = 75, 10
    windows = windows_per_epoch(n_tokens, seq_len)
    starts = {int(i) for e in range(400) for i in window_starts(n_tokens, seq_len, windows, 3, e)}
    assert (min(starts), max(starts)) == (0, n_tokens - seq_len - 1)


def test_the_order_is_the_same_for_ever():
    assert window_starts(1000, 10, 4, seed=0, step=0).tolist() == [101, 911, 21, 191]
    assert window_starts(1000, 10, 4, seed=7, step=30).tolist() == [17, 987, 277, 177]
    streams = window_starts(1000, 10, 4, seed=0, step=5, contiguous=True)
    assert streams.tolist() == [47, 293, 541, 788]


@given(shapes(), st.integers(1, 100))
def test_a_contiguous_row_continues_unless_it_restarts(shape: Shape, step):
    n_tokens, seq_len, batch_size, _ = shape
    before = window_starts(*shape, step - 1, contiguous=True)
    now = window_starts(*shape, step, contiguous=True)
    restarts = stream_restarts(*shape, step)
    assert restarts.dtype == bool
    windows = (n_tokens - 1) // batch_size // seq_len
    np.testing.assert_array_equal(now - before, np.where(restarts, (1 - windows), 1) * seq_len)


@given(shapes())
def test_every_row_starts_anew_at_first_and_once_a_lap(shape: Shape):
    n_tokens, seq_len, batch_size, _ = shape
    windows = (n_tokens - 1) // batch_size // seq_len
    assert stream_restarts(*shape, 0).all()
    lap = np.stack([stream_restarts(*shape, step) for step in range(1, windows + 1)])
    assert (lap.sum(0) == 1).all()


@given(shapes())
def test_rows_own_stretches_that_share_no_token_but_a_border(shape: Shape):
    n_tokens, seq_len, batch_size, _ = shape
    stretch = (n_tokens - 1) // batch_size
    starts = np.stack([window_starts(*shape, step, contiguous=True) for step in range(200)])
    first = np.arange(batch_size) * stretch
    assert (starts >= first).all()
    assert (starts + seq_len <= first + stretch).all()


def test_rows_restart_together_so_that_a_batch_has_one_state_and_depend_on_the_seed():
    shape = 100_001, 10, 8
    restarts = np.stack([stream_restarts(*shape, 0, step) for step in range(1, 1251)])
    assert sorted(set(restarts.sum(1).tolist())) == [0, 8]
    one, other = (window_starts(*shape, seed, 0, contiguous=True) for seed in (0, 1))
    assert (one != other).any()


def test_a_text_shorter_than_a_window_is_refused():
    assert window_starts(11, 10, 2, 0, 0).tolist() == [0, 0]
    with pytest.raises(
        UserError, match=r"^seq_len=10: needs 11 tokens, and the training text has 10"
    ):
        window_starts(10, 10, 2, 0, 0)


def test_a_text_too_short_for_rows_side_by_side_is_refused():
    assert window_starts(21, 10, 2, 0, 0, contiguous=True).tolist() == [0, 10]
    with pytest.raises(UserError, match=r"^batch_size=2: needs 21 tokens with seq_len=10"):
        window_starts(20, 10, 2, 0, 0, contiguous=True)
