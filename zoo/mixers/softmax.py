"""Causal softmax attention, the baseline (Vaswani 2017; grouped keys: Ainslie 2023, GQA).

    q, k, v     W_q x, W_k x, W_v x, split into heads of `head_width` channels
    y           W_o softmax(q k^T / sqrt(head_width) + positions) v over keys 0 .. i

`positions`: `rope` turns q and k (Su 2021), `alibi` biases the scores (Press 2022), `none` leaves
the order to the causal mask (Haviv 2022; Kazemnejad 2023) or to positions added at the embedding.
The state is every key and value so far; keys are kept as they were turned on arrival. A `reach`
(zoo.attention), given to a trained model by zoo.extend, takes over rotary positions, which keys a
query sees and which are kept. Where `shared` holds "positions", (b, t), the tokens of a training
window stand there. With `causal=False` every query sees every key (Devlin 2019, BERT), under `rope`
or `none`.
"""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.attention.reach import Reach
from zoo.errors import choose
from zoo.mixers.base import (
    Mixer,
    Shared,
    State,
    compute_dtype,
    linear,
    refuse_state,
    residual_gain,
)
from zoo.ops.attention import Part, attention
from zoo.positions.alibi import CHUNK, add_bias_channels
from zoo.positions.rope import inverse_frequencies, rotate, turned


class KeyValues(NamedTuple):
    k: Float[Tensor, "b n h d"]
    v: Float[Tensor, "b n h d"]
    seen: int  # tokens read so far; more than n where older keys were dropped


class SoftmaxAttention(Mixer):
    recurrent: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    reach: Reach | None = None  # of rotary positions; None: every key at its distance

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        positions: str = "rope",
        rope_base: float = 10000.0,
        backend: str = "auto",
        causal: bool = True,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        if width % heads or heads % kv_heads:
            raise ValueError(
                f"heads={heads} must divide width={width}, and kv_heads={kv_heads} divide the heads"
            )
        if positions == "alibi" and not causal:
            raise ValueError(
                "positions=alibi are one-sided: bidirectional attention has rope or none"
            )
        self.causal = causal
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.positions = choose("positions", positions, ["rope", "alibi", "none"])
        self.rope_base = rope_base
        self.inv_freq = (
            inverse_frequencies(self.head_width, rope_base) if positions == "rope" else ()
        )
        self.backend = backend
        self.q_proj = linear(width, width)
        self.k_proj = linear(width, kv_heads * self.head_width)
        self.v_proj = linear(width, kv_heads * self.head_width)
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: KeyValues | None = None,
        shared: Shared | None = None,
    ):
        if not self.causal:
            refuse_state(state)
        start = state.seen if state else 0
        at = shared.get("positions") if shared else None
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_width))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.positions == "rope" and at is not None:
            q, k = self._placed(q, at), self._placed(k, at)
        elif self.positions == "rope" and self.reach is None:
            q, k = rotate(q, self.inv_freq, start), rotate(k, self.inv_freq, start)
        if state:
            k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)
        y = self.o_proj(self._attend(q, k, v, start, at).flatten(-2))
        if state is None:
            return y
        if self.reach:
            k, v = self.reach.keep(k, v)
        return y, KeyValues(k, v, start + x.shape[1])

    def _placed(self, x: Float[Tensor, "b t h d"], at: Tensor) -> Float[Tensor, "b t h d"]:
        """Turned to where the tokens stand, by the frequencies for a text that reaches so far."""
        if self.reach is None:
            return turned(x, self.inv_freq, at)
        length = int(at.max()) + 1 if self.reach.bucket else 0  # where it matters
        inv_freq, factor = self.reach.scaling(length)
        return turned(x, inv_freq, at, factor)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: int, at: Tensor | None) -> Tensor:
        """Each query over the keys up to its own; the queries are the last of the keys."""
        groups = self.heads // self.kv_heads
        k, v = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v))
        if self.reach and at is None:
            return self.reach(q, k, v, start, self.backend)
        if not self.causal:
            return attention([Part(q, k, v)], backend=self.backend)
        end, outs = k.shape[1] - q.shape[1], []
        for rows in q.split(CHUNK if self.positions == "alibi" else q.shape[1], 1):
            past, end = end, end + rows.shape[1]
            keys, scale = k[:, :end], None
            if self.positions == "alibi":
                stand = None if at is None else at[:, :end]
                rows, keys = add_bias_channels(rows, keys, origin=past, positions=stand)
                scale = 1.0
            parts = [Part(rows, keys[:, past:], v[:, past:end], causal=True)]
            if past:
                parts.append(Part(rows, keys[:, :past], v[:, :past]))
            outs.append(attention(parts, scale=scale, backend=self.backend))
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    def empty_state(self, batch: int) -> KeyValues:
        weight = self.k_proj.weight
        none = weight.new_empty(
            (batch, 0, self.kv_heads, self.head_width), dtype=compute_dtype(weight)
        )
        return KeyValues(none, none, 0)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        empty = self.empty_state(batch).k
        tokens = self.reach.kept(tokens) if self.reach else tokens
        return 2 * batch * tokens * self.kv_heads * self.head_width * empty.element_size()

    def carry(self, state: State, window: int) -> State:
        """The last `window` keys, as in Transformer-XL (Dai 2019, section 3.2)."""
        k, v, seen = super().carry(state, window)
        return KeyValues(k[:, -window:], v[:, -window:], seen)
