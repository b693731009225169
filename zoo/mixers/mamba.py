"""Mamba, the selective state space (Gu & Dao 2023, section 3, algorithm 2).

    u, z        in_proj x, each `inner_width` wide; u then passes a causal convolution and silu
    dt_r, B, C  x_proj u: what the state takes in and gives out depends on the token
    dt          softplus(dt_proj dt_r), the step; A = -exp(A_log), the rates
    h_t         exp(dt A) h_{t-1} + dt B_t u_t     (A by zero-order hold, B by Euler, as published)
    y           out_proj((C_t h_t + D u_t) * silu(z))

The state is the last `conv_width - 1` inputs of the convolution and h, in float32.
"""

import math
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive, Range
from zoo.mixers.base import CrossLayer, Mixer, MixerOutput, State, no_weight_decay
from zoo.mixers.parts import conv_weight, no_inputs, wide_zeros
from zoo.ops.causal_conv import causal_conv
from zoo.ops.decode_block import HalfEnds, SelectiveState, half
from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear import Linear, linear, linears
from zoo.ops.selective_scan import selective_scan
from zoo.parallel.hand_over import publish

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # initial steps: log-uniform, as published


class MambaState(NamedTuple):
    conv: Float[Tensor, "b w c"]  # the convolution's last conv_width - 1 inputs
    h: Float[Tensor, "b c n"]


class Mamba(Mixer):
    """Algorithm 2, between the projections.

    Args:
        width: channels of the input and the output (D).
        inner_width: channels of u and z (E D); None for twice the width, as published.
        state_size: numbers of state per channel (N).
        conv_width: tokens that the convolution sees, the present one included.
        dt_rank: rank of the projection to dt (R); None for width / 16, as published.
        input_norm_eps: None, or dt, B and C are each normalised by their root mean square with this
            under the root (Falcon-Mamba, Zuo 2024, section 2.2, arXiv 2410.05355).
        backend: of the scan and of the convolution.
        layer, layers: this layer's index and the number of layers.
    """

    def __init__(
        self,
        *,
        width: int,
        inner_width: Positive | None = None,
        state_size: Positive = 16,
        conv_width: Annotated[int, Range(2, 8)] = 4,
        dt_rank: Positive | None = None,
        input_norm_eps: Annotated[float, Range(1e-12, 1)] | None = None,
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        inner = 2 * width if inner_width is None else inner_width
        rank = math.ceil(width / 16) if dt_rank is None else dt_rank
        self.inner_width, self.state_size, self.conv_width = inner, state_size, conv_width
        self.dt_rank, self.input_norm_eps, self.backend = rank, input_norm_eps, backend

        self.in_proj = Linear(width, 2 * inner, bias=False)
        self.conv_weight = conv_weight(inner, conv_width)
        bound = conv_width**-0.5
        self.conv_bias = nn.Parameter(torch.empty(inner).uniform_(-bound, bound))
        self.x_proj = Linear(inner, rank + 2 * state_size, bias=False)
        self.dt_proj = Linear(rank, inner)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        dt = torch.empty(inner).uniform_(low, high).exp().clamp(min=DT_FLOOR)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(bias) = dt
        rates = torch.arange(1, state_size + 1, dtype=torch.float32)  # S4D-real
        self.A_log = no_weight_decay(nn.Parameter(rates.log().repeat(inner, 1)))
        self.D = no_weight_decay(nn.Parameter(torch.ones(inner)))
        self.out_proj = Linear(inner, width, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= layers**0.5

    def forward(self, x: Float[Tensor, "b t d"], state: MambaState | None = None) -> MixerOutput:
        # two products: the gradients of the halves of one would have to be joined again
        u, z = linears(x, self.in_proj.weight.chunk(2), (None, None))
        u, conv = causal_conv(
            u,
            self.conv_weight,
            self.conv_bias,
            state=state.conv if state else None,
            backend="auto" if self.backend == "mamba_ssm" else self.backend,
        )
        publish(conv=conv)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.state_size, self.state_size], -1)
        if self.input_norm_eps is not None:
            dt, B, C = (F.rms_norm(x, x.shape[-1:], eps=self.input_norm_eps) for x in (dt, B, C))
        dt = linear(dt, self.dt_proj.weight)  # its bias joins inside the scan, in float32
        y, h = selective_scan(
            u,
            dt,
            -torch.exp(self.A_log.float() if self.A_log.dtype != torch.float64 else self.A_log),
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            state=state.h if state else None,
            backend=self.backend,
        )
        publish(h=h)
        y = self.out_proj(y)
        return y if state is None else (y, MambaState(conv, h))

    def half_of_a_token(
        self, ends: HalfEnds, state: State, cross_layer: CrossLayer | None
    ) -> tuple[Tensor, State] | None:
        if type(state) is not MambaState or self.backend not in ("auto", "native"):
            return None
        conv, h = state
        wide = h.dtype == wide_dtype(ends.x)
        if conv.dtype != ends.x.dtype or not wide or self.in_proj.bias is not None:
            return None
        sizes = (self.state_size, self.dt_rank, self.conv_width)
        between = SelectiveState(*sizes, self.input_norm_eps or 0.0)
        within = (self.x_proj, self.dt_proj, self)
        found = half(ends, between, (self.in_proj,), self.out_proj, within)
        if found is None:
            return None
        y, *after = found.selective_state(conv.contiguous(), h.contiguous())
        return y, MambaState(*after)

    def empty_state(self, batch: int) -> MambaState:
        weight = self.in_proj.weight
        return MambaState(
            no_inputs(self.conv_weight, batch),
            wide_zeros(weight, (batch, self.inner_width, self.state_size)),
        )
