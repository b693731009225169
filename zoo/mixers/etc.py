"""ETC: a long input in windows and a short global one, between them labels (Ainslie 2020).

    x               the long input, the layer's tokens
    g               the global input, one token per block of c = `block` long ones; layer by layer
                    it grows as x does. g^0 is learned, the same for all blocks
    l2l, g2g        long sees long within the radius r = `window`; global sees global
    l2g, g2l        long sees global, global sees long: four attentions of one set of W^Q, W^K, W^V
    a_l             a vector added to the keys with label l, score = q . (k + a_l) / sqrt(d)
                    (section 3.1). l2l and g2g: the distance clipped at `labels`, before and after
                    apart; l2g and g2l: whether the long token is of the global one's block
    y               W_o of the softmax over all of a token's keys, of both inputs

Without `causal` this is the paper's section 3 with the globals one per block, as for its sentences;
g2g, g2l and l2g see everything. Causally, every part that would look ahead is dropped: long sees
the r before it and the globals of completed blocks; g_j, which is there once block j is complete,
sees block j and the globals up to itself. So a token reads of its own block what its window holds,
and of the blocks before it beyond the window their globals alone, one vector per block and layer.

Departures, in both forms: the globals move first in a layer, and long tokens read what they have
become (as published both read what the layer below left; so every layer's globals are read);
globals have a norm but no feed-forward of their own, as the block's acts on x; no CPC loss.

Time O(t (r + c) + t^2 / c). The state is the last max(r, c - 1) keys and values of x and, for every
completed block, those of its global as globals see it and as long tokens see it: it grows.
"""

from typing import Annotated, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.attention.local import relative_window, relative_window_around
from zoo.attention.window import last_tokens
from zoo.config.domains import Positive, Range
from zoo.mixers.base import (
    CrossLayer,
    MixerOutput,
    State,
    linear,
    no_weight_decay,
    refuse_state,
    residual_gain,
)
from zoo.mixers.parts import MultiHead, append, no_keys
from zoo.ops.attention import Part, attend
from zoo.ops.merge import Partial, merge
from zoo.ops.rms_norm import RMSNorm

LABEL_STD = 0.02


class ETCState(NamedTuple):
    k: Float[Tensor, "b n h d"]
    v: Float[Tensor, "b n h d"]
    globals_in: tuple[Float[Tensor, "b g h d"], ...]  # k, v that g2g sees
    globals_out: tuple[Float[Tensor, "b g h d"], ...]  # k, v that l2g sees
    tokens_seen: int


class ETC(MultiHead):
    """Long and global inputs that read each other, causal or over the whole text.

    Args:
        width: channels of the input and the output (d).
        heads: heads, which must divide the width.
        window: r, tokens that a token sees before it (and after it in the bidirectional form).
        block: c, tokens to a global one.
        labels: distances with a vector of their own (k), at most `window`.
        backend: of zoo.ops.attention.
        causal: False for the published form.
        layer, layers: this layer's index and the number of layers.
    """

    recurrent = False
    uses_cross_layer: ClassVar[bool] = True

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        window: Positive = 84,
        block: Positive = 32,
        labels: Annotated[int, Range(2)] = 12,
        backend: str = "auto",
        causal: bool = True,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__(width, heads, causal=causal, backend=backend)
        if labels > window:
            raise ValueError(f"labels={labels}: must be at most window={window}.")
        self.layer, self.window, self.block = layer, window, block
        self.held = max(window, block - 1)
        self.min_window = block + 1 if causal else 2
        self.o_proj = linear(width, width, gain=residual_gain(layers))
        self.first_global = nn.Parameter(torch.randn(width) * LABEL_STD)
        self.global_norm = RMSNorm(width, 1e-6)
        distances, sides = (labels + 1, 1) if causal else (2 * labels + 1, 2)
        self.l2l, self.g2g = self._labels(distances), self._labels(distances)
        self.l2g, self.g2l = self._labels(sides), self._labels(sides)

    def _labels(self, count: int) -> nn.Parameter:
        shape = (count, self.heads, self.head_width)
        return no_weight_decay(nn.Parameter(torch.randn(shape) * LABEL_STD))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: ETCState | None = None,
        cross_layer: CrossLayer | None = None,
    ) -> MixerOutput:
        if not self.causal:
            refuse_state(state)
            return self._both_ways(x, cross_layer)
        start = state.tokens_seen if state else 0
        q, k, v = self.qkv(x)
        if state:
            k, v = append(state.k, k), append(state.v, v)
        inner, g = self._next_globals(x, k, v, state, start, cross_layer)
        _, g_k, g_v = self.qkv(self.global_norm(g))
        new = [g_k + self.l2g[0].to(g_k.dtype), g_v]
        before = state.globals_out if state else (new[0][:, :0], new[1][:, :0])
        local = relative_window(q, k, v, self.l2l, self.window + 1, backend=self.backend)
        y = self._out(merge([local, *self._completed(q, before, new, start)]))
        if state is None:
            return y
        outer = tuple(append(a, b) for a, b in zip(before, new, strict=True))
        k, v = last_tokens(k, self.held), last_tokens(v, self.held)
        return y, ETCState(k, v, inner, outer, start + x.shape[1])

    def _next_globals(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        state: ETCState | None,
        start: int,
        cross_layer: CrossLayer | None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """k and v of all globals so far, and those of this chunk after reading them and x."""
        g = self._globals(x, (start % self.block + x.shape[1]) // self.block, cross_layer)
        g_q, *new = self.qkv(self.global_norm(g))
        before = state.globals_in if state else (new[0][:, :0], new[1][:, :0])
        g_k, g_v = (append(a, b) for a, b in zip(before, new, strict=True))
        span = max(g_k.shape[1], len(self.g2g))
        among = relative_window(g_q, g_k, g_v, self.g2g, span, backend=self.backend)
        g = g + self._out(merge([among, self._own_blocks(g_q, k, v, start, x.shape[1])]))
        self._leave(g, cross_layer)
        return (g_k, g_v), g

    def _out(self, result: Partial) -> Tensor:
        return self.o_proj(result[0].flatten(-2))

    def _globals(
        self, x: Tensor, count: int, cross_layer: CrossLayer | None
    ) -> Float[Tensor, "b g d"]:
        """What the nearest such layer below left, and this layer's own learned vector."""
        own = self.first_global.expand(len(x), count, -1)
        names = [f"etc_globals_{layer}" for layer in range(self.layer)]
        left = [cross_layer[name] for name in names if name in cross_layer] if cross_layer else []
        return left[-1] + own if left else own

    def _leave(self, g: Tensor, cross_layer: CrossLayer | None) -> None:
        """For the layers above, each under its own name: a layer run again finds the same."""
        if cross_layer is not None:
            cross_layer[f"etc_globals_{self.layer}"] = g

    def _own_blocks(
        self, q: Float[Tensor, "b g h d"], k: Tensor, v: Tensor, start: int, tokens: int
    ) -> Partial:
        """Each global of this chunk over its block. A carried window may lack a block's first."""
        batch, count, c = *q.shape[:2], self.block
        first = k.shape[1] - tokens - start % c
        lacking = max(0, -first)
        k, v = (F.pad(u, (0, 0, 0, 0, lacking, 0)) for u in (k, v))
        k, v = (u[:, max(0, first) :][:, : count * c].unflatten(1, (count, c)) for u in (k, v))
        mask = None
        if lacking:
            there = torch.arange(count * c, device=q.device) >= lacking
            mask = there.view(1, count, 1, 1, c).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        q, k, v = q.flatten(0, 1)[:, None], k.flatten(0, 1), v.flatten(0, 1)
        k = k + self.g2l[0].to(k.dtype)
        results = attend([Part(q, k, v, mask=mask)], backend=self.backend)
        out, lse = (u.unflatten(0, (batch, count))[:, :, 0] for u in results)
        return out, lse

    def _completed(self, q: Tensor, before: tuple, new: list[Tensor], start: int) -> list[Partial]:
        """Long queries over the globals of earlier chunks, then over those of this one.

        There, the i-th tokens of all blocks are a sequence that sees the globals up to the block
        before: a causal part, of which there are as many as tokens in a block.
        """
        found, begun, tokens, c = [], start % self.block, q.shape[1], self.block
        if before[0].shape[1]:
            k, v = (u.to(q.dtype) for u in before)
            found.append(attend([Part(q, k, v)], backend=self.backend))
        blocks = -(-(begun + tokens) // c)
        if blocks == 1:
            return found
        rows = F.pad(q, (0, 0, 0, 0, begun, blocks * c - begun - tokens)).unflatten(1, (-1, c))
        rows = rows[:, 1:].transpose(1, 2).flatten(0, 1)
        k, v = (u[:, None, : blocks - 1].expand(-1, c, -1, -1, -1).flatten(0, 1) for u in new)
        out, lse = attend([Part(rows, k, v, causal=True)], backend=self.backend)
        out, lse = (u.unflatten(0, (-1, c)).transpose(1, 2).flatten(1, 2) for u in (out, lse))
        out = F.pad(out, (0, 0, 0, 0, c, 0))[:, begun : begun + tokens]
        lse = F.pad(lse, (0, 0, c, 0), value=-torch.inf)[:, begun : begun + tokens]
        return [*found, (out, lse)]

    def _both_ways(self, x: Float[Tensor, "b t d"], cross_layer: CrossLayer | None) -> Tensor:
        tokens, count = x.shape[1], -(-x.shape[1] // self.block)
        block = torch.arange(tokens, device=x.device) // self.block
        own = torch.arange(count, device=x.device)[:, None] == block  # (g, t)
        q, k, v = self.qkv(x)
        g = self._globals(x, count, cross_layer)
        g_q, g_k, g_v = self.qkv(self.global_norm(g))
        span = max(count, len(self.g2g))
        among = relative_window_around(g_q, g_k, g_v, self.g2g, span, backend=self.backend)
        g = g + self._out(merge([among, *self._two_labels(g_q, k, v, self.g2l, own)]))
        self._leave(g, cross_layer)
        _, g_k, g_v = self.qkv(self.global_norm(g))
        local = relative_window_around(q, k, v, self.l2l, self.window + 1, backend=self.backend)
        return self._out(merge([local, *self._two_labels(q, g_k, g_v, self.l2g, own.mT)]))

    def _two_labels(
        self, q: Tensor, k: Tensor, v: Tensor, labels: Tensor, own: Bool[Tensor, "q k"]
    ) -> list[Partial]:
        parts = (
            Part(q, k + label.to(k.dtype), v, mask=mask[None, None])
            for label, mask in zip(labels, (own, ~own), strict=True)
        )
        return [attend([part], backend=self.backend) for part in parts]

    def empty_state(self, batch: int) -> ETCState:
        weight = self.k_proj.weight
        none = no_keys(weight, batch, self.heads, self.head_width)
        return ETCState(none, none, (none, none), (none, none), 0)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        held = 2 * min(tokens, self.held) + 4 * (tokens // self.block)
        size = self.empty_state(batch).k.element_size()
        return batch * held * self.heads * self.head_width * size

    def truncate_state(self, state: State, window: int) -> State:
        """The last `window` keys, and the globals of as many tokens."""
        k, v, inner, outer, tokens_seen = super().truncate_state(state, window)
        inner, outer = (
            tuple(last_tokens(u, window // self.block) for u in pair) for pair in (inner, outer)
        )
        return ETCState(last_tokens(k, window), last_tokens(v, window), inner, outer, tokens_seen)
