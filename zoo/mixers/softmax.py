"""Causal softmax attention, the baseline (Vaswani 2017, arXiv 1706.03762; grouped keys: Ainslie
2023, GQA, arXiv 2305.13245).

    q, k, v     W_q x, W_k x, W_v x, split into heads of `head_width` channels
    y           W_o softmax(q k^T / sqrt(head_width) + positions) v over keys 0 .. i

Positions are a scheme of zoo.positions, which prepares q and k, attends, and says what is cached:
by default every key and value so far. Extensions (zoo.model.extend) act on the scheme. With
`causal=False` every query sees every key (Devlin 2019, BERT, arXiv 1810.04805).

With `sink` each head has a learned key and value that every query sees, initially zero: the zero
sink, softmax_1, of Xiao 2023 (section 3.3, arXiv 2309.17453). Departure from the paper's learnable
sink, a token before the text: queries see it unrotated, the same from every position.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
from zoo.mixers.parts import KeyValues, grow, no_keys
from zoo.ops.attention import Part, attention
from zoo.positions.base import build_positions
from zoo.positions.rope import Rope


class SoftmaxAttention(Mixer):
    """Softmax attention.

    Args:
        kv_heads: heads of keys and values, each shared by heads / kv_heads queries; None: `heads`.
        positions: the scheme, a class of zoo.positions with its options bound.
        sink: a learned key and value per head.
        backend: of zoo.ops.attention.
        causal: False: every query sees every key, and there is no state.
    """

    uses_cross_layer: ClassVar[bool] = True
    extendable: ClassVar[bool] = True

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        positions: Callable[..., Any] = Rope,
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
        self.causal, self.sink, self.backend = causal, sink, backend
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.positions = build_positions(
            positions, heads, self.head_width, causal=causal, sink=sink
        )
        if sink:
            shape = (self.heads, self.head_width)
            self.sink_k = no_weight_decay(nn.Parameter(torch.zeros(shape)))
            self.sink_v = no_weight_decay(nn.Parameter(torch.zeros(shape)))
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
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_width))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        sinks = self._sinks(q)
        q, k = self.positions.prepare(q, k, start, cross_layer)
        if state:
            k, v = grow(state.k, k), grow(state.v, v)
        groups = self.heads // self.kv_heads
        if groups > 1 and x.shape[1] == 1 and self.positions.heads_alike and not sinks:
            # The queries of a group side by side as rows: the cache need not be repeated for them.
            rows = q.unflatten(2, (-1, groups)).transpose(1, 3)[:, :, :, 0]
            y = attention([Part(rows, k, v)], backend=self.backend).transpose(1, 2)
        else:
            k_all, v_all = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v))
            y = self.positions.attend(
                *(q, k_all, v_all, start, cross_layer),
                causal=self.causal,
                sinks=sinks,
                backend=self.backend,
            )
        y = self.o_proj(y.reshape(*x.shape[:2], -1))
        if state is None:
            return y
        return y, KeyValues(*self.positions.evict(k, v), start + x.shape[1])

    def _sinks(self, q: Tensor) -> list[Part]:
        """Return the learned key and value, for unrotated queries; nothing without them."""
        if not self.sink:
            return []
        k, v = (x.to(q.dtype).expand(len(q), 1, -1, -1) for x in (self.sink_k, self.sink_v))
        return [Part(q, k, v)]

    @property
    def recurrent(self) -> bool:
        return self.positions.bounded

    def empty_state(self, batch: int) -> KeyValues:
        weight = self.k_proj.weight
        none = no_keys(weight, batch, self.kv_heads, self.head_width)
        return KeyValues(none, none, 0)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        item = self.empty_state(batch).k.element_size()
        return 2 * batch * self.positions.cached(tokens) * self.kv_heads * self.head_width * item

    def truncate_state(self, state: State, window: int) -> State:
        """The last `window` keys, as in Transformer-XL (Dai 2019, section 3.2); sinks stay."""
        k, v, seen = super().truncate_state(state, window)
        return KeyValues(*self.positions.truncate(k, v, window), seen)
