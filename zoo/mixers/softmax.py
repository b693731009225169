"""Causal softmax attention, the baseline (Vaswani 2017, arXiv 1706.03762; grouped keys: Ainslie
2023, GQA, arXiv 2305.13245).

    q, k, v     W_q x, W_k x, W_v x, split into heads of `head_width` channels
    y           W_o softmax(q k^T / sqrt(head_width) + positions) v over keys 0 .. i

Positions are a scheme of zoo.positions, which prepares q and k, attends, and says what is cached:
by default every key and value so far. Extensions (zoo.model.extend) act on the scheme. With
`causal=False` every query sees every key (Devlin 2019, BERT, arXiv 1810.04805).

With `sink` each head has a learned key and value that every query sees, initially zero: the zero
sink, softmax_1, of Xiao 2023 (section 3.3, arXiv 2309.17453). Departure from the paper's learnable
sink, a token before the text (model.sink_token): queries see it unrotated, the same from every
position.

    qk_norm         q, k = RMSNorm(q), RMSNorm(k) in every head, before positions (Henry 2020,
                    arXiv 2010.04245; with a learned weight per channel as in Qwen3)
    logit_scale     q = (s log n) q for a query of n keys, s learned per head from 0.43 on (SSMax,
                    Nakanishi 2025, arXiv 2501.19399); biases of positions are not scaled
    score_scale     scores are c q k^T for this c instead of 1 / sqrt(head_width)
    score_softcap   c tanh(s / c) in place of a score s (Gemma 2, section 2, arXiv 2408.00118)
    output_gate     y = W_o (attention * sigmoid(W_g x)) (Qiu 2025, arXiv 2505.06708)
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Range
from zoo.errors import refuse
from zoo.mixers.base import (
    CrossLayer,
    Mixer,
    MixerOutput,
    RowStates,
    State,
    at_least,
    compute_dtype,
    linear,
    no_weight_decay,
    refuse_state,
    residual_gain,
)
from zoo.mixers.parts import KeyValues, extended, grow, no_keys
from zoo.ops.attention import Part
from zoo.ops.decode_block import Attention, HalfEnds, half
from zoo.ops.linear import is_hooked, project
from zoo.ops.rms_norm import OffsetRMSNorm, RMSNorm
from zoo.parallel.hand_over import publish
from zoo.positions.base import build_positions
from zoo.positions.rope import Rope

if TYPE_CHECKING:
    from zoo.mixers.paged_cache import PagedCache
    from zoo.mixers.quantized_cache import QuantizedCache

SET_NORM = "Set qk_norm=true, or leave it out"
LOGIT_SCALE = 0.43  # initial s: that of the paper's figure 1


class SoftmaxAttention(Mixer):
    """Softmax attention.

    Args:
        kv_heads: heads of keys and values, each shared by heads / kv_heads queries; None: `heads`.
        head_width: channels of a head; None: width / heads.
        positions: the scheme, a class of zoo.positions with its options bound.
        sink: a learned key and value per head.
        qkv_bias, output_bias: biases of W_q, W_k and W_v, and of W_o.
        qk_norm: queries and keys are normalised; `norm_eps` is added under the root, and the
            weights are offsets from one with `norm_offset`.
        score_scale: of the scores; None: 1 / sqrt(head_width).
        score_softcap: bound of the scores, approached as tanh; None: none.
        logit_scale: scores grow with the logarithm of the number of keys.
        output_gate: each channel is gated before W_o.
        backend: of zoo.ops.attention.
        causal: False: every query sees every key, and there is no state.
    """

    uses_cross_layer: ClassVar[bool] = True
    extendable: ClassVar[bool] = True
    takes_rows: ClassVar[bool] = True
    publishes_first: ClassVar[bool] = True
    kv_cache: "QuantizedCache | PagedCache | None" = None  # of a model that is only measured

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_width: Annotated[int, Range(1, 2**12)] | None = None,
        positions: Callable[..., Any] = Rope,
        backend: str = "auto",
        causal: bool = True,
        sink: bool = False,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: Annotated[float, Range(1e-12, 1)] = 1e-6,
        norm_offset: bool = False,
        score_scale: Annotated[float, Range(above=0, most=2**20)] | None = None,
        score_softcap: Annotated[float, Range(above=0, most=2**20)] | None = None,
        logit_scale: bool = False,
        output_gate: bool = False,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        at_least(1, heads=heads, kv_heads=kv_heads)
        if (head_width is None and width % heads) or heads % kv_heads:
            raise ValueError(
                f"heads={heads}: must divide width={width} and be a multiple of "
                f"kv_heads={kv_heads}."
            )
        self.causal, self.sink, self.backend = causal, sink, backend
        self.heads, self.kv_heads = heads, kv_heads
        self.head_width = width // heads if head_width is None else head_width
        self.positions = build_positions(
            positions, heads, self.head_width, causal=causal, sink=sink
        )
        if sink:
            shape = (self.heads, self.head_width)
            self.sink_k = no_weight_decay(nn.Parameter(torch.zeros(shape)))
            self.sink_v = no_weight_decay(nn.Parameter(torch.zeros(shape)))
        inner, narrow = heads * self.head_width, kv_heads * self.head_width
        self.q_proj = linear(width, inner, bias=qkv_bias)
        self.k_proj = linear(width, narrow, bias=qkv_bias)
        self.v_proj = linear(width, narrow, bias=qkv_bias)
        self.o_proj = linear(inner, width, gain=residual_gain(layers), bias=output_bias)
        if norm_offset and not qk_norm:
            refuse("norm_offset", True, "needs qk_norm=true, whose weights it describes", SET_NORM)
        norm = OffsetRMSNorm if norm_offset else RMSNorm
        self.q_norm = norm(self.head_width, norm_eps) if qk_norm else None
        self.k_norm = norm(self.head_width, norm_eps) if qk_norm else None
        self.score_scale = score_scale
        if score_softcap is not None and not self.positions.takes_softcap:
            rule = f"positions={self.positions.name} adds a bias to the scores"
            refuse("score_softcap", score_softcap, rule, "Use positions=rope, xpos or none")
        self.positions.softcap = score_softcap
        self.logit_scale = nn.Parameter(torch.full((heads,), LOGIT_SCALE)) if logit_scale else None
        self.gate_proj = linear(width, inner) if output_gate else None

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: State = None,
        cross_layer: CrossLayer | None = None,
    ) -> MixerOutput:
        if not self.causal:
            refuse_state(state)
        q, k, v = (
            y.unflatten(-1, (-1, self.head_width))
            for y in project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normalised(self.q_norm, q), _normalised(self.k_norm, k)
        if self.score_scale is not None:
            q = q * (self.score_scale * self.head_width**0.5)
        if isinstance(state, RowStates):
            rows = zip(q.split(1), k.split(1), v.split(1), state.rows, strict=True)
            found = [self._attend(*row, cross_layer) for row in rows]
            y, after = torch.cat([y for y, _ in found]), RowStates([one for _, one in found])
        else:
            y, after = self._attend(q, k, v, state, cross_layer)
        y = y.reshape(*x.shape[:2], -1)
        if self.gate_proj is not None:
            y = y * self.gate_proj(x).sigmoid()
        y = self.o_proj(y)
        return (y, after) if state else y

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, cross_layer: CrossLayer | None
    ) -> tuple[Float[Tensor, "b t h d"], State]:
        """Attend from the queries of a chunk; return the state after it, where one is given."""
        start = state.tokens_seen if state else 0
        if self.logit_scale is not None:
            held = state.k.shape[1] if state and self.kv_cache is None else start
            q = q * self._scales(start, q.shape[1], q, start - held)
        sinks, after = self._sinks(q), None
        q, k = self.positions.prepare(q, k, start, cross_layer)
        if self.kv_cache is not None:
            cached = state or self.empty_state(len(q))
            return self.kv_cache.attend(q, k, v, cached, cross_layer, sinks, self.backend)
        if state:
            k, v = grow(state.k, k), grow(state.v, v)
            after = KeyValues(*self.positions.evict(k, v), start + q.shape[1])
            publish(k=after.k, v=after.v, tokens_seen=after.tokens_seen)
        y = self.positions.attend(
            *(q, k, v, start, cross_layer),
            causal=self.causal,
            sinks=sinks,
            backend=self.backend,
        )
        return y, after

    def half_of_a_token(
        self, ends: HalfEnds, state: State, cross_layer: CrossLayer | None
    ) -> tuple[Tensor, State] | None:
        plain = type(state) is KeyValues and self.kv_cache is None and self.logit_scale is None
        if not plain or self.sink or not self.causal or is_hooked(self.positions):
            return None
        if "rotation_of_a_token" not in vars(type(self.positions)):  # but in what it derives from
            return None
        start, x, cached = state.tokens_seen, ends.x, state.k
        rotation = self.positions.rotation_of_a_token(start, x, cross_layer)
        if rotation is None or cached.dtype != x.dtype or self.backend not in ("auto", "native"):
            return None
        scale = self.head_width**-0.5 if self.score_scale is None else self.score_scale
        pairs = rotation[0].shape[-1]
        between = Attention(self.heads, self.kv_heads, self.head_width, pairs, scale)
        layers = [self.q_proj, self.k_proj, self.v_proj]
        layers += [] if self.gate_proj is None else [self.gate_proj]
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        found = half(ends, between, layers, self.o_proj, norms)
        if found is None:
            return None
        k, v = extended(cached, 1, x), extended(state.v, 1, x)
        return found.attention(k, v, *rotation), KeyValues(k, v, start + 1)

    def _scales(self, start: int, tokens: int, q: Tensor, gone: int = 0) -> Float[Tensor, "#t h 1"]:
        """Return s log n of each query and head; n counts the keys that its scheme keeps, `gone`
        of the text's keys are in no state."""
        assert self.logit_scale is not None
        tokens_seen = range(start + 1, start + tokens + 1)
        counts = [min(self.positions.cached(n), n - gone) for n in tokens_seen]
        counts = counts if self.causal else [tokens]
        logs = torch.tensor([math.log(n) for n in counts], dtype=q.dtype, device=q.device)
        return (logs[:, None] * self.logit_scale.to(q.dtype))[..., None]

    def _sinks(self, q: Tensor) -> list[Part]:
        """Return the learned key and value, for unrotated queries; nothing without them."""
        if not self.sink:
            return []
        k, v = (x.to(q.dtype).expand(len(q), 1, -1, -1) for x in (self.sink_k, self.sink_v))
        return [Part(q, k, v)]

    @property
    def recurrent(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.positions.bounded

    def empty_state(self, batch: int) -> State:
        weight = self.k_proj.weight
        none = no_keys(weight, batch, self.kv_heads, self.head_width)
        state = KeyValues(none, none, 0)
        return self.kv_cache.empty(state) if self.kv_cache is not None else state

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        item = compute_dtype(self.k_proj.weight).itemsize
        if self.kv_cache is not None:
            return self.kv_cache.state_bytes(tokens, batch, item)
        return 2 * batch * self.positions.cached(tokens) * self.kv_heads * self.head_width * item

    def truncate_state(self, state: State, window: int) -> State:
        """The last `window` keys, as in Transformer-XL (Dai 2019, section 3.2); sinks stay."""
        k, v, tokens_seen = super().truncate_state(state, window)
        return KeyValues(*self.positions.truncate(k, v, window), tokens_seen)


def _normalised(norm: RMSNorm, x: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h d"]:
    """Return x normalised in the dtype of the norm's weight, which autocast leaves as it is."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)
