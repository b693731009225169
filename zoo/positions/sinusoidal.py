"""Sinusoids added at the embedding (Vaswani 2017, sections 3.4 and 3.5, arXiv 1706.03762).

sqrt(width) x + PE,  PE[m, 2i] = sin(m theta_i), PE[m, 2i+1] = cos(m theta_i)
"""

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.positions.base import EmbeddedPositions
from zoo.positions.rope import inverse_frequencies, rotary_tables


class Sinusoidal(EmbeddedPositions):
    """Sinusoids of every length from 2 pi to 20000 pi tokens.

    Args:
        width: of the embedding; even.
    """

    def __init__(self, width: int, /) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(width)
        self.embedding_scale = width**0.5

    def forward(
        self, x: Float[Tensor, "b t d"], start: int = 0, positions: Tensor | None = None
    ) -> Float[Tensor, "b t d"]:
        if positions is None:
            positions = self.positions_from(start, x.shape[1])
        cos, sin = rotary_tables(self.inv_freq, positions, x.device, x.dtype)
        return self.embedding_scale * x + torch.stack([sin, cos], -1).flatten(-3)
