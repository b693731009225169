"""Feed-forward networks: the second half of a block, channel by channel."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.config.domains import Positive
from zoo.mixers.base import Mixer, MixerOutput, State, linear, residual_gain
from zoo.ops.decode_block import FeedForward, HalfEnds, half
from zoo.ops.linear import project
from zoo.positions.base import CrossLayer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def gated_width(width: int) -> int:
    """8/3 of a width in eights: three matrices so wide cost what the two of a 4x MLP do."""
    return max(1, round(8 * width / 3 / 8)) * 8


class SwiGLU(Mixer):
    """y = W_down (f(W_gate x) * W_up x)   (Shazeer 2020, GLU variants, eqs. 5 and 6)

    `hidden_width` is 8/3 of the width unless given, so that it costs what a 4x MLP would; with
    `bias` all three projections have one. f is the `activation`: silu, gelu (GEGLU), or
    gelu by its tanh approximation.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden_width: Positive | None = None,
        bias: bool = False,
        activation: Literal["silu", "gelu", "gelu_tanh"] = "silu",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.activation = activation
        hidden = gated_width(width) if hidden_width is None else hidden_width
        self.gate_proj = linear(width, hidden, bias=bias)
        self.up_proj = linear(width, hidden, bias=bias)
        self.down_proj = linear(hidden, width, gain=residual_gain(layers), bias=bias)

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> MixerOutput:
        gate, up = project(x, self.gate_proj, self.up_proj)
        y = self.down_proj(ACTIVATIONS[self.activation](gate) * up)
        return y if state is None else (y, state)

    def half_of_a_token(
        self, ends: HalfEnds, state: State, cross_layer: CrossLayer | None
    ) -> tuple[Tensor, State] | None:
        layers, between = (self.up_proj, self.gate_proj), FeedForward(self.activation)
        found = half(ends, between, layers, self.down_proj)
        return (found.feed_forward(), state) if found else None


class MLP(Mixer):
    """y = W_down gelu(W_up x + b_up) + b_down   (Vaswani 2017, section 3.3; Hendrycks 2016, GELU)

    `hidden_width` is 4 widths unless given.
    """

    def __init__(
        self, *, width: int, hidden_width: Positive | None = None, layer: int = 0, layers: int = 1
    ) -> None:
        super().__init__()
        hidden = 4 * width if hidden_width is None else hidden_width
        self.up_proj = linear(width, hidden, bias=True)
        self.down_proj = linear(hidden, width, gain=residual_gain(layers), bias=True)

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> MixerOutput:
        y = self.down_proj(F.gelu(self.up_proj(x)))
        return y if state is None else (y, state)

    def half_of_a_token(
        self, ends: HalfEnds, state: State, cross_layer: CrossLayer | None
    ) -> tuple[Tensor, State] | None:
        found = half(ends, FeedForward("gelu"), (self.up_proj,), self.down_proj)
        return (found.feed_forward(), state) if found else None
