"""Gated DeltaNet, the delta rule with forgetting (Yang 2024b, sections 3.1 and 3.4).

    q, k, v     W_q x, W_k x, W_v x, each through a causal convolution of 4 tokens and silu;
                q and k then scaled to length 1 per head
    beta_t      sigmoid(W_beta x_t), one per head: how much of what k_t held is replaced
    alpha_t     exp(-exp(A_log) softplus(W_a x_t + dt_bias)), one per head: Mamba-2's decay
    S_t         S_{t-1} alpha_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
    o_t         S_t q_t, RMS-normalised per head, times silu(W_g x_t); y = W_o o

With `negative_eigenvalues` beta_t = 2 sigmoid(W_beta x_t), as in `DeltaNet`.

Published sizes: keys have 3/4 of the width, shared by the heads, values twice that, so that the
mixer has 6 width^2 parameters. The state is the convolutions' last `conv_width - 1` inputs and S,
in float32 (here (k, v) per head, the paper's transposed). One projection and one convolution
serve q, k and v.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive, Range
from zoo.mixers.base import Mixer, MixerOutput, linear, residual_gain
from zoo.mixers.deltanet import DeltaState
from zoo.mixers.parts import conv_weight, no_inputs, wide_zeros
from zoo.ops.causal_conv import causal_conv
from zoo.ops.delta_rule import delta_rule, unit_length
from zoo.ops.dtypes import wide_dtype
from zoo.ops.rms_norm import RMSNorm
from zoo.parallel.hand_over import publish

DT_MIN, DT_MAX = 1e-3, 1e-1  # initial steps: log-uniform, as in Mamba-2
A_MAX = 16.0  # initial rates: uniform up to this, as published


class GatedDeltaNet(Mixer):
    """The delta rule with a decay per head.

    Args:
        width: channels of the input and the output (d).
        heads: heads, at most 3/4 of the width.
        head_width: channels of a head's keys (d_k); None for 3/4 of the width over the heads.
        value_factor: channels of a head's values over those of its keys (d_v / d_k).
        conv_width: tokens that the convolutions of q, k and v see.
        negative_eigenvalues: beta in (0, 2) instead of (0, 1).
        backend: of zoo.ops.delta_rule.
        layer, layers: this layer's index and the number of layers.
    """

    min_window = 2  # a decay acts on what an earlier token wrote

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        head_width: Positive | None = None,
        value_factor: Positive = 2,
        conv_width: Annotated[int, Range(2, 8)] = 4,
        negative_eigenvalues: bool = False,
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        most = 3 * width // 4
        if heads > most:
            raise ValueError(f"heads={heads}: must be at most {most}, 3/4 of width={width}.")
        key = most // heads if head_width is None else head_width
        self.heads, self.conv_width, self.backend = heads, conv_width, backend
        self.largest_beta = 2.0 if negative_eigenvalues else 1.0
        self.widths = [heads * key, heads * key, heads * key * value_factor]  # of q, k, v
        self.qkv_proj = linear(width, sum(self.widths))
        self.conv_weight = conv_weight(sum(self.widths), conv_width)
        self.beta_proj = linear(width, heads)
        self.a_proj = linear(width, heads)
        rates = torch.empty(heads).uniform_(1e-4, A_MAX)  # none is 0: its logarithm is kept
        self.A_log = nn.Parameter(rates.log())
        dt = torch.empty(heads).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.gate_proj = linear(width, self.widths[2])
        self.norm = RMSNorm(key * value_factor, 1e-5)
        self.o_proj = linear(self.widths[2], width, gain=residual_gain(layers))

    def forward(self, x: Float[Tensor, "b t d"], state: DeltaState | None = None) -> MixerOutput:
        qkv, conv = causal_conv(
            self.qkv_proj(x), self.conv_weight, state=state.conv if state else None
        )
        publish(conv=conv)
        q, k, v = (u.unflatten(-1, (self.heads, -1)) for u in qkv.split(self.widths, -1))
        wide = wide_dtype(self.A_log)
        step = F.softplus(self.a_proj(x).to(wide) + self.dt_bias.to(wide))
        y, S = delta_rule(
            unit_length(q),
            unit_length(k),
            v.to(wide),
            self.largest_beta * torch.sigmoid(self.beta_proj(x)),
            -self.A_log.to(wide).exp() * step,
            state=state.S if state else None,
            backend=self.backend,
        )
        publish(S=S)
        y = self.norm(y).flatten(-2) * F.silu(self.gate_proj(x))
        y = self.o_proj(y.to(x.dtype))
        return y if state is None else (y, DeltaState(conv, S))

    def empty_state(self, batch: int) -> DeltaState:
        weight = self.o_proj.weight
        S = (batch, self.heads, *(w // self.heads for w in self.widths[1:]))
        return DeltaState(no_inputs(self.conv_weight, batch), wide_zeros(weight, S))
