"""Hawk, gated linear recurrences alone (De 2024, "Griffin", sections 2.3 and 2.4, appendix A).

    g, x        W_g x, W_x x, each `inner_width` wide; x then passes a causal convolution
    r_t         sigmoid(W_a x_t + b_a), the recurrence gate
    i_t         sigmoid(W_i x_t + b_i), the input gate
    a_t         exp(-c softplus(Lambda) r_t), c = 8: a^(c r_t) for a = sigmoid(-Lambda) in (0, 1)
    h_t         a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)            the RG-LRU
    y           W_o (h * gelu(g))

W_a and W_i are block-diagonal in `gate_blocks` blocks. Lambda here is that of appendix A's formula,
minus the one of section 2.4 (there a = sigmoid(Lambda)); as published a^c starts uniform in [0.9,
0.999], by softplus(Lambda) = -log(a^c) / c. The first token is scaled by sqrt(1 - a_1^2) as every
other, as in the paper; the authors' code leaves it as it is, and so does `first_token=whole`. GELU
is their tanh approximation.

The state is the last `conv_width - 1` inputs of the convolution and h, in float32.

    transformers RecurrentGemmaRecurrentBlock            here
    linear_{x,y,out}                                     {x,gate,out}_proj, with bias=true
    conv_1d.weight, (d, 1, w); conv_1d.bias              conv_weight, (d, w); conv_bias
    rg_lru.recurrent_param                               decay
    rg_lru.recurrent_gate_{weight,bias}                  decay_gate.{weight,bias}, bias (d,)
    rg_lru.input_gate_{weight,bias}                      input_gate.{weight,bias}, bias (d,)
"""

import math
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive, Range
from zoo.mixers.base import Mixer, MixerOutput, linear, residual_gain
from zoo.mixers.parts import conv_weight, no_inputs, wide_zeros
from zoo.ops.causal_conv import causal_conv
from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear_recurrence import linear_recurrence
from zoo.parallel.hand_over import publish

C = 8.0  # how much faster than sigmoid(-Lambda) the state may fade
SLOW, FAST = 0.999, 0.9  # initial decays of an open recurrence gate: uniform between


class HawkState(NamedTuple):
    conv: Float[Tensor, "b w c"]  # the convolution's last conv_width - 1 inputs
    h: Float[Tensor, "b c"]


class BlockDiagonal(nn.Module):
    """A projection in which channels see those of their own block: weights N(0, 1 / its width)."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        block = width // blocks
        self.weight = nn.Parameter(torch.randn(blocks, block, block) * block**-0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        blocks = x.unflatten(-1, self.weight.shape[:2])
        return torch.einsum("bthi,hij->bthj", blocks, self.weight).flatten(-2) + self.bias


def decay_and_scale(
    decay: Float[Tensor, " d"], gate: Float[Tensor, "*t d"]
) -> tuple[Float[Tensor, "*t d"], Float[Tensor, "*t d"]]:
    """a = exp(-c softplus(decay) sigmoid(gate)) and sqrt(1 - a^2), both right where a is near 1.

    The root's slope is infinite at a = 1, which a closed gate reaches; the published code clips it.
    Here only 1 - a^2 is kept from zero, by the smallest normal number: the gate's own slope tames
    the root's, for together they are about sqrt(c softplus(decay) sigmoid(gate) / 2).
    """
    log_a = -C * F.softplus(decay) * torch.sigmoid(gate)
    left = -torch.expm1(2 * log_a)
    return torch.exp(log_a), left.clamp(min=torch.finfo(left.dtype).tiny).sqrt()


def _first_whole(scale: Float[Tensor, "b t d"], state: HawkState | None) -> Float[Tensor, "b t d"]:
    """The scales with ones for the token that a text begins with: before it h is zero."""
    if state is None:
        fresh = scale.new_ones(len(scale), 1, dtype=torch.bool)
    else:
        fresh = ~state.h.any(-1, keepdim=True)
    first = torch.where(fresh[:, None], 1.0, scale[:, :1])
    return torch.cat([first, scale[:, 1:]], 1)


class Hawk(Mixer):
    """The recurrent block of figure 2, with the RG-LRU.

    Args:
        width: channels of the input and the output (D).
        inner_width: channels of the recurrence (D_RNN); None for 4/3 of the width.
        gate_blocks: blocks of the gates' weights, which must divide `inner_width`.
        conv_width: tokens that the convolution sees, the present one included.
        bias: of the three projections.
        first_token: scaled, as every other, or whole.
        backend: of the recurrence and of the convolution.
        layer, layers: this layer's index and the number of layers.
    """

    def __init__(
        self,
        *,
        width: int,
        inner_width: Positive | None = None,
        gate_blocks: Positive,
        conv_width: Annotated[int, Range(2, 8)] = 4,
        bias: bool = False,
        first_token: Literal["scaled", "whole"] = "scaled",
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        step = math.lcm(8, gate_blocks)
        default = step * max(1, round(4 * width / 3 / step))
        inner = default if inner_width is None else inner_width
        if inner % gate_blocks:
            raise ValueError(f"gate_blocks={gate_blocks}: must divide inner_width={inner}.")
        self.inner_width, self.conv_width, self.backend = inner, conv_width, backend
        self.first_token = first_token
        self.gate_proj = linear(width, inner, bias=bias)
        self.x_proj = linear(width, inner, bias=bias)
        self.conv_weight = conv_weight(inner, conv_width)
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.decay_gate = BlockDiagonal(inner, gate_blocks)
        self.input_gate = BlockDiagonal(inner, gate_blocks)
        rate = -torch.empty(inner).uniform_(FAST, SLOW).log() / C
        self.decay = nn.Parameter(rate.expm1().log())  # softplus(decay) = rate
        self.out_proj = linear(inner, width, gain=residual_gain(layers), bias=bias)

    def forward(self, x: Float[Tensor, "b t d"], state: HawkState | None = None) -> MixerOutput:
        u, conv = causal_conv(
            self.x_proj(x),
            self.conv_weight,
            self.conv_bias,
            activation=None,
            state=state.conv if state else None,
            backend=self.backend,
        )
        publish(conv=conv)
        wide = wide_dtype(self.decay)
        a, scale = decay_and_scale(self.decay.to(wide), self.decay_gate(u).to(wide))
        if self.first_token == "whole":
            scale = _first_whole(scale, state)
        u = scale * torch.sigmoid(self.input_gate(u).to(wide)) * u
        h, last = linear_recurrence(a, u, state.h if state else None, self.backend)
        publish(h=last)
        y = self.out_proj(h.to(x.dtype) * F.gelu(self.gate_proj(x), approximate="tanh"))
        return y if state is None else (y, HawkState(conv, last))

    def empty_state(self, batch: int) -> HawkState:
        weight = self.x_proj.weight
        return HawkState(
            no_inputs(self.conv_weight, batch),
            wide_zeros(weight, (batch, self.inner_width)),
        )
