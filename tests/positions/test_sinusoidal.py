"""Sinusoids at the embedding are Vaswani's formula."""

import math

import pytest
import torch

from zoo.positions.sinusoidal import Sinusoidal

WIDTH = 8


@pytest.mark.parametrize("start", [0, 1000])
def test_sinusoids_are_the_papers_beside_an_embedding_of_its_scale(start):
    """Vaswani 2017, section 3.5, and 3.4: embeddings times the root of the width."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    found = Sinusoidal(WIDTH)(x, start)
    for t in range(5):
        for channel in range(WIDTH):
            angle = (start + t) / 10000 ** (2 * (channel // 2) / WIDTH)
            wave = math.cos(angle) if channel % 2 else math.sin(angle)
            wanted = math.sqrt(WIDTH) * x[:, t, channel] + wave
            torch.testing.assert_close(found[:, t, channel], wanted, rtol=1e-9, atol=1e-9)
