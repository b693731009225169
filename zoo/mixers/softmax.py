"""Causal softmax attention, the baseline (Vaswani 2017; grouped keys: Ainslie 2023, GQA).

    q, k, v     W_q x, W_k x, W_v x, split into heads of `head_width` channels
    y           W_o softmax(q k^T / sqrt(head_width) + positions) v over keys 0 .. i

`positions`: `rope` turns q and k (Su 2021), `xpos` lets what was turned fade, and sees blocks of
half of `window`, the training length (Sun 2022); `alibi` biases the scores (Press 2022), `t5` by a
table of its own per layer (Raffel 2020, where layers share one and scores lack 1/sqrt(d)); `none`
leaves the order to the causal mask (Haviv 2022; Kazemnejad 2023) or to positions added at the
embedding.
The state is every key and value so far; keys are kept as they were turned on arrival. A `reach`
(zoo.attention), given to a trained model by zoo.model.extend, takes over rotary positions, which
keys a query sees and which are kept; its `slope_factor` interpolates ALiBi. Where `cross_layer`
holds "positions", (b, t), the tokens of a training window stand there. With `causal=False` every
query sees every key (Devlin 2019, BERT), under `rope` or `none`.

With `sink` every head has a learned key and value that each query sees, zero at first: the zero
sink, softmax_1, of Xiao 2023 (section 3.3). Departure from its learnable sink, a token before the
text: queries see it before they are turned, at no distance, the same however far they stand.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.attention.blockwise import BlockwiseXPos
from zoo.attention.pattern import Reach
from zoo.attention.t5_attention import t5_attention
from zoo.errors import choose
from zoo.mixers.base import (
    CrossLayer,
    Mixer,
    State,
    at_least,
    linear,
    no_weight_decay,
    refuse_state,
    residual_gain,
)
from zoo.mixers.parts import KeyValues, no_keys
from zoo.ops.attention import Part, attention
from zoo.positions.alibi import CHUNK, add_bias_channels
from zoo.positions.rope import Frequencies, apply_rope, by_row, inverse_frequencies
from zoo.positions.t5 import RelativeBias


class SoftmaxAttention(Mixer):
    uses_cross_layer: ClassVar[bool] = True
    reach: Reach | None = None  # of rotary positions; None: every key at its distance
    slope_factor = 1.0  # that ALiBi's slopes are divided by

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        positions: str = "rope",
        rope_base: float = 10000.0,
        window: int | None = None,
        backend: str = "auto",
        causal: bool = True,
        sink: bool = False,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        at_least(1, heads=heads, kv_heads=kv_heads)
        if width % heads or heads % kv_heads:
            raise ValueError(
                f"heads={heads} must divide width={width}, and kv_heads={kv_heads} divide the heads"
            )
        self.positions = choose("positions", positions, ["rope", "xpos", "alibi", "t5", "none"])
        if positions not in ("rope", "none") and not causal:
            raise ValueError(
                f"positions={positions} are one-sided: bidirectional attention has rope or none"
            )
        if (positions == "xpos") != (window is not None):
            raise ValueError(
                "positions=xpos, and no others, take window, the training length, of which their "
                f"blocks are half: model=xpos sets it (positions={positions}, window={window})"
            )
        if window is not None:
            at_least(1, window=window)
        if sink and positions in ("alibi", "t5"):
            raise ValueError(
                f"positions={positions} bias keys by their distance, and a sink stands at none: "
                "it goes with rope, xpos or none"
            )
        self.causal, self.sink = causal, sink
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.rope_base = rope_base
        self.inv_freq = (
            inverse_frequencies(self.head_width, rope_base) if positions == "rope" else ()
        )
        if window is not None:
            theta = inverse_frequencies(self.head_width, rope_base)
            self.reach = BlockwiseXPos(lambda _: (theta, 1.0), block=(window + 1) // 2)
        if positions == "t5":
            self.bias = RelativeBias(heads=heads)
            no_weight_decay(self.bias.weight)
        if sink:
            shape = (self.heads, self.head_width)
            self.sink_k = no_weight_decay(nn.Parameter(torch.zeros(shape)))
            self.sink_v = no_weight_decay(nn.Parameter(torch.zeros(shape)))
        self.backend = backend
        self.q_proj = linear(width, width)
        self.k_proj = linear(width, kv_heads * self.head_width)
        self.v_proj = linear(width, kv_heads * self.head_width)
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: KeyValues | None = None,
        cross_layer: CrossLayer | None = None,
    ):
        if not self.causal:
            refuse_state(state)
        start = state.tokens_seen if state else 0
        at = (
            cross_layer.get("positions")
            if cross_layer and self.positions in ("rope", "alibi")
            else None
        )
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_width))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        sinks = self._sinks(q)
        if self.positions == "rope" and at is not None:
            inv_freq, factor = self._frequencies(at, cross_layer)
            q, k = apply_rope(q, inv_freq, at, factor), apply_rope(k, inv_freq, at, factor)
        elif self.positions == "rope" and self.reach is None:
            q, k = apply_rope(q, self.inv_freq, start), apply_rope(k, self.inv_freq, start)
        if state:
            k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)
        y = self.o_proj(self._attend(q, k, v, start, at, sinks).flatten(-2))
        if state is None:
            return y
        if self.reach:
            k, v = self.reach.keep(k, v)
        return y, KeyValues(k, v, start + x.shape[1])

    def _frequencies(self, at: Tensor, cross_layer: CrossLayer | None) -> tuple[Frequencies, float]:
        """Those for a text that reaches as far as `at`, and their attention factor."""
        if cross_layer and "inv_freq" in cross_layer:
            return cross_layer["inv_freq"], 1.0
        if self.reach is None:
            return self.inv_freq, 1.0
        return by_row(self.reach.scaling, at) if self.reach.bucket else self.reach.scaling(0)

    def _sinks(self, q: Tensor) -> list[Part]:
        """The learned key and value, for queries that are not turned; none without them."""
        if not self.sink:
            return []
        k, v = (x.to(q.dtype).expand(len(q), 1, -1, -1) for x in (self.sink_k, self.sink_v))
        return [Part(q, k, v)]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: int,
        at: Tensor | None,
        sinks: list[Part],
    ) -> Tensor:
        """Each query over the keys up to its own; the queries are the last of the keys."""
        groups = self.heads // self.kv_heads
        k, v = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v))
        if self.reach and at is None:
            return self.reach(q, k, v, start, self.backend, sinks)
        if self.positions == "t5":
            return t5_attention(q, k, v, self.bias, backend=self.backend)
        if not self.causal:
            return attention([Part(q, k, v), *sinks], backend=self.backend)
        end, outs = k.shape[1] - q.shape[1], []
        for rows in q.split(CHUNK if self.positions == "alibi" else q.shape[1], 1):
            past, end = end, end + rows.shape[1]
            keys, scale = k[:, :end], None
            if self.positions == "alibi":
                stand = None if at is None else at[:, :end]
                rows, keys = add_bias_channels(rows, keys, past, self.slope_factor, stand)
                scale = 1.0
            parts = [Part(rows, keys[:, past:], v[:, past:end], causal=True)]
            if past:
                parts.append(Part(rows, keys[:, :past], v[:, :past]))
            parts += sinks  # rows are all of q: where they are cut, there are none
            outs.append(attention(parts, scale=scale, backend=self.backend))
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    @property
    def recurrent(self) -> bool:
        return self.reach is not None and self.reach.recent is not None

    def empty_state(self, batch: int) -> KeyValues:
        weight = self.k_proj.weight
        none = no_keys(weight, batch, self.kv_heads, self.head_width)
        return KeyValues(none, none, 0)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        empty = self.empty_state(batch).k
        tokens = self.reach.kept(tokens) if self.reach else tokens
        return 2 * batch * tokens * self.kv_heads * self.head_width * empty.element_size()

    def truncate_state(self, state: State, window: int) -> State:
        """The last `window` keys, as in Transformer-XL (Dai 2019, section 3.2); sinks stay."""
        k, v, seen = super().truncate_state(state, window)
        if self.reach and self.reach.sinks:  # bounded by what the reach keeps
            return KeyValues(k, v, seen)
        return KeyValues(k[:, -window:], v[:, -window:], seen)
