"""Retention, the token mixing of RetNet (Sun 2023, section 2).

    q, k        W_q x, W_k x, rotated by their positions; scores scaled by 1 / sqrt(head width)
    gamma_h     1 - 2^(-5 - h), the decay of head h: fixed, its own for each head   (eq. 8)
    S_n         gamma S_{n-1} + k_n^T v_n                                              (eq. 6)
    y           W_o (silu(W_g x) * norm(q_n S_n)), the norm over each head             (eq. 8)

In bfloat16 the first tokens are worse than the others by design: what is normalised is, of the
first, (q.k) v, of which the norm keeps the sign of q.k alone, and rounding may turn it over.
Measured over 500 sequences at width 64 with 4 heads, largest error by token under autocast: 0.52 of
the first, 0.11 of the second, at most 0.034 of any later, of outputs up to 2.7.

The state is S, in float32, and the number of tokens read, which the rotation needs. The paper's
rotation carries no xPos factor either: the decay does its work. Values and gate are `value_factor`
widths, 2 as published.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive, RopeBase
from zoo.mixers.base import Mixer, MixerOutput, linear, residual_gain
from zoo.mixers.parts import wide_zeros
from zoo.ops.linear import project
from zoo.ops.linear_attention import linear_attention
from zoo.positions.rope import inverse_frequencies, rotate_both


class RetentionState(NamedTuple):
    S: Float[Tensor, "b h k v"]
    tokens_seen: int


class RetNet(Mixer):
    """Multi-scale retention.

    Args:
        width: channels of the input and the output (d_model).
        heads: heads (h), whose widths must be even.
        value_factor: channels of values and gate over the width; published: 2.
        rope_base: base of the rotary frequencies.
        backend: of zoo.ops.linear_attention.
        layer, layers: this layer's index and the number of layers.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        value_factor: Positive = 2,
        rope_base: RopeBase = 10000.0,
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"heads={heads}: must divide width={width} into heads of even width.")
        self.heads, self.head_width, self.backend = heads, width // heads, backend
        self.inv_freq = inverse_frequencies(self.head_width, rope_base)
        self.log_decay = [math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]
        self.q_proj, self.k_proj = linear(width, width), linear(width, width)
        self.v_proj = linear(width, value_factor * width)
        self.gate_proj = linear(width, value_factor * width)
        self.norm = nn.RMSNorm(self.head_width * value_factor, eps=1e-5, elementwise_affine=False)
        self.o_proj = linear(value_factor * width, width, gain=residual_gain(layers))

    def forward(
        self, x: Float[Tensor, "b t d"], state: RetentionState | None = None
    ) -> MixerOutput:
        start = state.tokens_seen if state else 0
        qkv = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv)
        q, k = rotate_both(q, k, self.inv_freq, start)
        y, S = linear_attention(
            q * self.head_width**-0.5,
            k,
            v,
            torch.tensor(self.log_decay, dtype=torch.float64, device=x.device),
            state=state.S if state else None,
            backend=self.backend,
        )
        y = self.o_proj(self.norm(y).flatten(-2) * F.silu(self.gate_proj(x)))
        return y if state is None else (y, RetentionState(S, start + x.shape[1]))

    def empty_state(self, batch: int) -> RetentionState:
        weight = self.o_proj.weight
        shape = (batch, self.heads, self.head_width, self.v_proj.out_features // self.heads)
        return RetentionState(wide_zeros(weight, shape), 0)
