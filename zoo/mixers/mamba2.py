"""Mamba-2, state space duality (Dao & Gu 2024, "Transformers are SSMs", sections 6 and 7).

    z, u, dt    in_proj x: the gate, what passes the convolution, and a step per head
    x, B, C     silu(conv u): values per head, and one input and one output map for all heads
    dt          softplus(dt + dt_bias); a_t = exp(-exp(A_log) dt), a scalar per head
    h_t         a_t h_{t-1} + dt B_t x_t^T       linear attention with q = C, k = B, v = dt x
    y           out_proj(norm((h_t^T C_t + D x_t) * silu(z))), the norm after the gate

The state is the last `conv_width - 1` inputs of the convolution and h, in float32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.mixers.base import Mixer, compute_dtype, no_weight_decay
from zoo.ops.causal_conv import causal_conv
from zoo.ops.linear_attention import linear_attention
from zoo.ops.rms_norm import RMSNorm

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # initial steps: log-uniform, as published
A_MIN, A_MAX = 1.0, 16.0  # initial rates: uniform


class Mamba2State(NamedTuple):
    conv: Float[Tensor, "b w c"]
    h: Float[Tensor, "b h n p"]


class Mamba2(Mixer):
    def __init__(
        self,
        *,
        width: int,
        heads: int | None = None,
        head_width: int | None = None,
        state_size: int = 64,
        conv_width: int = 4,
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        heads = max(1, 2 * width // 64) if heads is None else heads
        for name, value in (("heads", heads), ("state_size", state_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        head_width = max(1, 2 * width // heads) if head_width is None else head_width
        if head_width < 1:
            raise ValueError(f"head_width={head_width} must be at least 1")
        if not 2 <= conv_width <= 8:
            raise ValueError(f"conv_width={conv_width} must be 2 to 8")
        inner = heads * head_width
        self.heads, self.head_width, self.state_size = heads, head_width, state_size
        self.conv_width, self.backend = conv_width, backend
        self.conv_channels = inner + 2 * state_size
        self.in_proj = nn.Linear(width, inner + self.conv_channels + heads, bias=False)
        bound = conv_width**-0.5  # a depthwise convolution sees conv_width inputs
        weight = torch.empty(self.conv_channels, conv_width)
        self.conv_weight = nn.Parameter(weight.uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(self.conv_channels).uniform_(-bound, bound))
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        dt = torch.empty(heads).uniform_(low, high).exp().clamp(min=DT_FLOOR)
        self.dt_bias = no_weight_decay(nn.Parameter(dt + torch.log(-torch.expm1(-dt))))
        self.A_log = no_weight_decay(nn.Parameter(torch.empty(heads).uniform_(A_MIN, A_MAX).log()))
        self.D = no_weight_decay(nn.Parameter(torch.ones(heads)))
        self.norm = RMSNorm(inner, 1e-5)
        self.out_proj = nn.Linear(inner, width, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= layers**0.5

    def forward(self, x: Float[Tensor, "b t d"], state: Mamba2State | None = None):
        inner, n = self.heads * self.head_width, self.state_size
        z, u, dt = self.in_proj(x).split([inner, self.conv_channels, self.heads], -1)
        u, conv = causal_conv(
            u, self.conv_weight, self.conv_bias, state=state.conv if state else None
        )
        values, B, C = u.split([inner, n, n], -1)
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        values = values.unflatten(-1, (self.heads, self.head_width)).to(wide)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        y, h = linear_attention(
            C[:, :, None],
            B[:, :, None],
            dt[..., None] * values,
            -self.A_log.to(wide).exp() * dt,
            state=state.h if state else None,
            backend=self.backend,
        )
        y = (y + self.D.to(wide)[:, None] * values).flatten(-2) * F.silu(z.to(wide))
        y = self.out_proj(self.norm(y).to(x.dtype))
        return y if state is None else (y, Mamba2State(conv, h))

    def empty_state(self, batch: int) -> Mamba2State:
        weight = self.in_proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        conv = (batch, self.conv_width - 1, self.conv_channels)
        h = (batch, self.heads, self.state_size, self.head_width)
        return Mamba2State(
            weight.new_zeros(conv, dtype=compute_dtype(weight)), weight.new_zeros(h, dtype=wide)
        )
