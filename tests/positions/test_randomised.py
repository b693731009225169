"""Sampled positions: increasing, within L', reproducible, and with the laws they claim."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.positions.randomised import chunk_lengths, pose, randomised, skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 60), st.integers(0, 500), st.integers(1, 5), st.integers(0, 2**31))
def test_positions_increase_and_stay_below_the_length(tokens, more, chunks, seed):
    length = tokens + more
    for at in (
        randomised(tokens, length, seeded(seed)),
        pose(tokens, length, seeded(seed), chunks=min(chunks, tokens)),
    ):
        assert at.shape == (tokens,)
        assert (at.diff() > 0).all()
        assert at[0] >= 0
        assert at[-1] < length


@given(st.integers(3, 60), st.integers(0, 500), st.integers(2, 3), st.integers(0, 2**31))
def test_pose_moves_whole_chunks_and_never_the_first(tokens, more, chunks, seed):
    lengths = chunk_lengths(tokens, chunks, seeded(seed))
    assert len(lengths) == chunks
    assert min(lengths) >= 1
    assert sum(lengths) == tokens
    at = skip(lengths, tokens + more, seeded(seed))
    assert at[0] == 0
    moves = [set((run - place).tolist()) for run, place in zip(
        at.split(lengths), torch.arange(tokens).split(lengths), strict=True
    )]  # fmt: skip
    assert all(len(move) == 1 for move in moves)


def test_without_room_positions_are_the_tokens_own():
    assert torch.equal(randomised(9, 9, seeded()), torch.arange(9))
    assert torch.equal(pose(9, 9, seeded(), chunks=3), torch.arange(9))
    assert torch.equal(pose(9, 90, seeded(), chunks=1), torch.arange(9))


def test_positions_are_a_function_of_the_generator_alone():
    for sample in (randomised, pose):
        first, again = (sample(16, 512, seeded(3)) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, sample(16, 512, seeded(4)))


def test_of_two_chunks_the_first_is_any_of_the_shorter_half():
    draws = seeded()
    drawn = Counter(chunk_lengths(9, 2, draws)[0] for _ in range(1000))
    assert set(drawn) == {1, 2, 3, 4, 5}
    assert min(drawn.values()) > 150


def test_a_chunk_moves_by_anything_that_fits():
    draws = seeded()
    drawn = Counter(int(skip([4, 4], 12, draws)[-1]) - 7 for _ in range(1000))
    assert set(drawn) == {0, 1, 2, 3, 4}
    assert min(drawn.values()) > 150


def test_every_position_of_the_longer_text_is_met():
    """PoSE's own check: 64 tokens over 256, within a few thousand examples."""
    draws, met = seeded(), torch.zeros(256, dtype=torch.bool)
    for _ in range(3000):
        met[pose(64, 256, draws)] = True
    assert met.all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: randomised(9, 8, seeded()),
            r"max_length=8: must be at least the number of tokens \(9\)",
        ),
        (lambda: pose(9, 8, seeded()), "max_length=8"),
        (lambda: randomised(0, 8, seeded()), r"\(0\), which must be positive"),
        (
            lambda: pose(3, 8, seeded(), chunks=4),
            r"chunks=4: must be from 1 to the number of tokens \(3\)",
        ),
        (lambda: pose(3, 8, seeded(), chunks=0), "chunks=0"),
    ],
)
def test_impossible_samples_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
