"""Low-rank transformer (Winata 2020, sections 2.1 and 2.2): every projection is an LED unit.

    D, E        W ~ E D with D (rank, inputs) and E (outputs, rank), nothing between, both trained
                from the start; fewer numbers than W if rank < inputs outputs / (inputs + outputs)
    LRMHA       softmax attention whose W_q, W_k, W_v, W_o are such units
    LRFF        W_2 relu(W_1 x) with units for W_1, W_2 as published, or by default SwiGLU's three

Each factor is drawn so that E D x has the variance W x would have. Otherwise as the transformer,
with its rotary positions and pre-norm (the paper: sinusoids and post-norm); no biases.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.mixers.base import Mixer, MixerOutput, State, at_least, linear, residual_gain
from zoo.mixers.feed_forward import gated_width
from zoo.mixers.softmax import SoftmaxAttention
from zoo.positions.rope import Rope


class LowRank(nn.Module):
    """y = E D x   (Winata 2020, eq. 3), or E D x + b"""

    def __init__(
        self, inputs: int, outputs: int, rank: int, *, gain: float = 1.0, bias: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs  # as of the layer in its place
        self.D = linear(inputs, rank)
        self.E = linear(rank, outputs, gain=gain, bias=bias)

    @classmethod
    def in_place_of(cls, dense: nn.Linear, rank: int) -> "LowRank":
        """A unit of the layer's shape with new weights."""
        return cls(dense.in_features, dense.out_features, rank, bias=dense.bias is not None)

    @classmethod
    def from_dense(cls, dense: nn.Linear, rank: int) -> "LowRank":
        """The nearest product of that rank to a trained W, by truncated SVD in float64."""
        weight = dense.weight.detach()
        unit = cls.in_place_of(dense, _checked(rank, min(weight.shape)))
        unit.to(weight.device, weight.dtype)
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        root = S[:rank].sqrt()
        with torch.no_grad():
            unit.E.weight.copy_(U[:, :rank] * root)
            unit.D.weight.copy_(root[:, None] * Vh[:rank])
            if dense.bias is not None:
                unit.E.bias.copy_(dense.bias)
        return unit

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """W = E D."""
        return self.E.weight @ self.D.weight

    @property
    def bias(self) -> Float[Tensor, " outputs"] | None:
        return self.E.bias

    def forward(self, x: Float[Tensor, "*b inputs"]) -> Float[Tensor, "*b outputs"]:
        return self.E(self.D(x))


def _checked(rank: int | None, width: int) -> int:
    rank = max(1, width // 4) if rank is None else rank
    if not 1 <= rank <= width:
        raise ValueError(f"rank={rank}: must be from 1 to {width}, the rank of a full matrix.")
    return rank


class LowRankAttention(SoftmaxAttention):
    """Softmax attention with LED units for its four projections."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        rank: int | None = None,
        positions: Callable[..., Any] = Rope,
        backend: str = "auto",
        causal: bool = True,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__(
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            positions=positions,
            backend=backend,
            causal=causal,
            layer=layer,
            layers=layers,
        )
        rank, narrow = _checked(rank, width), self.kv_heads * self.head_width
        self.q_proj = LowRank(width, width, rank)
        self.k_proj = LowRank(width, narrow, min(rank, narrow))
        self.v_proj = LowRank(width, narrow, min(rank, narrow))
        self.o_proj = LowRank(width, width, rank, gain=residual_gain(layers))


class LowRankFeedForward(Mixer):
    """y = W_down (silu(W_gate x) * W_up x), or W_down relu(W_up x); every W an LED unit."""

    def __init__(
        self,
        *,
        width: int,
        hidden_width: int | None = None,
        rank: int | None = None,
        gated: bool = True,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        rank = _checked(rank, width)
        default = gated_width(width) if gated else 4 * width
        hidden = default if hidden_width is None else hidden_width
        at_least(1, hidden_width=hidden)
        self.gate_proj = LowRank(width, hidden, rank) if gated else None
        self.up_proj = LowRank(width, hidden, rank)
        self.down_proj = LowRank(hidden, width, rank, gain=residual_gain(layers))

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> MixerOutput:
        up = self.up_proj(x)
        y = self.down_proj(F.relu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up)
        return y if state is None else (y, state)
