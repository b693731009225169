"""Mamba-2, state space duality (Dao & Gu 2024, "Transformers are SSMs", sections 6 and 7).

    z, u, dt    in_proj x: the gate, what passes the convolution, and a step per head
    x, B, C     silu(conv u): values per head, and an input and an output map per group of heads
    dt          softplus(dt + dt_bias); a_t = exp(-exp(A_log) dt), a scalar per head
    h_t         a_t h_{t-1} + dt B_t x_t^T       linear attention with q = C, k = B, v = dt x
    y           out_proj(norm((h_t^T C_t + D x_t) * silu(z))), the norm after the gate, over the
                channels of each group as in the authors' program

The state is the last `conv_width - 1` inputs of the convolution and h, in float32.
"""

import math
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive, Range
from zoo.mixers.base import Mixer, MixerOutput, no_weight_decay
from zoo.mixers.parts import conv_weight, no_inputs, wide_zeros
from zoo.ops.causal_conv import causal_conv
from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear import Linear
from zoo.ops.linear_attention import linear_attention
from zoo.ops.rms_norm import RMSNorm
from zoo.parallel.hand_over import publish

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # initial steps: log-uniform, as published
A_MIN, A_MAX = 1.0, 16.0  # initial rates: uniform


class Mamba2State(NamedTuple):
    conv: Float[Tensor, "b w c"]
    h: Float[Tensor, "b h n p"]


class Mamba2(Mixer):
    """Section 7's block.

    Args:
        width: channels of the input and the output (D).
        heads: heads (H); None for twice the width in heads of 64.
        head_width: channels of a head (P); None for twice the width over the heads.
        state_size: numbers of state per channel (N); published 64 to 256.
        groups: groups of heads with B and C of their own (G); must divide the heads.
        conv_width: tokens that the convolution sees, the present one included.
        norm_eps: added under the root of the norm after the gate.
        backend: of zoo.ops.linear_attention.
        layer, layers: this layer's index and the number of layers.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: Positive | None = None,
        head_width: Positive | None = None,
        state_size: Positive = 64,
        groups: Positive = 1,
        conv_width: Annotated[int, Range(2, 8)] = 4,
        norm_eps: Annotated[float, Range(1e-12, 1)] = 1e-5,
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        heads = max(1, 2 * width // 64) if heads is None else heads
        head_width = max(1, 2 * width // heads) if head_width is None else head_width
        inner = heads * head_width
        if heads % groups:
            raise ValueError(f"groups={groups}: must divide heads={heads}.")
        self.groups = groups
        self.heads, self.head_width, self.state_size = heads, head_width, state_size
        self.conv_width, self.backend = conv_width, backend
        self.conv_channels = inner + 2 * groups * state_size
        self.in_proj = Linear(width, inner + self.conv_channels + heads, bias=False)
        self.conv_weight = conv_weight(self.conv_channels, conv_width)
        bound = conv_width**-0.5
        self.conv_bias = nn.Parameter(torch.empty(self.conv_channels).uniform_(-bound, bound))
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        dt = torch.empty(heads).uniform_(low, high).exp().clamp(min=DT_FLOOR)
        self.dt_bias = no_weight_decay(nn.Parameter(dt + torch.log(-torch.expm1(-dt))))
        self.A_log = no_weight_decay(nn.Parameter(torch.empty(heads).uniform_(A_MIN, A_MAX).log()))
        self.D = no_weight_decay(nn.Parameter(torch.ones(heads)))
        self.norm = RMSNorm(inner, norm_eps)
        self.out_proj = Linear(inner, width, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= layers**0.5

    def forward(self, x: Float[Tensor, "b t d"], state: Mamba2State | None = None) -> MixerOutput:
        inner, n = self.heads * self.head_width, self.state_size
        z, u, dt = self.in_proj(x).split([inner, self.conv_channels, self.heads], -1)
        u, conv = causal_conv(
            u, self.conv_weight, self.conv_bias, state=state.conv if state else None
        )
        publish(conv=conv)
        values, B, C = u.split([inner, self.groups * n, self.groups * n], -1)
        B, C = (each.unflatten(-1, (self.groups, n)) for each in (B, C))
        if self.groups > 1:
            B, C = (each.repeat_interleave(self.heads // self.groups, 2) for each in (B, C))
        wide = wide_dtype(self.A_log)
        values = values.unflatten(-1, (self.heads, self.head_width)).to(wide)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        y, h = linear_attention(
            C,
            B,
            dt[..., None] * values,
            -self.A_log.to(wide).exp() * dt,
            state=state.h if state else None,
            backend=self.backend,
        )
        publish(h=h)
        y = (y + self.D.to(wide)[:, None] * values).flatten(-2) * F.silu(z.to(wide))
        y = self.out_proj(self._normed(y).to(x.dtype))
        return y if state is None else (y, Mamba2State(conv, h))

    def _normed(self, y: Float[Tensor, "b t inner"]) -> Float[Tensor, "b t inner"]:
        if self.groups == 1:
            return self.norm(y)
        apart = y.unflatten(-1, (self.groups, -1))
        mean = apart.square().mean(-1, keepdim=True)
        normed = (apart * (mean + self.norm.eps).rsqrt()).flatten(-2)
        return normed * self.norm.weight.to(normed)

    def empty_state(self, batch: int) -> Mamba2State:
        weight = self.in_proj.weight
        h = (batch, self.heads, self.state_size, self.head_width)
        return Mamba2State(no_inputs(self.conv_weight, batch), wide_zeros(weight, h))
