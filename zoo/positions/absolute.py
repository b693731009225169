"""Positions added once, to the token embedding; they go on from the tokens already seen.

`positions`, (b, t), are where the tokens of a training window stand instead.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.positions.rope import inverse_frequencies, rotary_tables


class Sinusoidal(nn.Module):
    """sqrt(width) x + PE, PE[m, 2i] = sin(m theta_i), PE[m, 2i+1] = cos(m theta_i).

    Vaswani 2017, sections 3.4 and 3.5.
    """

    max_length: int | None = None

    def __init__(self, *, width: int, max_length: int | None = None) -> None:
        super().__init__()
        del max_length  # a formula has no end
        self.inv_freq = inverse_frequencies(width)
        self.scale = width**0.5

    def forward(
        self, x: Float[Tensor, "b t d"], start: int = 0, positions: Tensor | None = None
    ) -> Float[Tensor, "b t d"]:
        if positions is None:
            positions = torch.arange(start, start + x.shape[1])
        cos, sin = rotary_tables(self.inv_freq, positions, x.device, x.dtype)
        return self.scale * x + torch.stack([sin, cos], -1).flatten(-3)


class Learned(nn.Module):
    """x + P[m], one trained vector per position up to `max_length` (Gehring 2017; GPT-2)."""

    def __init__(self, *, width: int, max_length: int | None = None) -> None:
        super().__init__()
        if max_length is None:
            raise ValueError("learned positions need max_length, the number of positions to learn")
        self.max_length: int | None = max_length
        self.weight = nn.Parameter(torch.randn(max_length, width) * 0.02)

    def forward(
        self, x: Float[Tensor, "b t d"], start: int = 0, positions: Tensor | None = None
    ) -> Float[Tensor, "b t d"]:
        return x + self.weight[slice(start, start + x.shape[1]) if positions is None else positions]
