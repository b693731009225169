"""LSTM, the nonlinear recurrence that every linear one is a departure from (Hochreiter 1997; the
forget gate: Gers 2000). The control of the synthetic tasks: it tracks states that no linear
recurrence with positive decays can, and reads one token after another.

    i, f, o     sigmoid of W x_t + R h_{t-1} + b, the input, forget and output gates
    g           tanh of the same with weights of its own
    c_t         f * c_{t-1} + i * g
    h_t         o * tanh(c_t)
    y           W_o h_t

Weights start at U(+-1/sqrt(width)), PyTorch's own, and forget gates open, with a bias of 1
(Jozefowicz 2015, section 5.1). The state is h and c, in float32; autocast leaves the recurrence
alone, whose products with itself would drift.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from zoo.mixers.base import Mixer, MixerOutput, linear, residual_gain

FORGET_BIAS = 1.0


class LSTMState(NamedTuple):
    h: Float[Tensor, "b d"]
    c: Float[Tensor, "b d"]


class LSTM(Mixer):
    """One layer of `torch.nn.LSTM`, as wide as the model, and an output projection."""

    def __init__(self, *, width: int, layer: int = 0, layers: int = 1) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        weights = dict(self.lstm.named_parameters())
        with torch.no_grad():  # PyTorch adds two biases: one is enough
            weights["bias_hh_l0"].zero_()
            weights["bias_ih_l0"].zero_()
            weights["bias_ih_l0"][width : 2 * width] = FORGET_BIAS  # gates in the order i, f, g, o
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(self, x: Float[Tensor, "b t d"], state: LSTMState | None = None) -> MixerOutput:
        before = state or self.empty_state(len(x))
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(before.h.dtype)
            y, (h, c) = self.lstm(u, (before.h[None].contiguous(), before.c[None].contiguous()))
        y = self.o_proj(y.to(x.dtype))
        return y if state is None else (y, LSTMState(h[0], c[0]))

    def empty_state(self, batch: int) -> LSTMState:
        weight = next(self.lstm.parameters())
        zeros = weight.new_zeros((batch, self.lstm.hidden_size))
        return LSTMState(zeros, zeros)


@register_flop_formula(torch.ops.aten.mkldnn_rnn_layer)
def _cpu_flops(x: torch.Size, W: torch.Size, R: torch.Size, *_: Any, **__: Any) -> int:
    """Count a product and a sum per weight of both matrices and per token."""
    return 2 * math.prod(x[:-1]) * (math.prod(W) + math.prod(R))


@register_flop_formula(torch.ops.aten._cudnn_rnn)
def _cuda_flops(x: torch.Size, weights: Sequence[torch.Size], *_: Any, **__: Any) -> int:
    """The same of cuDNN, which has the matrices and the biases in one list."""
    matrices = (math.prod(weight) for weight in weights if len(weight) > 1)
    return 2 * math.prod(x[:-1]) * sum(matrices)
