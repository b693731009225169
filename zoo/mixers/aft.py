"""The Attention Free Transformer (Zhai 2021, "An Attention Free Transformer", section 3), causal.

    Q, K, V     W_q x, W_k x, W_v x
    Y_t         sigmoid(Q_t) * sum_{t' <= t} e^{K_t' + w_{t,t'}} V_t' / sum e^{K_t' + w_{t,t'}}
    y           W_o Y

channel by channel: no products of queries and keys. The variants differ in w, and w = 0 always
means an ordinary place in the sum, not an unseen token:

    simple  w = 0
    conv    w of t - t' alone, for the last `window` tokens and one w per head of channels;
            reparameterised as published, gamma (w - mean w) / std w + beta. gamma and beta are
            zero there at first, which leaves w without a gradient; here gamma starts from 1
    local   w of t and t', for the last `window` tokens; w = u_t v_t' of rank `rank`
    full    w of t and t' for all pairs, of the same form: quadratic

`local` and `full` know the positions they were trained on, `max_length` of them, and no others.
The state is a running average with its maximum exponent, and for conv and local the last
`window` - 1 keys and values; `full` keeps all keys and values. The averages and their states are
in float32 (zoo.ops.aft).
"""

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive, Range
from zoo.mixers.base import Mixer, MixerOutput, State, compute_dtype, linear, residual_gain
from zoo.mixers.parts import append, head_width
from zoo.ops.aft import AFTWindow, absorb, aft, aft_window
from zoo.ops.aft_full import aft_full
from zoo.ops.linear import project
from zoo.ops.wkv4 import empty_average

FACTOR_STD = 0.01  # of u and v at first: w near 0


class AFTState(NamedTuple):
    older: Float[Tensor, "b 3 d"]  # the average of what is no longer in k and v
    k: Float[Tensor, "b n d"]
    v: Float[Tensor, "b n d"]
    tokens_seen: int


class AFT(Mixer):
    """AFT in four variants.

    Args:
        width: channels of the input and the output (d).
        variant: simple, conv, local or full.
        heads: groups of channels with biases of their own (conv); None for width / 4.
        window: s, tokens with a bias of their own (conv, local).
        rank: d', of the biases of local and full; None for 128, or a quarter of a small width.
        max_length: T, the positions that local and full know.
        backend: of zoo.ops.aft.
        layer, layers: this layer's index and the number of layers.
    """

    def __init__(
        self,
        *,
        width: int,
        variant: Literal["simple", "conv", "local", "full"] = "conv",
        heads: Positive | None = None,
        window: Annotated[int, Range(2)] = 32,
        rank: Positive | None = None,
        max_length: Positive | None = None,
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.variant, self.width, self.backend, self.window, self.cached = (
            variant,
            width,
            backend,
            window,
            0,
        )
        self.min_window = 2  # of one token the average is the token, whatever its weight
        self.recurrent = variant != "full"
        if variant in ("conv", "local"):
            self.cached = window - 1
        if variant == "conv":
            heads = max(1, width // 4) if heads is None else heads
            head_width(width, heads)
            self.min_window = window + 1  # beta weighs the window against what is older
            self.taps = nn.Parameter(torch.randn(heads, window))
            self.gamma = nn.Parameter(torch.ones(heads))
            self.beta = nn.Parameter(torch.zeros(heads))
        if variant in ("local", "full"):
            rank = min(128, max(1, width // 4)) if rank is None else rank
            if max_length is None:
                raise ValueError(
                    f"max_length=null: variant={variant} learns a weight for each position. Give "
                    "the number of positions."
                )
            self.max_length = max_length
            self.u = nn.Parameter(FACTOR_STD * torch.randn(max_length, rank))
            self.v = nn.Parameter(FACTOR_STD * torch.randn(max_length, rank))
        self.q_proj = linear(width, width)
        self.k_proj = linear(width, width)
        self.v_proj = linear(width, width)
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(self, x: Float[Tensor, "b t d"], state: AFTState | None = None) -> MixerOutput:
        before = self.empty_state(len(x)) if state is None else state
        end = before.tokens_seen + x.shape[1]
        if self.max_length is not None and end > self.max_length:
            raise ValueError(f"AFT reads at most {self.max_length} tokens and was given {end}")
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        forms = {"simple": self._simple, "conv": self._conv}
        forms |= {"local": self._local, "full": self._full}
        average, after = forms[self.variant](k, v, before)
        y = self.o_proj(torch.sigmoid(q) * average)
        return y if state is None else (y, AFTState(after.older, after.k, after.v, end))

    def _simple(self, k: Tensor, v: Tensor, state: AFTState) -> tuple[Tensor, AFTWindow]:
        y, older = aft(k, v, state=state.older, backend=self.backend)
        return y, AFTWindow(older, state.k, state.v)

    def _conv(self, k: Tensor, v: Tensor, state: AFTState) -> tuple[Tensor, AFTWindow]:
        standard = F.layer_norm(self.taps, self.taps.shape[-1:])
        w = self.gamma[:, None] * standard + self.beta[:, None]
        return aft_window(k, v, w[None], AFTWindow(*state[:3]), self.backend)

    def _local(self, k: Tensor, v: Tensor, state: AFTState) -> tuple[Tensor, AFTWindow]:
        start, end = state.tokens_seen, state.tokens_seen + k.shape[1]
        weights = F.pad(self.v, (0, 0, self.cached, 0))[start : end + self.cached]
        w = torch.einsum("tr,trs->ts", self.u[start:end], weights.unfold(0, self.window, 1)).flip(1)
        return aft_window(k, v, w[:, None], AFTWindow(*state[:3]))

    def _full(self, k: Tensor, v: Tensor, state: AFTState) -> tuple[Tensor, AFTWindow]:
        start, end = state.tokens_seen, state.tokens_seen + k.shape[1]
        k, v = append(state.k, k), append(state.v, v)
        y = aft_full(k, v, self.u[start:end], self.v[end - k.shape[1] : end])
        return y, AFTWindow(state.older, k, v)

    def empty_state(self, batch: int) -> AFTState:
        weight = self.k_proj.weight
        none = weight.new_empty((batch, 0, self.width), dtype=compute_dtype(weight))
        return AFTState(empty_average(weight, batch, self.width), none, none, 0)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        older, k = self.empty_state(batch)[:2]
        cached = min(tokens, self.cached) if self.recurrent else tokens
        return older.nbytes + 2 * batch * cached * self.width * k.element_size()

    def truncate_state(self, state: State, window: int) -> State:
        """The last `window` keys and values; where there is an average, it takes in the others."""
        older, k, v, tokens_seen = super().truncate_state(state, window)
        excess = k.shape[1] - window
        if excess <= 0:
            return AFTState(older, k, v, tokens_seen)
        if self.recurrent:
            older = absorb(older, k[:, :excess].to(older.dtype), v[:, :excess].to(older.dtype))
        return AFTState(older, k[:, excess:], v[:, excess:], tokens_seen)
