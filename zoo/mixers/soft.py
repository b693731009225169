"""SOFT: a Gaussian kernel in place of the softmax, and its low-rank form (Lu 2021, section 3).

    q, v        W_q x, W_v x in heads of d channels; keys are the queries
    k(x, y)     exp(-||x - y||^2 / (2 sqrt(d)))                                   (eq. 3)
    S           S_ij = k(q_i, q_j), S_ii = 1;   y = W_o S v
    Q~          landmarks: a convolution over `block` tokens at that stride, shared by the heads,
                LayerNorm, GELU
    A, P        k(Q~, Q~), k(Q~, q)

Bidirectional (`causal=False`), as published: S = P^T A^+ P (eq. 8), read as P^T (A^+ (P v)), with
(A + epsilon I)^-1 for A^+ by Newton's iteration (algorithm 1). `residual` then says how far the
last inverse was from one, and rows have the largest as `newton_residual`. The paper keeps 49
landmarks by choosing the stride for the image; here there is one per `block` tokens. With
`value_conv` taps per head, a convolution of v over tokens is added to S v before W_o (the published
code's, of 3 x 3 pixels), over the last tokens where causal.

Causal `form`:

    exact       The sum over j <= i, whole; no landmark, no inverse. Time O(t^2), state every q, v.
    landmarks   Exact inside the own block; of all blocks before it, P^T A^-1 P with the landmarks
                of the last `landmarks` completed blocks. What was read is a function of the query,
                f(x) = sum_j k(x, q_j) v_j, kept as its projection on the landmarks' span,
                f(x) ~ k(x, Q~) c. When a block is complete its landmark joins, the oldest leaves,
                and the old projection plus the block's own sum is projected on the new span:
                    (A' + epsilon I) c' = k(Q~', q_block) v_block + k(Q~', Q~) c
                a ridge regression, which never lengthens f: states do not grow by themselves. Time
                O(t), state fixed. What it costs: a token is known only by what the landmarks since
                know of it, and is forgotten as they move away.

As published nothing divides the sum, whose size grows with the tokens that are alike, and the
default keeps it so: it trains, and S_ii = 1 keeps a token's own value in sight. `normalise`:
`none`; `sum` divides by the sum of the weights, at least S_ii = 1; `length` by the number of
visible keys, beside which S_ii starves: it trained worst of the three in both forms.

Under positions=rope queries are rotated, which leaves S_ii = 1 and makes S_ij depend on i - j; a
landmark, made of queries before rotation, is in the middle of its block.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.config.domains import Positive, Range
from zoo.mixers.base import (
    Mixer,
    MixerOutput,
    State,
    compute_dtype,
    linear,
    refuse_state,
    residual_gain,
)
from zoo.mixers.parts import HeadConvolution, KeyValues, append, head_width, no_keys, wide_zeros
from zoo.ops.dtypes import wide_dtype
from zoo.ops.kernel_attention import gaussian, kernel_attention
from zoo.ops.newton_inverse import NewtonInverse, inverse_residual
from zoo.positions.base import build_positions
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope

CHECKPOINTED_BLOCKS = (
    64  # blocks whose landmarks' matrices are held at once; recomputed in the backward pass
)


class Landmarks(NamedTuple):
    landmarks: Float[Tensor, "b m h d"]  # rotated; the latest last, zeros where there is none yet
    c: Float[Tensor, "b h m e"]
    q: Float[Tensor, "b block h d"]  # of the block being read, unrotated; zeros where unread
    v: Float[Tensor, "b block h d"]
    tokens_seen: int


class Convolved(NamedTuple):
    own: KeyValues | Landmarks  # the form's own state
    values: Float[Tensor, "b w h d"]  # the last of v, for the convolution


class Soft(Mixer):
    """A Gaussian kernel of the queries, causal in two forms or over the whole text.

    Args:
        width: channels of the input and the output.
        heads: heads, which must divide the width.
        form: of the causal model, exact or landmarks.
        normalise: of the sums: none, length or sum.
        block: tokens per landmark.
        landmarks: m, how many of the latest are kept (causal).
        epsilon: added to the diagonal of A before it is inverted.
        iterations: of Newton's method (bidirectional; T).
        value_conv: taps of the convolution on v; None: without.
        positions: rope or none.
        rope_base: base of the rotary frequencies.
        backend: of zoo.ops.kernel_attention.
        causal: False for the published form.
        layer, layers: this layer's index and the number of layers.
    """

    # The largest ||I - (A + epsilon I) X|| of the last bidirectional call, which rows report.
    residual: Tensor | None = None
    diagnostics: ClassVar[Mapping[str, str]] = {"newton_residual": "residual"}

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        form: Literal["exact", "landmarks"] = "landmarks",
        normalise: Literal["none", "length", "sum"] = "none",
        block: Positive = 16,
        landmarks: Annotated[int, Range(1, 2**20)] = 32,
        epsilon: Annotated[float, Range(above=0, most=1000)] = 0.01,
        iterations: Annotated[int, Range(1, 1000)] = 20,
        value_conv: Annotated[int, Range(2, 8)] | None = None,
        positions: Callable[..., Any] = Rope,
        backend: str = "auto",
        causal: bool = True,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.causal, self.heads, self.head_width = causal, heads, head_width(width, heads)
        self.form = form if causal else "bidirectional"
        self.recurrent = self.form == "landmarks"
        self.min_window = block + 1 if self.form == "landmarks" else 1
        self.normalise = normalise
        self.positions = build_positions(
            positions, heads, self.head_width, supported=(Rope, NoPositions)
        )
        self.block, self.landmarks = block, landmarks
        self.epsilon, self.iterations, self.backend = epsilon, iterations, backend
        self.scale = self.head_width**-0.5
        self.q_proj, self.v_proj = linear(width, width), linear(width, width)
        self.o_proj = linear(width, width, gain=residual_gain(layers))
        if self.form != "exact":
            self.convolution = linear(block * self.head_width, self.head_width)
            self.norm = nn.LayerNorm(self.head_width)
        self.value_conv = None
        if value_conv is not None:
            self.value_conv = HeadConvolution(heads, value_conv)
            self.min_window = max(self.min_window, value_conv)

    def forward(
        self, x: Float[Tensor, "b t d"], state: KeyValues | Landmarks | Convolved | None = None
    ) -> MixerOutput:
        q, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.v_proj))
        if not self.causal:
            refuse_state(state)
        form = {
            "bidirectional": self._bidirectional,
            "exact": self._exact,
            "landmarks": self._by_landmarks,
        }[self.form]
        own, before = state if isinstance(state, Convolved) else (state, self._no_values(len(x)))
        o, visible, after = form(q, v, own)
        o = self._normalised(o, visible).to(x.dtype)
        if self.value_conv is not None:
            local, last = self.value_conv(v, before, causal=self.causal)
            o, after = o + local.to(x.dtype), Convolved(after, last)
        y = self.o_proj(o.flatten(-2))
        return y if state is None else (y, after)

    def _exact(self, q: Tensor, v: Tensor, state: KeyValues | None):
        """Sums, their numbers of keys and the state after."""
        start = state.tokens_seen if state else 0
        q = k = self.positions.rotate(q, start)
        if state:
            k, v = append(state.k, k), append(state.v, v)
        o = kernel_attention(q, k, self._values(v), "gaussian", backend=self.backend)
        visible = torch.arange(k.shape[1] - q.shape[1] + 1, k.shape[1] + 1, device=o.device)
        return o, visible, KeyValues(k, v, start + q.shape[1])

    def _bidirectional(self, q: Tensor, v: Tensor, _: None):
        tokens, options = q.shape[1], {"causal": False, "backend": self.backend}
        landmarks = self._landmarks(F.pad(q, (0, 0, 0, 0, 0, -tokens % self.block)), 0)
        q, rows = self.positions.rotate(q, 0), landmarks.transpose(1, 2)
        A = self._ridge(gaussian(rows, rows, self.scale))
        inverse = NewtonInverse.apply(A, self.iterations)
        self.residual = inverse_residual(A.detach(), inverse.detach())
        read = kernel_attention(landmarks, q, self._values(v), "gaussian", **options)
        c = (inverse @ read.transpose(1, 2)).transpose(1, 2)
        o = kernel_attention(q, landmarks, c, "gaussian", **options)
        return o, torch.full((tokens,), tokens, device=o.device), None

    def _by_landmarks(self, q: Tensor, v: Tensor, state: Landmarks | None):
        state = state or self._no_landmarks(len(q))
        fresh, (tokens_before, block) = q.shape[1], (state.tokens_seen, self.block)
        filled = tokens_before % block
        q = torch.cat([state.q[:, :filled].to(q.dtype), q], 1)
        v = torch.cat([state.v[:, :filled].to(v.dtype), v], 1)
        blocks, rest = divmod(q.shape[1], block)
        done, first = blocks * block, tokens_before // block
        at, values = self.positions.rotate(q, tokens_before - filled), self._values(v)

        o = self._within_blocks(at, values)[:, filled:]
        every = torch.cat([state.landmarks, self._landmarks(q[:, :done], first)], 1)
        joined = first + torch.arange(1, blocks + 1, device=o.device)
        present = torch.arange(self.landmarks, device=o.device) >= self.landmarks - joined[:, None]
        c, outputs = state.c, []
        if blocks:
            whole = (x[:, :done].unflatten(1, (-1, block)).transpose(2, 3) for x in (at, values))
            around = every.unfold(1, self.landmarks + 1, 1).movedim(-1, 3)  # its own the last
            groups = (x.split(CHECKPOINTED_BLOCKS, 1) for x in (*whole, around))
            for *group, there in zip(*groups, present.split(CHECKPOINTED_BLOCKS), strict=True):
                read, c = checkpoint(self._advance, *group, there, c, use_reentrant=False)
                outputs.append(read)
        held = every[:, -self.landmarks :]
        if rest:
            outputs.append(self._read(at[:, done:], held, c))
        o = o + torch.cat(outputs, 1)[:, filled:]

        q, v = (F.pad(x[:, done:], (0, 0, 0, 0, 0, block - rest)) for x in (q, v))
        visible = torch.arange(tokens_before + 1, tokens_before + fresh + 1, device=o.device)
        return o, visible, Landmarks(held, c, q, v, tokens_before + fresh)

    def _within_blocks(self, q: Tensor, v: Tensor) -> Tensor:
        """The exact sums of each token over those before it in its own block."""
        short = -q.shape[1] % self.block
        blocks = (F.pad(x, (0, 0, 0, 0, 0, short)).unflatten(1, (-1, self.block)) for x in (q, v))
        q_blocks, v_blocks = (x.flatten(0, 1) for x in blocks)
        o = kernel_attention(q_blocks, q_blocks, v_blocks, "gaussian", backend=self.backend)
        return o.unflatten(0, (len(q), -1)).flatten(1, 2)[:, : q.shape[1]]

    def _advance(
        self,
        q: Float[Tensor, "b n h block d"],
        v: Float[Tensor, "b n h block e"],
        around: Float[Tensor, "b n h m1 d"],
        present: Bool[Tensor, "n m"],
        c: Float[Tensor, "b h m e"],
    ) -> tuple[Tensor, Tensor]:
        """What each of n blocks reads from the landmarks before it, and c after the last.

        `around` are, for each block, the m landmarks before it and its own; all but the first are
        those after it, and `present` says which of these there are. c is 0 for the others.
        """
        there = present[:, None, :, None].to(c.dtype)
        with torch.autocast(c.device.type, enabled=False):
            apart, heard = (gaussian(around, x, self.scale) for x in (around, q))
            A = self._ridge(apart[..., 1:, 1:] * there * there.mT)
            solved = torch.cat([heard[..., 1:, :] @ v.to(c.dtype), apart[..., 1:, :-1]], -1)
            solved = torch.cholesky_solve(solved * there, torch.linalg.cholesky(A))
            gains, moves = solved.split([v.shape[-1], solved.shape[-2]], -1)
            cs = []
            for gain, move in zip(gains.unbind(1), moves.unbind(1), strict=True):
                cs.append(c)
                c = gain + move @ c
            read = heard[..., :-1, :].mT @ torch.stack(cs, 1)
        return read.transpose(2, 3).flatten(1, 2), c

    def _read(self, q: Tensor, held: Tensor, c: Tensor) -> Tensor:
        """f(q) = k(q, Q~) c."""
        weights = gaussian(q.transpose(1, 2), held.transpose(1, 2), self.scale)
        with torch.autocast(c.device.type, enabled=False):
            return (weights @ c).transpose(1, 2)

    def _landmarks(self, q: Tensor, first: int) -> Float[Tensor, "b n h d"]:
        """One per whole block of unrotated queries, which is block `first` of the text or after."""
        blocks = q.unflatten(1, (-1, self.block)).transpose(2, 3).flatten(-2)
        wide = wide_dtype(q)
        landmarks = F.gelu(self.norm(self.convolution(blocks))).to(wide)
        blocks_at = torch.arange(first, first + blocks.shape[1], device=q.device) + 0.5
        return self.positions.rotate(landmarks, blocks_at * self.block - 0.5)

    def _ridge(self, A: Tensor) -> Tensor:
        return A + self.epsilon * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)

    def _values(self, v: Tensor) -> Tensor:
        """v, and a channel of ones to sum the weights where they are divided by their sum."""
        return torch.cat([v, torch.ones_like(v[..., :1])], -1) if self.normalise == "sum" else v

    def _normalised(self, o: Tensor, visible: Tensor) -> Tensor:
        if self.normalise == "sum":
            return o[..., :-1] / o[..., -1:].clamp(min=1)  # S_ii = 1 is among them
        return o / visible[:, None, None] if self.normalise == "length" else o

    def empty_state(self, batch: int) -> KeyValues | Landmarks | Convolved:
        none = no_keys(self.q_proj.weight, batch, self.heads, self.head_width)
        own = KeyValues(none, none, 0) if self.form == "exact" else self._no_landmarks(batch)
        return own if self.value_conv is None else Convolved(own, self._no_values(batch))

    def _no_values(self, batch: int) -> Float[Tensor, "b w h d"]:
        taps = 1 if self.value_conv is None else self.value_conv.weight.shape[1]
        weight = self.v_proj.weight
        shape = (batch, taps - 1, self.heads, self.head_width)
        return weight.new_zeros(shape, dtype=compute_dtype(weight))

    def _no_landmarks(self, batch: int) -> Landmarks:
        weight, place = self.q_proj.weight, (self.heads, self.head_width)
        channels = self.head_width + (self.normalise == "sum")
        unread = weight.new_zeros((batch, self.block, *place), dtype=compute_dtype(weight))
        c = wide_zeros(weight, (batch, self.heads, self.landmarks, channels))
        return Landmarks(c.new_zeros((batch, self.landmarks, *place)), c, unread, unread, 0)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        if self.form == "landmarks":
            return super().state_bytes(tokens, batch)
        held = 2 * tokens + self._no_values(1).shape[1]
        weight = self.q_proj.weight
        return held * batch * weight.shape[0] * compute_dtype(weight).itemsize

    def truncate_state(self, state: State, window: int) -> State:
        """All of a fixed state; of queries and values, those of the last `window` tokens."""
        if isinstance(state, Convolved):
            return Convolved(self.truncate_state(state.own, window), state.values.detach())
        state = super().truncate_state(state, window)
        if self.form == "landmarks":
            return state
        return KeyValues(state.k[:, -window:], state.v[:, -window:], state.tokens_seen)
