"""RWKV-7 "Goose": a matrix state with a decay per channel and a general delta rule (Peng 2025,
section 4), and its channel mixing.

    x^_i        x_t + mu_i (x_{t-1} - x_t) for i in r, w, k, v, a, g: the token shift
    r, k, v     W_r x^_r, W_k x^_k, W_v x^_v
    w           exp(-exp(-1/2) sigmoid(w_0 + tanh(x^_w A_w) B_w)): the decay, between 0.545 and 1
    a           sigmoid(a_0 + x^_a A_a B_a): the in-context learning rate
    v           v + (v_first - v) sigmoid(v_0 + x^_v A_v B_v) in layers above the first
    kappa       k * k_k, of length 1 per head: what is erased;  k~ = k (1 + (a - 1) k_a): the key
    g           sigmoid(x^_g A_g) B_g: the gate
    S_t         S_{t-1} (diag(w) - kappa (a * kappa)^T) + v k~^T
    y           W_o (g * (norm(S_t r) + (r . (k~ * r_k)) v)), normalised per head, eps 64e-5

A, B are the low-rank maps; v_first is the v of the first layer for the same token, read from
`cross_layer`. Without it, or where no layer before it wrote there, a layer takes its own v for
v_first, which leaves v as it is. The state is the last input and S, in float32 (here (k, v) per
head, the paper's transposed).

Initial values are the published ones (the authors' code), but for three: the last projections,
zero there, are small here, and so are the first low-rank factors, so that every parameter learns
from the first step; and ranks go in steps of 8 below width 512, where the published least of 32
would be half of the width. Blocks have the backbone's RMS norms, where the paper has layer norms,
one of them after the embedding.

The authors' program (BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py, configure_optimizers)
decays the weights of its projections, not the low-rank maps, and gives w_0 twice the learning rate.
Here the low-rank maps are decayed as every matrix is, and all rates are equal.
"""

import math
from typing import Annotated, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive, Range
from zoo.mixers.base import CrossLayer, Mixer, MixerOutput, linear, no_weight_decay, residual_gain
from zoo.mixers.parts import head_width, shifted, wide_zeros
from zoo.ops.delta_rule import diagonal_plus_rank_one, unit_length
from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear import Linear
from zoo.parallel.hand_over import publish

SHIFTS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # exponents of initial mu


class RWKV7State(NamedTuple):
    last: Float[Tensor, "b d"]  # the last token's input
    S: Float[Tensor, "b h k v"]


class LowRankMap(nn.Module):
    """x -> f(x A) B, of a rank that grows with the root of the width unless it is given."""

    def __init__(self, width: int, factor: float, rank: int | None = None, activation=None) -> None:
        super().__init__()
        step = 32 if width >= 512 else 8  # published: 32 throughout
        rank = rank or step * max(1, round(factor * width**0.5 / step))
        self.activation = activation or nn.Identity()
        self.down = linear(width, rank, gain=1e-2)
        self.up = Linear(rank, width, bias=False)
        nn.init.orthogonal_(self.up.weight, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x)))


class RWKV7(Mixer):
    """Time mixing.

    Args:
        width: channels of the input and the output (D).
        heads: heads, which must divide the width; published: 64 channels each.
        decay_rank, rate_rank, value_rank, gate_rank: ranks of the maps of w, a, v and g; None:
            2.5, 2.5, 1.7 and 5 times the root of the width, in steps of 32 (8 below width 512).
        norm_eps: added under the root of the normalisation of a head.
        backend: of zoo.ops.delta_rule.
        layer, layers: this layer's index and the number of layers.
    """

    uses_cross_layer: ClassVar[bool] = True
    min_window = 2  # a decay acts on what an earlier token wrote

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        decay_rank: Annotated[int, Range(1, 2**12)] | None = None,
        rate_rank: Annotated[int, Range(1, 2**12)] | None = None,
        value_rank: Annotated[int, Range(1, 2**12)] | None = None,
        gate_rank: Annotated[int, Range(1, 2**12)] | None = None,
        norm_eps: Annotated[float, Range(1e-12, 1)] = 64e-5,
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        head = head_width(width, heads)
        self.heads, self.backend, self.layer = heads, backend, layer
        depth = layer / max(layers - 1, 1)  # 0 in the first layer, 1 in the last
        ramp = torch.linspace(0, 1, width)
        slope = ramp - 0.5
        zigzag = torch.linspace(-1, 1, head).repeat(heads)  # within each head
        zigzag = zigzag * zigzag.abs()

        remaining = 1 - layer / layers
        channel = torch.arange(width) / width
        self.mu = no_weight_decay(
            nn.Parameter(torch.stack([1 - channel ** (e * remaining) for e in SHIFTS.values()]))
        )
        self.w_0 = nn.Parameter(-5.5 + 6 * ramp ** (1 + depth**0.3) + 2.5 * zigzag)
        self.w_map = LowRankMap(width, 2.5, decay_rank, nn.Tanh())
        self.a_0 = nn.Parameter(-0.19 + 0.3 * zigzag + 0.4 * slope)
        self.a_map = LowRankMap(width, 2.5, rate_rank)
        if layer:
            self.v_0 = nn.Parameter(0.73 - 0.4 * slope)
            self.v_map = LowRankMap(width, 1.7, value_rank)
        self.g_map = LowRankMap(width, 5.0, gate_rank, nn.Sigmoid())
        self.k_k = nn.Parameter(0.71 - 0.1 * slope)
        self.k_a = nn.Parameter(torch.full((width,), 1.02))
        self.r_k = no_weight_decay(nn.Parameter(torch.full((heads, width // heads), -0.04)))

        self.r_proj, self.k_proj, self.v_proj = (Linear(width, width, bias=False) for _ in range(3))
        for proj, bound in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(proj.weight, -bound * width**-0.5, bound * width**-0.5)
        self.norm = nn.GroupNorm(heads, width, eps=norm_eps)
        nn.init.constant_(self.norm.weight, ((1 + layer) / layers) ** 0.7)
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: RWKV7State | None = None,
        cross_layer: CrossLayer | None = None,
    ) -> MixerOutput:
        wide = wide_dtype(x)
        last = x[:, -1].to(wide)
        publish(last=last)
        by_head = (self.heads, -1)
        before = shifted(x, state.last if state else None) - x
        for_r, for_w, for_k, for_v, for_a, for_g = (x + before * mu for mu in self.mu)
        r, k, v = (
            proj(u).to(wide)
            for proj, u in ((self.r_proj, for_r), (self.k_proj, for_k), (self.v_proj, for_v))
        )
        log_w = -math.exp(-0.5) * torch.sigmoid(self.w_0 + self.w_map(for_w).to(wide))
        a = torch.sigmoid(self.a_0 + self.a_map(for_a).to(wide))
        first = v if cross_layer is None else cross_layer.setdefault("first_values", v)
        if self.layer:
            v = v + (first - v) * torch.sigmoid(self.v_0 + self.v_map(for_v).to(wide))
        kappa = unit_length((k * self.k_k).unflatten(-1, by_head))
        k = k * (1 + (a - 1) * self.k_a)
        r, k, v, a, log_w = (u.unflatten(-1, by_head) for u in (r, k, v, a, log_w))
        y, S = diagonal_plus_rank_one(
            r, k, v, -kappa, a * kappa, log_w, state=state.S if state else None,
            backend=self.backend,
        )  # fmt: skip
        publish(S=S)
        y = y.flatten(-2).flatten(0, 1).to(self.norm.weight.dtype)
        y = self.norm(y).view_as(x)
        y = y + ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(-2)
        y = self.o_proj((y * self.g_map(for_g)).to(x.dtype))
        return y if state is None else (y, RWKV7State(last, S))

    def empty_state(self, batch: int) -> RWKV7State:
        weight = self.o_proj.weight
        width, head = len(weight), len(weight) // self.heads
        S = wide_zeros(weight, (batch, self.heads, head, head))
        return RWKV7State(wide_zeros(weight, (batch, width)), S)


class RWKV7ChannelState(NamedTuple):
    last: Float[Tensor, "b d"]  # the last token's input


class RWKV7ChannelMixing(Mixer):
    """y = W_v relu(W_k (x_t + mu (x_{t-1} - x_t)))^2   (Peng 2025, section 4.2)

    `hidden_width` is 4 times the width unless given.
    """

    def __init__(
        self, *, width: int, hidden_width: Positive | None = None, layer: int = 0, layers: int = 1
    ) -> None:
        super().__init__()
        hidden = 4 * width if hidden_width is None else hidden_width
        channel = torch.arange(width) / width
        self.mu = nn.Parameter(1 - channel ** ((1 - layer / layers) ** 4))
        self.k_proj = Linear(width, hidden, bias=False)
        nn.init.uniform_(self.k_proj.weight, -0.5 * width**-0.5, 0.5 * width**-0.5)
        self.v_proj = linear(hidden, width, gain=residual_gain(layers))

    def forward(
        self, x: Float[Tensor, "b t d"], state: RWKV7ChannelState | None = None
    ) -> MixerOutput:
        before = shifted(x, state.last if state else None)
        y = self.v_proj(F.relu(self.k_proj(x + self.mu * (before - x))).square())
        if state is None:
            return y
        return y, RWKV7ChannelState(x[:, -1].to(state.last.dtype))

    def empty_state(self, batch: int) -> RWKV7ChannelState:
        weight = self.v_proj.weight
        return RWKV7ChannelState(wide_zeros(weight, (batch, len(weight))))
