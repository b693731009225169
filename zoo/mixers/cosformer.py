"""cosFormer: linear attention reweighted by a cosine of the distance (Qin 2022, section 3).

    q', k'      relu(W_q x), relu(W_k x)
    s_ij        q'_i . k'_j cos(pi (i - j) / 2M)                                   (eq. 9)
    o_i         sum_j s_ij v_j / sum_j s_ij,   y = W_o o

The cosine of a difference splits, so s_ij is a product of [q' cos a_i, q' sin a_i] and
[k' cos a_j, k' sin a_j] with a_i = pi i / 2M (eq. 10): linear attention with twice the channels.

M, `reference_length`, bounds the distance: at distance M the weight is 0, and beyond it would be
negative. The authors' program takes M from the text at hand, which lets outputs depend on the
length to come; here it is fixed, the paper's locality comes with M equal to the training length,
and `beyond` says what the place i of a token from M on counts as:

    refuse      nothing: M is the most tokens that are read
    clamped     M: later tokens weigh alike, more than early ones, of which the first weighs 0
    periodic    i mod M: the cosine is of the difference of two places in their stretches of M

Under extension=cosine_scaling M is `factor` times as much (zoo.positions.cosine), in `beyond` too.
In each the weights stay as they are within M, and at least 0. The state is the sums of both halves,
in float32, and the tokens read.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.config.domains import Positive
from zoo.mixers.base import MixerOutput, linear, refuse_state, residual_gain
from zoo.mixers.parts import MultiHead, wide_zeros
from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear_attention import MIN_NORMALISER, LinearState, linear_attention
from zoo.positions.base import PositionScheme
from zoo.positions.cosine import angles


class CosFormerState(NamedTuple):
    S: Float[Tensor, "b h k v"]
    z: Float[Tensor, "b h k"]
    tokens_seen: int


class CosineWeights(PositionScheme):
    """Where tokens are, as the cosines see it.

    Args:
        reference_length: M.
        beyond: what places from M on count as.
    """

    scaled_by: ClassVar[tuple[str, ...]] = ("zoo.positions.cosine",)

    def __init__(self, reference_length: int, beyond: str) -> None:
        super().__init__()
        self.reference_length, self.beyond, self.factor = reference_length, beyond, 1.0

    @property
    def last(self) -> float:
        """f M, the place at which the cosine is 0."""
        return self.factor * self.reference_length

    @property
    def max_length(self) -> int | None:
        return int(self.last) if self.beyond == "refuse" else None

    def forward(self, start: int, tokens: int, device: torch.device) -> Float[Tensor, " t"]:
        """Return the angles of the tokens start, start + 1, ..."""
        i = torch.arange(start, start + tokens, device=device, dtype=torch.float64)
        if self.beyond == "clamped":
            i = i.clamp(max=self.last)
        elif self.beyond == "periodic":
            i = i % self.last
        return angles(i, self.reference_length, factor=self.factor)

    def scale(self, scaling: Callable[..., Any], factor: float, original_length: int) -> None:
        """Let M count as `factor` times as much."""
        del scaling, original_length
        angles(torch.zeros(1), self.reference_length, factor=factor)
        self.factor = factor


class CosFormer(MultiHead):
    """cosFormer's attention, causal or over the whole text.

    Args:
        width: channels of the input and the output.
        heads: heads, which must divide the width.
        reference_length: M.
        beyond: refuse, clamped or periodic, what places from M on count as.
        backend: of zoo.ops.linear_attention.
        causal: False for the bidirectional form.
        layer, layers: this layer's index and the number of layers.
    """

    extendable: ClassVar[bool] = True
    scheme: ClassVar[str] = "zoo.mixers.cosformer.CosineWeights"

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        reference_length: Positive,
        beyond: Literal["refuse", "clamped", "periodic"] = "refuse",
        backend: str = "auto",
        causal: bool = True,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__(width, heads, causal=causal, backend=backend)
        self.positions = CosineWeights(reference_length, beyond)
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    @property
    def max_length(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.positions.max_length

    def forward(
        self, x: Float[Tensor, "b t d"], state: CosFormerState | None = None
    ) -> MixerOutput:
        start = state.tokens_seen if state else 0
        end = start + x.shape[1]
        if self.max_length is not None and end > self.max_length:
            raise ValueError(
                f"cosformer reads at most {self.max_length} tokens and was given {end}"
            )
        q, k, v = self.qkv(x)
        q, k = (self._reweighted(a.relu(), start) for a in (q, k))
        if not self.causal:
            refuse_state(state)
            return self.o_proj(_bidirectional(q, k, v).flatten(-2))
        before = LinearState(state.S, state.z) if state else None
        y, after = linear_attention(q, k, v, normalise=True, state=before, backend=self.backend)
        y = self.o_proj(y.flatten(-2))
        return y if state is None else (y, CosFormerState(after.S, after.z, end))

    def _reweighted(self, x: Tensor, start: int) -> Float[Tensor, "b t h k"]:
        """[x cos a, x sin a] with a = pi i / 2M at positions start, start + 1, ..."""
        wide = wide_dtype(self.o_proj.weight)
        a = self.positions(start, x.shape[1], x.device)[:, None, None]
        return torch.cat([x * a.cos().to(wide), x * a.sin().to(wide)], -1)

    def empty_state(self, batch: int) -> CosFormerState:
        weight = self.o_proj.weight
        head = weight.shape[0] // self.heads
        S = wide_zeros(weight, (batch, self.heads, 2 * head, head))
        return CosFormerState(S, S[..., 0].clone(), 0)


def _bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token from every token, by the order that is linear in them."""
    with torch.autocast(q.device.type, enabled=False):
        S = torch.einsum("bthk,bthv->bhkv", k, v.to(k.dtype))
        y = torch.einsum("bthk,bhkv->bthv", q, S)
        total = torch.einsum("bthk,bhk->bth", q, k.sum(1)).clamp(min=MIN_NORMALISER)
    return (y / total[..., None]).to(v.dtype)
