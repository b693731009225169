"""RWKV-6, Finch (Peng 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic
Recurrence", section 4): the state is a matrix per head, its decay depends on the token.

    ddlerp_n    x_t + (x_{t-1} - x_t) * (lambda_n + tanh(x^mu A_n) B_n), the blend of a token and
                the one before it for n = w, k, v, r, g, itself computed from the blend x^mu =
                x_t + (x_{t-1} - x_t) * mu
    r, k, v, g  W_r x^r, W_k x^k, W_v x^v, W_g x^g
    w_t         exp(-exp(lambda_d + tanh(x^w A_d) B_d)), the decay of each key channel
    S_t         diag(w_t) S_{t-1} + k_t v_t^T         per head
    o_t         r_t (S_{t-1} + diag(u) k_t v_t^T)     the present counts by its bonus u instead
    y           W_o (silu(g) * norm(o)), the norm over each head

`mix_x` is mu, `mix` lambda, `mix_down` and `mix_up` are A and B; `decay`, `decay_down` and
`decay_up` are those of d, and `bonus` is u. The state is the last token and S. The feed-forward is
RWKV-4's channel mixing (the paper's own but for its narrower default, 3.5 widths). Initialised as
the authors' code does, but where that is zero (W_o and both A), which would leave other parameters
without a gradient at first. The norm's eps is theirs, 64e-5 at 64 channels a head, in proportion to
the channels, as the variance of r S is.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.config.domains import Positive
from zoo.mixers.base import Mixer, MixerOutput, linear, no_weight_decay, residual_gain
from zoo.mixers.parts import head_width, shifted, wide_zeros
from zoo.mixers.rwkv4 import SMALL, decays, depth, last_token, mixes, no_token, zigzag
from zoo.ops.linear_attention import linear_attention
from zoo.parallel.hand_over import publish

LOW_RANK = 0.01  # half the range of the low-rank maps' first values
NORM_EPS = 1e-5  # per channel of a head


class RWKV6State(NamedTuple):
    last: Float[Tensor, "b d"]
    S: Float[Tensor, "b h k v"]


def low_rank(*shape: int) -> nn.Parameter:
    """Not decayed: it is near zero already, and what it adds to is not decayed either."""
    return no_weight_decay(nn.Parameter(torch.empty(shape).uniform_(-LOW_RANK, LOW_RANK)))


class RWKV6(Mixer):
    """Time mixing; the channel mixing is RWKV-4's.

    Args:
        width: channels of the input and the output (D).
        heads: heads, which must divide the width.
        mix_rank: rank of A and B of the token shift; None for 32, or an eighth of a small width.
        decay_rank: rank of A_d and B_d of the decay; None for twice `mix_rank`.
        backend: of zoo.ops.linear_attention.
        layer, layers: this layer's index and the number of layers.
    """

    min_window = 3  # w first matters to a token two after another

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        mix_rank: Positive | None = None,
        decay_rank: Positive | None = None,
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.width, self.heads, self.head_width = width, heads, head_width(width, heads)
        mix_rank = min(32, max(1, width // 8)) if mix_rank is None else mix_rank
        decay_rank = 2 * mix_rank if decay_rank is None else decay_rank
        self.backend = backend
        deep, shallow = depth(layer, layers)
        even, half = 1 - mixes(width, shallow), 1 - mixes(width, shallow / 2)
        value = even - 0.3 * deep
        self.mix_x = nn.Parameter(even)
        self.mix = no_weight_decay(nn.Parameter(torch.stack([even, even, value, half, half])))
        self.mix_down = low_rank(width, 5, mix_rank)
        self.mix_up = low_rank(5, mix_rank, width)
        self.decay = nn.Parameter(decays(width, -6, -1, layer, layers))
        self.decay_down = low_rank(width, decay_rank)
        self.decay_up = low_rank(decay_rank, width)
        bonus = deep * (1 - torch.arange(width) / max(width - 1, 1)) + zigzag(width, 0.1)
        self.bonus = no_weight_decay(nn.Parameter(bonus.unflatten(0, (heads, -1))))
        self.k_proj = linear(width, width, gain=SMALL)
        self.v_proj = linear(width, width)
        self.r_proj = linear(width, width)
        self.g_proj = linear(width, width, gain=SMALL)
        self.norm = nn.GroupNorm(heads, width, eps=NORM_EPS * self.head_width)
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(self, x: Float[Tensor, "b t d"], state: RWKV6State | None = None) -> MixerOutput:
        last = last_token(x)
        publish(last=last)
        w, k, v, r, g = self._blends(x, state.last if state else None)
        w = torch.tanh(w @ self.decay_down) @ self.decay_up
        log_decay = -torch.exp(self.decay + w.to(self.decay.dtype))
        r, k, v, log_decay = (
            a.unflatten(-1, (self.heads, -1))
            for a in (self.r_proj(r), self.k_proj(k), self.v_proj(v), log_decay)
        )
        before = state.S if state else None
        o, S = linear_attention(
            r, k, v, log_decay, bonus=self.bonus, state=before, backend=self.backend
        )
        assert isinstance(S, Tensor)
        publish(S=S)
        o = o.to(self.norm.weight.dtype).flatten(0, 1).flatten(1)
        y = self.o_proj(F.silu(self.g_proj(g)) * self.norm(o).view_as(x))
        return y if state is None else (y, RWKV6State(last, S))

    def _blends(self, x: Tensor, last: Tensor | None) -> tuple[Tensor, ...]:
        """ddlerp for w, k, v, r and g."""
        back = shifted(x, last) - x
        low = torch.tanh(torch.einsum("btd,dnr->nbtr", x + back * self.mix_x, self.mix_down))
        blends = self.mix[:, None, None] + torch.einsum("nbtr,nrd->nbtd", low, self.mix_up)
        return (x + back * blends).unbind(0)

    def empty_state(self, batch: int) -> RWKV6State:
        weight = self.k_proj.weight
        shape = (batch, self.heads, self.head_width, self.head_width)
        return RWKV6State(no_token(weight, batch, self.width), wide_zeros(weight, shape))
