"""Star-Transformer: a ring of neighbours and one relay that all share (Guo 2019, section 3.2).

    h_i             satellites, the layer's tokens; e_i those that the first layer was given
    s               the relay
    satellites      h_i <- MultiAtt(h_i, [h_{i-1}; h_i; h_{i+1}; e_i; s])
    relay           s <- LN(ReLU(MultiAtt(s, [s; H])))
    T               the paper's iterations: the layers

Without `causal`: as published, s^0 the mean of e, the ends of the ring padded and masked. In a
layer the relay moves first, over the H that the layer below left: the paper's second step, then
its next first step. Causally h_{i+1} is dropped, and the relay's recurrence over layers becomes one
over blocks of c = `block` tokens within each layer,

    s_j = LN(ReLU(MultiAtt(s_{j-1}, [s_{j-1}; H_j]))),    s_0 = LN(ReLU(W_o u)), u learned,

where the satellites of block j, H_j, read s_{j-1}. Time is O(t), t / c steps of it one after
another; the state is one relay, its softmax over the block begun, and one satellite.

What that costs: a layer moves information by one token, and otherwise through the relay alone, from
each block to the next. So what lies back more than `layers` tokens is seen only once its block is
complete, up to c tokens late, and from farther than the last block only as far as one vector of the
layer's width carried it.

Departures: satellites have an LN(ReLU(.)) of their own with `satellite_norm` alone, as the block's
norm, residual sum and feed-forward are there; a learned vector for each place in the list
(before, own, after, e, s) is added to the keys, instead of positions added to e, which would end
with the trained length.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.attention.local import attend_per_key
from zoo.config.domains import Positive
from zoo.mixers.base import (
    CrossLayer,
    MixerOutput,
    compute_dtype,
    linear,
    no_weight_decay,
    refuse_state,
    residual_gain,
)
from zoo.mixers.parts import MultiHead, shifted, wide_zeros
from zoo.ops.attention import Part, attention
from zoo.ops.dtypes import wide_dtype


class Relay(NamedTuple):
    """The relay after the last completed block, and its attention over itself and what followed."""

    s: Float[Tensor, "b d"]
    out: Float[Tensor, "b h k"]
    lse: Float[Tensor, "b h"]


class StarState(NamedTuple):
    relay: Relay
    k: Float[Tensor, "b 1 h k"]  # the last satellite's
    v: Float[Tensor, "b 1 h k"]
    tokens_seen: int


class Star(MultiHead):
    """Satellites and their relay, causal or over the whole text.

    Args:
        width: channels of the input and the output (d).
        heads: heads, which must divide the width.
        block: tokens until the relay moves on (c); for the causal form.
        satellite_norm: h_i <- LN(ReLU(MultiAtt(..))), as the paper's algorithm 1.
        backend: of zoo.ops.attention.
        causal: False for the published form.
        layer, layers: this layer's index and the number of layers.
    """

    uses_cross_layer: ClassVar[bool] = True

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        block: Positive = 32,
        satellite_norm: bool = False,
        backend: str = "auto",
        causal: bool = True,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__(width, heads, causal=causal, backend=backend)
        self.layer, self.block = layer, block
        self.min_window = block + 1 if causal else 2
        self.o_proj = linear(width, width, gain=residual_gain(layers))
        self.places = no_weight_decay(
            nn.Parameter(torch.zeros(4 if causal else 5, heads, self.head_width))
        )
        self.relay_q, self.relay_k, self.relay_v = (linear(width, width) for _ in range(3))
        self.relay_o = linear(width, width)
        self.relay_norm = nn.LayerNorm(width)
        self.satellite_norm = nn.LayerNorm(width) if satellite_norm else None
        if causal:
            self.first_relay = nn.Parameter(torch.randn(width))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: StarState | None = None,
        cross_layer: CrossLayer | None = None,
    ) -> MixerOutput:
        if not self.causal:
            refuse_state(state)
        q, k, v = self.qkv(x)
        last = state if state and state.tokens_seen else None
        start = state.tokens_seen if state else 0
        e_k, e_v = self._first_inputs(x, k, v, cross_layer)
        s_k, s_v, relay = self._relay_keys(x, start, last, cross_layer)
        keys = [k, e_k, s_k, shifted(k, last and last.k[:, 0])]
        values = [v, e_v, s_v, shifted(v, last and last.v[:, 0])]
        if not self.causal:  # the neighbour behind
            keys.append(F.pad(k[:, 1:], (0, 0, 0, 0, 0, 1)))
            values.append(F.pad(v[:, 1:], (0, 0, 0, 0, 0, 1)))
        bias = torch.einsum("bthk,phk->bthp", q, self.places.to(q.dtype)) * self.head_width**-0.5
        visible = self._visible(x, first=last is None)
        out, _ = attend_per_key(q, keys, values, bias=bias, visible=visible)
        y = self.o_proj(out.flatten(-2).to(x.dtype))
        if self.satellite_norm is not None:
            y = self.satellite_norm(F.relu(y))
        if state is None:
            return y
        return y, StarState(relay, k[:, -1:], v[:, -1:], start + x.shape[1])

    def _first_inputs(
        self, x: Tensor, k: Tensor, v: Tensor, cross_layer: CrossLayer | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of e, what the first such layer was given; k and v where that is this."""
        below = self._from_below("input", cross_layer)
        if below:
            return self.by_head(self.k_proj(below[0])), self.by_head(self.v_proj(below[0]))
        if cross_layer is not None:
            cross_layer[f"star_input_{self.layer}"] = x
        return k, v

    def _relay_keys(
        self, x: Tensor, start: int, last: StarState | None, cross_layer: CrossLayer | None
    ) -> tuple[Tensor, Tensor, Any]:
        """Key and value of the relay that each token reads, and the relay after x."""
        if not self.causal:
            s = self._relay_of_all(x, cross_layer)
            return self.by_head(self.k_proj(s)), self.by_head(self.v_proj(s)), None
        relays, relay = self._relays(x, start, last and last.relay)
        relays = relays.to(x.dtype)
        begun = start % self.block
        s_k, s_v = (
            self.by_head(proj(relays)).repeat_interleave(self.block, 1)[:, begun:][:, : x.shape[1]]
            for proj in (self.k_proj, self.v_proj)
        )
        return s_k, s_v, relay

    def _visible(self, x: Tensor, first: bool) -> Bool[Tensor, "t places"]:
        """Which keys a token has: the first one of a text has none before it, the last none after.

        `first`: whether x begins the text.
        """
        visible = torch.ones((x.shape[1], len(self.places)), dtype=torch.bool, device=x.device)
        visible[0, 3] = not first
        if not self.causal:
            visible[-1, 4] = False
        return visible

    def _from_below(self, what: str, cross_layer: CrossLayer | None) -> list[Tensor]:
        """What such layers below left, by a name of its own each: a layer run again finds it."""
        names = (f"star_{what}_{layer}" for layer in range(self.layer))
        return [cross_layer[name] for name in names if name in cross_layer] if cross_layer else []

    def _relays(
        self, x: Float[Tensor, "b t d"], start: int, relay: Relay | None
    ) -> tuple[Float[Tensor, "b blocks d"], Relay]:
        """The relay that the tokens of each block read, and the state of its recurrence after x."""
        wide = wide_dtype(x)
        if relay is None:
            first = self.by_head(self.first_relay.expand(len(x), -1))
            relay, q = self._begun(self._update(first).to(wide))
        else:
            q = self._query(relay.s)
        first = min(self.block - start % self.block, x.shape[1])
        whole, rest = divmod(x.shape[1] - first, self.block)
        sizes = [first, *[self.block] * whole, *([rest] if rest else [])]
        k, v = (self.by_head(proj(x)).to(wide) for proj in (self.relay_k, self.relay_v))
        read = []
        for size, keys, values in zip(sizes, k.split(sizes, 1), v.split(sizes, 1), strict=True):
            read.append(relay.s)
            scores = torch.cat([relay.lse[:, None], (q[:, None] * keys).sum(-1)], 1)
            lse = scores.logsumexp(1)
            weights = torch.exp(scores - lse[:, None])[..., None]
            out = (weights * torch.cat([relay.out[:, None], values], 1)).sum(1)
            relay, start = Relay(relay.s, out, lse), start + size
            if start % self.block == 0:
                relay, q = self._begun(self._update(out).to(wide))
        return torch.stack(read, 1), relay

    def _update(self, out: Float[Tensor, "... h k"]) -> Float[Tensor, "... d"]:
        out = out.flatten(-2).to(self.relay_o.weight.dtype)
        return self.relay_norm(F.relu(self.relay_o(out)))

    def _query(self, s: Float[Tensor, "b d"]) -> Float[Tensor, "b h k"]:
        q = self.relay_q(s.to(self.relay_q.weight.dtype))
        return self.by_head(q).to(s.dtype) * self.head_width**-0.5

    def _begun(self, s: Float[Tensor, "b d"]) -> tuple[Relay, Float[Tensor, "b h k"]]:
        """A new block's relay, which so far has seen itself, and its query."""
        q = self._query(s)
        narrow = s.to(self.relay_k.weight.dtype)
        k, v = (self.by_head(proj(narrow)).to(s.dtype) for proj in (self.relay_k, self.relay_v))
        return Relay(s, v, (q * k).sum(-1)), q

    def _relay_of_all(self, x: Tensor, cross_layer: CrossLayer | None) -> Float[Tensor, "b 1 d"]:
        """The paper's step: the relay of the layer below over itself and all satellites."""
        relays = self._from_below("relay", cross_layer)
        s = relays[-1] if relays else x.mean(1, keepdim=True)
        q = self.by_head(self.relay_q(s))
        parts = [
            Part(q, self.by_head(self.relay_k(u)), self.by_head(self.relay_v(u))) for u in (s, x)
        ]
        s = self._update(attention(parts, backend=self.backend))
        if cross_layer is not None:
            cross_layer[f"star_relay_{self.layer}"] = s
        return s

    def empty_state(self, batch: int) -> StarState:
        weight = self.k_proj.weight
        shape = (batch, self.heads, self.head_width)
        relay = Relay(
            wide_zeros(weight, (batch, len(weight))),
            wide_zeros(weight, shape),
            wide_zeros(weight, shape[:2]),
        )
        last = weight.new_zeros((batch, 1, *shape[1:]), dtype=compute_dtype(weight))
        return StarState(relay, last, last, 0)
