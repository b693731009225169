"""SimA: no softmax, queries and keys divided by their l1 norms over the tokens.

Koohpayegani & Pirsiavash 2022 (published 2024), section 3.

    q, k, v     W_q x, W_k x, W_v x, split into heads of d channels
    q^, k^      q / ||q||_1, k / ||k||_1, each channel by its norm over the tokens
    o           q^ (k^T v), or (q^ k^T) v where that is cheaper; weights may be negative
    y           W_o o

Bidirectional (`causal=False`) that is all, as published, over all tokens. Left out: the vision
block around it (LayerScale, local patch interaction).

Causal, a token cannot know the later ones, so both norms are those of the tokens up to the query,
z_t = sum_{i <= t} |x_i|, which makes of it linear attention with a rescaled query:

    o_t = (q_t / (z^q_t z^k_t)) S_t         S_t = sum_{i <= t} k_i v_i^T

Every o_t is what the bidirectional form gives the last token of x_1 .. x_t. The norms grow with t,
so the output falls like 1/t: `scale: t` multiplies by the number of tokens normalised over (of q
then its mean is taken, not its sum), which keeps the size of what is read; `none` is as published.
Trained shortly on 256 tokens, `none` was the better of the two up to there and `t` beyond, where
the other starves. Order is seen only through what came before (as without positions), or from
positions added at the embedding. The state is S, both norms, in float32, and the number of tokens.

In bfloat16 the first tokens are worse than the others by design: of the first, q / |q| and k / |k|
are the signs of each channel, and rounding may turn over those near 0. Measured over 500 sequences
at width 64 with 4 heads, largest error by token under autocast: 2.8 of the first, 0.27 and 0.17 of
the next two, at most 0.064 of any later, of outputs up to 18.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.config.domains import Positive
from zoo.mixers.base import MixerOutput, linear, refuse_state, residual_gain
from zoo.mixers.parts import MultiHead, wide_zeros
from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear_attention import linear_attention

EPS = 1e-12  # a channel that was 0 so far is divided by it


class SimAState(NamedTuple):
    S: Float[Tensor, "b h k v"]
    zq: Float[Tensor, "b h k"]
    zk: Float[Tensor, "b h k"]
    tokens_seen: int


class SimA(MultiHead):
    """Attention without a softmax, causal or over the whole text.

    Args:
        width: channels of the input and the output.
        heads: heads, which must divide the width.
        scale: t multiplies by the number of tokens normalised over; none is as published.
        positions: none; the mixer has no positions of its own.
        backend: of zoo.ops.linear_attention.
        causal: False for the bidirectional form.
        layer, layers: this layer's index and the number of layers.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        scale: Literal["t", "none"] = "t",
        backend: str = "auto",
        causal: bool = True,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__(width, heads, causal=causal, backend=backend)
        self.scale = scale
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(self, x: Float[Tensor, "b t d"], state: SimAState | None = None) -> MixerOutput:
        q, k, v = self.qkv(x)
        q, k = (x.to(wide_dtype(x)) for x in (q, k))
        if not self.causal:
            refuse_state(state)
            return self.o_proj(self._bidirectional(q, k, v).flatten(-2))
        zq, zk = q.abs().cumsum(1), k.abs().cumsum(1)
        if state:
            zq, zk = zq + state.zq[:, None], zk + state.zk[:, None]
        start, tokens = state.tokens_seen if state else 0, x.shape[1]
        rescaled = q / (zq.clamp(min=EPS) * zk.clamp(min=EPS))
        if self.scale == "t":
            rescaled = (
                rescaled
                * torch.arange(start + 1, start + tokens + 1, device=x.device)[:, None, None]
            )
        o, S = linear_attention(
            rescaled, k, v, state=state.S if state else None, backend=self.backend
        )
        assert isinstance(S, Tensor)  # not normalised
        y = self.o_proj(o.flatten(-2))
        return y if state is None else (y, SimAState(S, zq[:, -1], zk[:, -1], start + tokens))

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, channels = q.shape[1], q.shape[-1]
        q, k = (x / x.abs().sum(1, keepdim=True).clamp(min=EPS) for x in (q, k))
        if self.scale == "t":
            q = q * tokens
        q, k, wide = (x.transpose(1, 2) for x in (q, k, v.to(q.dtype)))
        with torch.autocast(v.device.type, enabled=False):
            o = q @ (k.mT @ wide) if tokens > channels else (q @ k.mT) @ wide
        return o.transpose(1, 2).to(v.dtype)

    def empty_state(self, batch: int) -> SimAState:
        weight, channels = self.q_proj.weight, self.q_proj.out_features // self.heads
        z = wide_zeros(weight, (batch, self.heads, channels))
        return SimAState(z.new_zeros((*z.shape, channels)), z, z, 0)
