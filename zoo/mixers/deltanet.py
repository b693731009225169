"""DeltaNet, linear attention that corrects what it stored (Yang 2024, sections 2.2 and 3.3).

    q, k, v     W_q x, W_k x, W_v x, each through a causal convolution of 4 tokens and silu;
                q and k then scaled to length 1 per head
    beta_t      sigmoid(W_beta x_t), one per head: how much of what k_t held is replaced
    S_t         S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        (Schlag 2021, section 4.2)
    o_t         S_t q_t, RMS-normalised per head; y = W_o o

With `negative_eigenvalues` beta_t = 2 sigmoid(W_beta x_t): along k_t the transition's eigenvalue
1 - beta_t then lies in (-1, 1) instead of (0, 1), and a state can flip, which parity and other
state tracking need (Grazzi 2024, arXiv 2411.12537, section 4).

The state is the convolutions' last `conv_width - 1` inputs and S, in float32 (here (k, v) per head,
the paper's transposed). One projection and one convolution serve q, k and v.
"""

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.config.domains import Positive, Range
from zoo.mixers.base import Mixer, MixerOutput, linear, residual_gain
from zoo.mixers.parts import conv_weight, head_width, no_inputs, wide_zeros
from zoo.ops.causal_conv import causal_conv
from zoo.ops.delta_rule import delta_rule, unit_length
from zoo.ops.dtypes import wide_dtype
from zoo.ops.rms_norm import RMSNorm
from zoo.parallel.hand_over import publish


class DeltaState(NamedTuple):
    conv: Float[Tensor, "b w c"]  # the convolution's last conv_width - 1 inputs: q, k and v
    S: Float[Tensor, "b h k v"]


class DeltaNet(Mixer):
    """The delta rule over a matrix state per head.

    Args:
        width: channels of the input and the output (d).
        heads: heads, which must divide the width.
        conv_width: tokens that the convolutions of q, k and v see.
        negative_eigenvalues: beta in (0, 2) instead of (0, 1).
        backend: of zoo.ops.delta_rule.
        layer, layers: this layer's index and the number of layers.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        conv_width: Annotated[int, Range(2, 8)] = 4,
        negative_eigenvalues: bool = False,
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        head = head_width(width, heads)
        self.heads, self.conv_width, self.backend = heads, conv_width, backend
        self.largest_beta = 2.0 if negative_eigenvalues else 1.0
        self.qkv_proj = linear(width, 3 * width)
        self.conv_weight = conv_weight(3 * width, conv_width)
        self.beta_proj = linear(width, heads)
        self.norm = RMSNorm(head, 1e-5)
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(self, x: Float[Tensor, "b t d"], state: DeltaState | None = None) -> MixerOutput:
        qkv, conv = causal_conv(
            self.qkv_proj(x), self.conv_weight, state=state.conv if state else None
        )
        publish(conv=conv)
        q, k, v = (u.unflatten(-1, (self.heads, -1)) for u in qkv.chunk(3, -1))
        wide = wide_dtype(v)  # of the state, and of the norm
        y, S = delta_rule(
            unit_length(q),
            unit_length(k),
            v.to(wide),
            self.largest_beta * torch.sigmoid(self.beta_proj(x)),
            state=state.S if state else None,
            backend=self.backend,
        )
        publish(S=S)
        y = self.o_proj(self.norm(y).flatten(-2).to(x.dtype))
        return y if state is None else (y, DeltaState(conv, S))

    def empty_state(self, batch: int) -> DeltaState:
        weight = self.o_proj.weight
        width = len(weight)
        S = (batch, self.heads, width // self.heads, width // self.heads)
        return DeltaState(no_inputs(self.conv_weight, batch), wide_zeros(weight, S))
