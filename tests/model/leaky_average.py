"""A leaky average per channel, gated: the smallest recurrence that keeps the contract.

    v, g        W_v x, W_g x, each `inner_width` wide
    a           sigmoid(decay), one number per channel: what h keeps of itself at each token
    h_t         a h_{t-1} + (1 - a) v_t
    y           W_o (silu(g_t) * h_t)

The state is h, in float32. Source: none; an example.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive
from zoo.mixers.base import Mixer, linear, residual_gain
from zoo.mixers.parts import wide_dtype, wide_zeros
from zoo.ops.linear_recurrence import linear_recurrence


class LeakyAverage(Mixer):
    """y = W_o (silu(W_g x) * h), h a leaky average of W_v x.

    Args:
        width: channels of the input and the output.
        inner_width: channels of h; None for `width`.
        layer, layers: this layer's index and the number of layers.
    """

    min_window = 2  # a decay acts on what an earlier token wrote

    def __init__(
        self,
        *,
        width: int,
        inner_width: Positive | None = None,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        inner = width if inner_width is None else inner_width
        self.v_proj, self.g_proj = linear(width, inner), linear(width, inner)
        self.decay = nn.Parameter(torch.linspace(0, 5, inner))  # a from 0.5 to 0.993
        self.o_proj = linear(inner, width, gain=residual_gain(layers))

    def forward(self, x: Float[Tensor, "b t d"], state: Float[Tensor, "b c"] | None = None):
        v = self.v_proj(x)
        a = torch.sigmoid(self.decay.to(wide_dtype(v))).expand(v.shape)
        h, last = linear_recurrence(a, (1 - a) * v, state)
        y = self.o_proj(F.silu(self.g_proj(x)) * h.to(x.dtype))
        return y if state is None else (y, last)

    def empty_state(self, batch: int) -> Float[Tensor, "b c"]:
        return wide_zeros(self.decay, (batch, len(self.decay)))
