"""One trained vector per position (Gehring 2017, arXiv 1705.03122; Radford 2019, GPT-2)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive
from zoo.errors import refuse
from zoo.positions.base import EmbeddedPositions


class Learned(EmbeddedPositions):
    """x + P[m].

    Args:
        width: of the embedding.
        max_length: positions to learn; longer texts are refused.
    """

    def __init__(self, width: int, /, *, max_length: Positive | None = None) -> None:
        super().__init__()
        if max_length is None or max_length < 1:
            advice = "Use model.positions.max_length=<seq_len or more>, or model=learned."
            refuse("max_length", max_length, "must be a number of positions to learn", advice)
        self.length = max_length
        self.weight = nn.Parameter(torch.randn(max_length, width) * 0.02)

    @property
    def max_length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Tokens that can be read: those that have a position."""
        return self.length if self.pattern is None else self.pattern.placeable(self.length)

    def forward(
        self, x: Float[Tensor, "b t d"], start: int = 0, positions: Tensor | None = None
    ) -> Float[Tensor, "b t d"]:
        if positions is None and self.pattern is not None:
            positions = self.positions_from(start, x.shape[1])
        return x + self.weight[slice(start, start + x.shape[1]) if positions is None else positions]
