"""Gated linear attention (Yang 2023, "Gated Linear Attention Transformers", section 4).

    q, k, v     W_q x, W_k x, W_v x; keys have half the width, values all of it
    alpha_t     sigmoid(W_2 W_1 x_t + b)^(1 / tau), tau = 16: what each key channel keeps (sec. 4.4)
    S_t         diag(alpha_t) S_{t-1} + k_t^T v_t
    o_t         q_t S_t / sqrt(key width), RMS-normalised per head; y = W_o (silu(W_r x) * o)

The state is S, in float32.
"""

from typing import Annotated

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive, Range
from zoo.mixers.base import Mixer, MixerOutput, linear, residual_gain
from zoo.mixers.parts import wide_zeros
from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear import project
from zoo.ops.linear_attention import linear_attention
from zoo.ops.rms_norm import RMSNorm


class GLA(Mixer):
    """Linear attention with a decay per key channel.

    Args:
        width: channels of the input, the output and the values (d).
        heads: heads, which must divide the width and `key_width`.
        key_width: channels of the keys of all heads (d_k); None for half of the width.
        gate_rank: rank of the decay's projection (16 as published).
        temperature: tau, the root that is taken of the decay.
        backend: of zoo.ops.linear_attention.
        layer, layers: this layer's index and the number of layers.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        key_width: Positive | None = None,
        gate_rank: Positive = 16,
        temperature: Annotated[float, Range(above=0)] = 16.0,
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        keys = width // 2 if key_width is None else key_width
        if width % heads or keys < heads or keys % heads:
            raise ValueError(f"heads={heads}: must divide width={width} and key_width={keys}.")
        self.heads, self.keys, self.temperature = heads, keys, temperature
        self.backend = backend
        self.q_proj, self.k_proj = linear(width, keys), linear(width, keys)
        self.v_proj = linear(width, width)
        self.decay_proj = nn.Sequential(
            linear(width, gate_rank), linear(gate_rank, keys, bias=True)
        )
        self.gate_proj = linear(width, width)
        self.norm = RMSNorm(width // heads, 1e-5)
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(self, x: Float[Tensor, "b t d"], state: Tensor | None = None) -> MixerOutput:
        projected = *project(x, self.q_proj, self.k_proj, self.v_proj), self.decay_proj(x)
        q, k, v, decay = (y.unflatten(-1, (self.heads, -1)) for y in projected)
        wide = wide_dtype(self.o_proj.weight)
        o, S = linear_attention(
            q * (self.keys // self.heads) ** -0.5,
            k,
            v,
            F.logsigmoid(decay.to(wide)) / self.temperature,
            state=state,
            backend=self.backend,
        )
        y = self.norm(o.to(wide)).flatten(-2) * F.silu(self.gate_proj(x))
        y = self.o_proj(y.to(x.dtype))
        return y if state is None else (y, S)

    def empty_state(self, batch: int) -> Float[Tensor, "b h k v"]:
        weight = self.o_proj.weight
        shape = (batch, self.heads, self.keys // self.heads, weight.shape[0] // self.heads)
        return wide_zeros(weight, shape)
