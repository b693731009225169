"""RWKV-4 (Peng 2023, "RWKV: Reinventing RNNs for the Transformer Era", section 3).

Time mixing, the mixer:

    r, k, v     W_r x^r, W_k x^k, W_v x^v with x^r = mu_r x_t + (1 - mu_r) x_{t-1}, and so on:
                each channel's own blend of the token and the one before it
    wkv         the average of all v, weighted by e^k and fading by e^-w a token; the present one
                weighted by e^{u+k} instead (zoo.ops.wkv4)
    y           W_o (sigmoid(r) * wkv)

Channel mixing, its feed-forward:   y = sigmoid(W_r x^r) * W_v max(W_k x^k, 0)^2

The state is the last token of each half and the average with its maximum exponent: 5 vectors a
layer. `decay` is log w, `bonus` u. Initialised as published, but where that is zero: there it is
small (0.1) or, in a block's last projection, 1/sqrt(2 layers), so that every parameter learns from
the first step. The norms around are the backbone's.

    transformers RwkvForCausalLM                         here
    attention.time_decay, time_first                     decay, bonus
    attention.time_mix_{key,value,receptance}, (1, 1, d) mix_{k,v,r}, (d,)
    attention.{key,value,receptance,output}              {k,v,r,o}_proj
    feed_forward.time_mix_{key,receptance}               mix_{k,r}
    feed_forward.{key,value,receptance}                  {k,v,r}_proj
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive
from zoo.mixers.base import Mixer, MixerOutput, linear, residual_gain
from zoo.mixers.parts import shifted, wide_zeros
from zoo.ops.dtypes import wide_dtype
from zoo.ops.wkv4 import empty_average, wkv4
from zoo.parallel.hand_over import publish

SMALL = 0.1  # gain of projections that are zero in the paper


class TimeState(NamedTuple):
    last: Float[Tensor, "b d"]
    wkv: Float[Tensor, "b 3 d"]


class ChannelState(NamedTuple):
    last: Float[Tensor, "b d"]


def depth(layer: int, layers: int) -> tuple[float, float]:
    """How deep a layer is: from 0 to 1, and from 1 to almost 0."""
    return layer / max(layers - 1, 1), 1 - layer / layers


def mixes(width: int, power: float, shift: float = 0.0) -> Tensor:
    """Shares mu of the present token, growing with the channel: the first channels look back."""
    return (torch.arange(width) / width) ** power + shift


def decays(width: int, low: float, high: float, layer: int, layers: int) -> Tensor:
    """Logarithms of decay rates, from slow to fast channels; the deeper, the more slow ones."""
    share = torch.arange(width) / max(width - 1, 1)
    return low + (high - low) * share ** (0.7 + 1.3 * depth(layer, layers)[0])


def zigzag(width: int, size: float) -> Tensor:
    """0, +size, -size, 0 ...: neighbours start apart."""
    return size * ((torch.arange(width) + 1) % 3 - 1)


def last_token(x: Float[Tensor, "b t d"]) -> Float[Tensor, "b d"]:
    """What a token shift keeps, in float32 or better."""
    return x[:, -1].to(wide_dtype(x))


def no_token(weight: Tensor, batch: int, width: int) -> Float[Tensor, "b d"]:
    """The token before the first."""
    return wide_zeros(weight, (batch, width))


class RWKV4(Mixer):
    """Time mixing.

    Args:
        width: channels of the input and the output (D).
        backend: of zoo.ops.wkv4.
        layer, layers: this layer's index and the number of layers.
    """

    min_window = 3  # w first matters to a token two after another

    def __init__(
        self, *, width: int, backend: str = "auto", layer: int = 0, layers: int = 1
    ) -> None:
        super().__init__()
        deep, shallow = depth(layer, layers)
        self.width, self.backend = width, backend
        self.mix_k = nn.Parameter(mixes(width, shallow))
        self.mix_v = nn.Parameter(mixes(width, shallow, 0.3 * deep))
        self.mix_r = nn.Parameter(mixes(width, shallow / 2))
        self.decay = nn.Parameter(decays(width, -5, 3, layer, layers))
        self.bonus = nn.Parameter(math.log(0.3) + zigzag(width, 0.5))
        self.k_proj = linear(width, width, gain=SMALL)
        self.v_proj = linear(width, width)
        self.r_proj = linear(width, width, gain=SMALL)
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(self, x: Float[Tensor, "b t d"], state: TimeState | None = None) -> MixerOutput:
        last = last_token(x)
        publish(last=last)
        before = shifted(x, state.last if state else None)
        k, v, r = (
            proj(before + mix * (x - before))
            for proj, mix in (
                (self.k_proj, self.mix_k),
                (self.v_proj, self.mix_v),
                (self.r_proj, self.mix_r),
            )
        )
        wkv, average = wkv4(
            k, v, torch.exp(self.decay), self.bonus, state.wkv if state else None, self.backend
        )
        publish(wkv=average)
        y = self.o_proj(torch.sigmoid(r) * wkv)
        return y if state is None else (y, TimeState(last, average))

    def empty_state(self, batch: int) -> TimeState:
        weight = self.k_proj.weight
        return TimeState(
            no_token(weight, batch, self.width), empty_average(weight, batch, self.width)
        )


class ChannelMixing(Mixer):
    """`hidden_width` is 4 widths unless given."""

    min_window = 2

    def __init__(
        self, *, width: int, hidden_width: Positive | None = None, layer: int = 0, layers: int = 1
    ) -> None:
        super().__init__()
        self.width, hidden = width, 4 * width if hidden_width is None else hidden_width
        mix = mixes(width, depth(layer, layers)[1])
        self.mix_k, self.mix_r = nn.Parameter(mix), nn.Parameter(mix.clone())
        self.k_proj = linear(width, hidden)
        self.v_proj = linear(hidden, width, gain=residual_gain(layers))
        self.r_proj = linear(width, width, gain=SMALL)

    def forward(self, x: Float[Tensor, "b t d"], state: ChannelState | None = None) -> MixerOutput:
        last = last_token(x)
        publish(last=last)
        before = shifted(x, state.last if state else None)
        k = self.k_proj(before + self.mix_k * (x - before))
        r = self.r_proj(before + self.mix_r * (x - before))
        y = torch.sigmoid(r) * self.v_proj(F.relu(k).square())
        return y if state is None else (y, ChannelState(last))

    def empty_state(self, batch: int) -> ChannelState:
        return ChannelState(no_token(self.k_proj.weight, batch, self.width))
