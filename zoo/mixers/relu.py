"""ReLU attention: no softmax, each weight is a score's own (Wortsman 2023, section 3).

    q, k, v     W_q x, W_k x, W_v x, split into heads of `head_width` channels
    s_tj        q_t.k_j / sqrt(head_width)
    o_t         sum_{j <= t} f(s_tj) v_j / N_t,  f = ReLU or its square
    y           W_o o

`normalise` is N_t: `length`, n^alpha of the n keys that t sees (the paper's L^-alpha; there L is
the whole sequence, which a causal model cannot know); `sum`, sum_j f(s_tj); `rms`, the root mean
square of the unnormalised output over all heads, times a learned gain g (ReLA: Zhang 2021, section
3.2): g o / RMS(o), and where `gated` times sigmoid(w o); `root`, sqrt(n/2) of the n keys that t
sees, which keeps the variance of the values, as half of the scores are positive (Shen 2023, arXiv
2302.06461). A query whose scores are all negative reads 0.

Shen's losses, for `root`, are added in training to that of the prediction, as means over queries
and heads of the weights w_tj = f(s_tj) / N_t, with S_t their sum and p_tj = w_tj / S_t (after what
the paper says of their purpose; this form of them was not compared with its text):

    norm_loss       this times |log S_t|: weights sum to one, as a softmax's do
    entropy_loss    this times max(H(p_t) - entropy_margin, 0): a query does not spread too far

Under positions=alibi the bias joins the score before f, which makes of it a horizon: key j counts
only while q_t.k_j / sqrt(head_width) > slope (t - j), and not at all beyond. The state is as
softmax attention's: every key, rotated on arrival, and every value.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.config.domains import Positive, Range
from zoo.errors import refuse
from zoo.mixers.base import (
    CrossLayer,
    MixerOutput,
    State,
    add_auxiliary_loss,
    compute_dtype,
    linear,
    refuse_state,
    residual_gain,
)
from zoo.mixers.parts import KeyValues, MultiHead, append, no_keys
from zoo.ops.kernel_attention import kernel_attention, weight_sums
from zoo.ops.rms_norm import RMSNorm
from zoo.parallel.hand_over import publish
from zoo.positions.alibi import ALiBi
from zoo.positions.base import build_positions
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope

EPS = 1e-6


class ReLUAttention(MultiHead):
    """Attention whose weights are ReLU of the scores.

    Args:
        width: channels of the input and the output.
        heads: heads, which must divide the width.
        kernel: relu or squared_relu, f.
        normalise: N_t: length, sum, rms or root.
        alpha: of n^alpha, with normalise=length.
        gated: with normalise=rms, times sigmoid(w o).
        norm_loss, entropy_loss: weights of the losses in training, with normalise=root.
        entropy_margin: entropy in nats up to which entropy_loss costs nothing.
        positions: rope, alibi or none.
        rope_base: base of the rotary frequencies.
        backend: of zoo.ops.kernel_attention.
        causal: False for the bidirectional form.
        layer, layers: this layer's index and the number of layers.
    """

    recurrent = False
    uses_cross_layer: ClassVar[bool] = True
    publishes_first: ClassVar[bool] = True

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        kernel: Literal["relu", "squared_relu"] = "relu",
        normalise: Literal["length", "sum", "rms", "root"] = "length",
        alpha: Annotated[float, Range(0, 2)] = 1.0,
        gated: bool = False,
        norm_loss: Annotated[float, Range(0, 1000)] = 0.0,
        entropy_loss: Annotated[float, Range(0, 1000)] = 0.0,
        entropy_margin: Annotated[float, Range(0, 100)] | None = None,
        positions: Callable[..., Any] = Rope,
        backend: str = "auto",
        causal: bool = True,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__(width, heads, causal=causal, backend=backend)
        if gated and normalise != "rms":
            raise ValueError(
                f"gated=true: acts with normalise=rms, here it is {normalise}. Leave it out."
            )
        for name, one in (("norm_loss", norm_loss), ("entropy_loss", entropy_loss)):
            if one and normalise != "root":
                refuse(
                    name, one, f"acts with normalise=root, here it is {normalise}", "Leave it out"
                )
        if (entropy_margin is None) == bool(entropy_loss):
            rule = "must be given with entropy_loss above 0, and only then"
            refuse("entropy_margin", entropy_margin, rule)
        self.kernel, self.normalise, self.alpha = kernel, normalise, alpha
        self.norm_loss, self.entropy_loss = norm_loss, entropy_loss
        self.entropy_margin = entropy_margin or 0.0
        self.positions = build_positions(
            *(positions, heads, self.head_width),
            causal=causal,
            supported=(Rope, ALiBi, NoPositions),
        )
        self.norm = RMSNorm(width, EPS) if normalise == "rms" else None
        self.gate = nn.Parameter(torch.zeros(width)) if gated else None
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: KeyValues | None = None,
        cross_layer: CrossLayer | None = None,
    ) -> MixerOutput:
        if not self.causal:
            refuse_state(state)
        start = state.tokens_seen if state else 0
        q, k, v = self.qkv(x)
        q, k = self.positions.prepare(q, k, start)
        tokens_seen = start + x.shape[1]
        if state:
            k, v = append(state.k, k), append(state.v, v)
            publish(k=k, v=v, tokens_seen=tokens_seen)
        if self.training and cross_layer is not None and (self.norm_loss or self.entropy_loss):
            add_auxiliary_loss(cross_layer, self._loss(q, k))
        y = self.o_proj(self._attend(q, k, v).to(v.dtype))
        return y if state is None else (y, KeyValues(k, v, tokens_seen))

    def _loss(self, q: Tensor, k: Tensor) -> Tensor:
        """What norm_loss and entropy_loss cost, a scalar."""
        sums, entropies = weight_sums(q, k, self.kernel, slopes=self._slopes(q), causal=self.causal)
        visible = self._visible(q, k).to(sums.dtype)
        total = (sums / (visible / 2).sqrt()).clamp(min=EPS)
        excess = (entropies - self.entropy_margin).clamp(min=0)
        return self.norm_loss * total.log().abs().mean() + self.entropy_loss * excess.mean()

    def _slopes(self, q: Tensor) -> Float[Tensor, " h"] | None:
        slopes = self.positions.slopes()
        return None if slopes is None else torch.tensor(slopes, device=q.device)

    def _visible(self, q: Tensor, k: Tensor) -> Int[Tensor, "#t 1"]:
        """How many keys each query sees; the queries are the last of the keys."""
        first = k.shape[1] - q.shape[1] + 1 if self.causal else k.shape[1]
        return torch.arange(first, k.shape[1] + 1, device=q.device)[:, None]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "b t d"]:
        """The normalised sums, in float32 or better; the queries are the last of the keys."""
        if self.normalise == "sum":
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        o = kernel_attention(
            *(q, k, v, self.kernel),
            slopes=self._slopes(q),
            causal=self.causal,
            backend=self.backend,
        )
        if self.normalise == "sum":
            return (o[..., :-1] / o[..., -1:].clamp(min=EPS)).flatten(-2)
        o = o.flatten(-2)
        if self.norm is not None:
            return (
                self.norm(o) if self.gate is None else self.norm(o) * torch.sigmoid(self.gate * o)
            )
        visible = self._visible(q, k)
        if self.normalise == "root":
            return o / (visible.to(o.dtype) / 2).sqrt()
        return o / (visible if self.alpha == 1 else visible.to(o.dtype) ** self.alpha)

    def empty_state(self, batch: int) -> KeyValues:
        weight = self.k_proj.weight
        none = no_keys(weight, batch, self.heads, self.head_width)
        return KeyValues(none, none, 0)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        weight = self.k_proj.weight
        return 2 * batch * tokens * weight.shape[0] * compute_dtype(weight).itemsize

    def truncate_state(self, state: State, window: int) -> State:
        """The last `window` keys, which are then all that the next window's queries divide by."""
        k, v, tokens_seen = super().truncate_state(state, window)
        return KeyValues(k[:, -window:], v[:, -window:], tokens_seen)
