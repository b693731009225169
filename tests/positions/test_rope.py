"""Rotary positions: golden frequencies, norms, and scores that know only the distance."""

import math

import pytest
import torch

from zoo.positions.rope import inverse_frequencies, rotate


def test_frequencies_of_width_128_are_the_published_ones():
    theta = inverse_frequencies(128)
    assert theta[0] == 1
    assert theta[1] == pytest.approx(0.865964, abs=1e-6)
    assert theta[32] == pytest.approx(0.01, abs=1e-12)
    assert theta[63] == pytest.approx(0.000115478, abs=1e-9)


def test_an_odd_head_width_is_refused():
    with pytest.raises(ValueError, match="head width 7 is odd"):
        inverse_frequencies(7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_the_complex_product_of_each_pair(interleaved):
    theta = inverse_frequencies(6)
    x = torch.randn(1, 5, 2, 6, dtype=torch.float64)
    y = rotate(x, theta, start=3, interleaved=interleaved)
    for i, angle in enumerate(theta):
        pair = (2 * i, 2 * i + 1) if interleaved else (i, i + 3)
        turn = torch.tensor(
            [complex(math.cos(m * angle), math.sin(m * angle)) for m in range(3, 8)]
        )
        expected = (
            torch.complex(x[..., pair[0]], x[..., pair[1]]) * turn.to(torch.complex128)[:, None]
        )
        found = torch.complex(y[..., pair[0]], y[..., pair[1]])
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("start", [0, 1000, 2**20])
def test_scores_depend_on_the_distance_alone_even_a_million_tokens_in(start):
    theta = inverse_frequencies(32)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 40, 1, 32, generator=generator)
    near = torch.einsum("bihd,bjhd->ij", rotate(q, theta), rotate(k, theta))
    far = torch.einsum("bihd,bjhd->ij", rotate(q, theta, start), rotate(k, theta, start))
    torch.testing.assert_close(far, near, rtol=0, atol=1e-5)


def test_chunks_of_a_sequence_are_turned_as_the_whole_is():
    theta = inverse_frequencies(8)
    x = torch.randn(2, 11, 1, 8)
    pieces = [rotate(x[:, a:b], theta, start=a) for a, b in [(0, 4), (4, 5), (5, 11)]]
    assert torch.equal(torch.cat(pieces, 1), rotate(x, theta))
