"""LongNet: dilated attention in segments of growing length (Ding 2023, section 2).

    segments, dilations   (w_i, r_i), both geometric (eqs. 11 and 12). Branch i cuts the text into
                          segments of w_i; in each, head h takes the positions p with
                          p mod r_i = h mod r_i (section 2.3), which attend causally to each other
    alpha_i               the branches' shares in proportion to their softmax denominators (eq. 10):
                          they merge by their lse, the gradient flows through the shares, and a
                          position that a branch does not take has no part in it (lse -inf)
    y                     W_o sum_i alpha_i O_i   (eq. 9)

So merged, a key that several branches see counts several times, as published. `dedup: true` counts
each key once: a branch then adds to the one below only the keys outside that one's segment, which
is exact because every length and every dilation divides the next.

A taken query sees w_i / r_i keys at most and one in r_i is taken: O(t sum w_i / r_i^2). All
boundaries of the longest segment are boundaries of the others, in every layer: nothing passes them,
so it should be as long as what is to be read. In shorter texts, as in training, a branch sees what
there is, r_i apart.

Departures: rotary positions (or `none`) instead of xPos; r_i must divide w_i and w_{i-1}, so that
positions in a segment are positions of the text (the paper's last two dilations, 6 and 12, do not).

The state is, for every branch and head, the keys it took of the last w_i tokens, in rows of r_i
tokens: at most w_i / r_i of them.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.attention.window import last_tokens
from zoo.config.domains import Positive
from zoo.mixers.base import MixerOutput, State, linear, residual_gain
from zoo.mixers.parts import MultiHead, no_keys
from zoo.ops.attention import Part, attend, own_and_past
from zoo.ops.merge import Partial, merge
from zoo.positions.base import build_positions
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope


class LongNetState(NamedTuple):
    branches: tuple[Float[Tensor, "b rows h d2"], ...]  # k and v side by side
    tokens_seen: int


class LongNet(MultiHead):
    """Dilated attention in branches of growing segments.

    Args:
        width: channels of the input and the output.
        heads: heads, which must divide the width.
        segments: w_i, tokens of each branch's segments; each divides the next.
        dilations: r_i, steps between a branch's keys; the first is 1, each divides the next.
        dedup: a key that several branches see counts once.
        positions: rope or none.
        rope_base: base of the rotary frequencies.
        backend: of zoo.ops.attention.
        layer, layers: this layer's index and the number of layers.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        segments: Sequence[Positive],
        dilations: Sequence[Positive],
        dedup: bool = False,
        positions: Callable[..., Any] = Rope,
        backend: str = "auto",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__(width, heads, causal=True, backend=backend)
        del layer
        if len(segments) != len(dilations) or not segments:
            raise ValueError(
                f"segments={list(segments)}: must be as many as dilations={list(dilations)}, at "
                "least one."
            )
        if dilations[0] != 1:
            raise ValueError(
                f"dilations={list(dilations)}: must begin with 1, or some tokens see nothing."
            )
        steps = [*pairwise(segments), *pairwise(dilations)]
        strides = [*zip(dilations, segments, strict=True), *zip(dilations[1:], segments)]  # noqa: B905
        if any(b % a for a, b in (*steps, *strides)):
            raise ValueError(
                f"segments={list(segments)}: must each divide the next one, and of dilations="
                f"{list(dilations)} each the next one, its own and the preceding segment."
            )
        self.branches = list(zip(segments, dilations, strict=True))
        self.dedup = dedup
        self.positions = build_positions(
            positions, heads, self.head_width, supported=(Rope, NoPositions)
        )
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(self, x: Float[Tensor, "b t d"], state: LongNetState | None = None) -> MixerOutput:
        start = state.tokens_seen if state else 0
        q, k, v = self.qkv(x)
        q, k = self.positions.prepare(q, k, start)
        qkv, results, after = torch.cat([q, k, v], -1), [], []
        for branch, (w, r) in enumerate(self.branches):
            q, kv = _rows(qkv, start, r).tensor_split([self.head_width], -1)
            held = state.branches[branch].to(kv.dtype) if state else kv[:, :0]
            if start % r:  # the row that was begun, of some heads, is finished by the others
                kv = torch.cat([held[:, -1:] + kv[:, :1], kv[:, 1:]], 1)
                held = held[:, :-1]
            below = self.branches[branch - 1][0] // r if self.dedup and branch else None
            result = self._branch(q, held, kv, start // r % (w // r), w // r, below)
            results.append(_tokens(*result, start % r, x.shape[1], r))
            after.append(last_tokens(torch.cat([held, kv], 1), w // r))
        y = self.o_proj(merge(results)[0].flatten(-2))
        return y if state is None else (y, LongNetState(tuple(after), start + x.shape[1]))

    def _branch(
        self,
        q: Float[Tensor, "b rows h d"],
        held: Float[Tensor, "b past h d2"],
        kv: Float[Tensor, "b rows h d2"],
        first: int,
        segment: int,
        below: int | None,
    ) -> Partial:
        """Causal attention within segments of so many rows; the chunk begins at row `first` of one.

        `below`: rows in a segment of the branch below, whose keys are left to it.
        """
        rest = min(segment - first, q.shape[1]) if first else 0  # of a segment already begun
        pieces = []
        if rest:
            keys_values = torch.cat([last_tokens(held, first), kv[:, :rest]], 1)
            pieces.append(self._segment(q[:, :rest], keys_values, first, below))
        if count := q.shape[1] - rest:
            size = min(segment, count)
            q, kv = (
                F.pad(u[:, rest:], (0, 0, 0, 0, 0, -count % size)).unflatten(1, (-1, size))
                for u in (q, kv)
            )
            results = self._segment(q.flatten(0, 1), kv.flatten(0, 1), 0, below)
            whole = (u.unflatten(0, q.shape[:2]).flatten(1, 2)[:, :count] for u in results)
            pieces.append(tuple(whole))
        if len(pieces) == 1:
            return pieces[0]
        out, lse = (torch.cat(u, 1) for u in zip(*pieces, strict=True))
        return out, lse

    def _segment(self, q: Tensor, kv: Tensor, first: int, below: int | None) -> Partial:
        """The rows of one segment from `first` on, the last of the keys."""
        past = kv.shape[1] - q.shape[1]
        k, v = kv.chunk(2, -1)
        if below is not None:
            rows = torch.arange(first, first + q.shape[1], device=q.device) // below
            keys = torch.arange(first - past, first + q.shape[1], device=q.device) // below
            mask = (keys < rows[:, None])[None, None]
            return attend([Part(q, k, v, mask=mask)], backend=self.backend)
        if q.shape[1] == 1:
            return attend([Part(q, k, v)], backend=self.backend)
        return attend(own_and_past(q, k, v), backend=self.backend)

    def empty_state(self, batch: int) -> LongNetState:
        weight = self.k_proj.weight
        none = no_keys(weight, batch, self.heads, 2 * self.head_width)
        return LongNetState((none,) * len(self.branches), 0)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        rows = sum(min(-(-tokens // r), w // r) for w, r in self.branches)
        size = self.empty_state(batch).branches[0].element_size()
        return 2 * batch * rows * self.heads * self.head_width * size

    def truncate_state(self, state: State, window: int) -> State:
        """The rows of the last `window` tokens."""
        branches, tokens_seen = super().truncate_state(state, window)
        cached = (
            last_tokens(held, -(-window // r))
            for held, (_, r) in zip(branches, self.branches, strict=True)
        )
        return LongNetState(tuple(cached), tokens_seen)


def _rows(x: Float[Tensor, "b t h d"], start: int, r: int) -> Float[Tensor, "b rows h d"]:
    """From each r tokens head h's own, the (h mod r)-th; zeros for those outside of the chunk."""
    if r == 1:
        return x
    before, heads = start % r, x.shape[2]
    offsets = min(r, heads)
    end = -(before + x.shape[1]) % r
    x = F.pad(x, (0, 0, 0, -heads % offsets, before, end)).unflatten(1, (-1, r))
    own = x[:, :, :offsets].unflatten(3, (-1, offsets)).diagonal(0, 2, 4)  # b rows h/r d r
    return own.movedim(-1, 3).flatten(2, 3)[:, :, :heads]


def _tokens(out: Tensor, lse: Tensor, before: int, tokens: int, r: int) -> Partial:
    """Rows back at their tokens; the tokens between see nothing: output 0 and lse -inf."""
    if r == 1:
        return out, lse
    heads = torch.arange(out.shape[2], device=out.device)
    own = torch.arange(r, device=out.device)[:, None] == heads % r
    out = torch.where(own[..., None], out[:, :, None], 0.0).flatten(1, 2)
    lse = torch.where(own, lse[:, :, None], -torch.inf).flatten(1, 2)
    return out[:, before : before + tokens], lse[:, before : before + tokens]
