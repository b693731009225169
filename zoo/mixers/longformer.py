"""Longformer: sliding windows, dilated in some heads, and a few global tokens (Beltagy 2020).

    window          w: a query sees its own key and the w before it; without `causal` w/2 on each
                    side, the paper's count (section 3.1). A list grows it with depth (section 4.1):
                    it is spread over the layers from the first to the last
    dilation        keys are r apart, one r or one per head. It acts in the upper half of the
                    layers: lower ones need all of their local context (section 4.1)
    global_tokens   the first g tokens are global: they see all tokens and all tokens see them
    q, k, v         W x; the queries of global tokens go with projections of their own, q_g k_g v_g,
                    copies of the others at first (section 3.1, "linear projections"). Other queries
                    see a global token's k and v, as the paper's code has it
    y               W_o softmax(..) v, one softmax over the window and the global tokens

Causally, a global token sees what is before it alone: it cannot gather the text, and what is left
of it is a key that never leaves the window. The paper's language models have none, the default
here. A single one would see itself alone and its q_g, k_g could not learn; there are 0 or >= 2.

Departures: rotary positions (or `none`), where the paper has learned or sinusoidal ones; no biases.

The state is the last w r keys and values, r the largest dilation, rotated to their positions, and
those of the global tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.attention.window import by_dilation, in_window, last_tokens, two_sided_window, window
from zoo.config.domains import Natural, Positive
from zoo.mixers.base import MixerOutput, State, linear, refuse_state, residual_gain
from zoo.mixers.parts import MultiHead, append, no_keys
from zoo.ops.attention import Part, attend
from zoo.ops.merge import Partial, merge
from zoo.positions.base import build_positions
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope

MAX_REACH = 2**24  # tokens back that a state holds keys for


class LongformerState(NamedTuple):
    k: Float[Tensor, "b n h d"]  # the window's
    v: Float[Tensor, "b n h d"]
    marked: tuple[Float[Tensor, "b g h d"], ...]  # the global tokens' k, v, k_g, v_g
    tokens_seen: int


class Longformer(MultiHead):
    """Sliding windows with global tokens, causal or over the whole text.

    Args:
        width: channels of the input and the output.
        heads: heads, which must divide the width.
        window: w; a list is spread over the layers.
        dilation: r, one for all heads or one for each; acts in the upper half of the layers.
        global_tokens: g, how many of the first tokens see all and are seen by all.
        positions: rope or none.
        rope_base: base of the rotary frequencies.
        backend: of zoo.ops.attention.
        causal: False for the bidirectional form.
        layer, layers: this layer's index and the number of layers.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        window: Positive | Sequence[Positive] = 128,
        dilation: Positive | Sequence[Positive] = 1,
        global_tokens: Natural = 0,
        positions: Callable[..., Any] = Rope,
        backend: str = "auto",
        causal: bool = True,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__(width, heads, causal=causal, backend=backend)
        windows = [window] if isinstance(window, int) else list(window)
        if not windows or not (causal or all(w % 2 == 0 for w in windows)):
            raise ValueError(
                f"window={window}: must be one or more integers (even numbers under "
                "objective=masked)."
            )
        dilations = [dilation] * heads if isinstance(dilation, int) else list(dilation)
        if len(dilations) != heads:
            raise ValueError(
                f"dilation={dilation}: must be one integer, or one for each of the {heads} heads."
            )
        if max(windows) * max(dilations) > MAX_REACH:
            raise ValueError(
                f"window={window}: must be at most {MAX_REACH} tokens, times dilation={dilation}."
            )
        if causal and global_tokens == 1:
            raise ValueError(
                "global_tokens=1: a single global token sees itself alone under objective=causal. "
                "Use 0, or 2 or more."
            )
        self.window = windows[layer * len(windows) // layers]
        self.dilations = dilations if layer >= layers // 2 else [1] * heads
        self.span = self.window * max(self.dilations)  # how far back the state goes
        self.global_tokens = global_tokens
        self.min_window = global_tokens + 2
        self.positions = build_positions(
            positions, heads, self.head_width, supported=(Rope, NoPositions)
        )
        if global_tokens:
            self.q_global, self.k_global, self.v_global = (linear(width, width) for _ in range(3))
            for copy, proj in (
                (self.q_global, self.q_proj),
                (self.k_global, self.k_proj),
                (self.v_global, self.v_proj),
            ):
                copy.load_state_dict(proj.state_dict())
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(
        self, x: Float[Tensor, "b t d"], state: LongformerState | None = None
    ) -> MixerOutput:
        if not self.causal:
            refuse_state(state)
        start = state.tokens_seen if state else 0
        q, k = (self._rotated(proj(x), start) for proj in (self.q_proj, self.k_proj))
        v = self.by_head(self.v_proj(x))
        keys, values = (append(state.k, k), append(state.v, v)) if state else (k, v)
        local = self._local(q, keys, values)
        out, marked = local[0], ()
        if self.global_tokens:
            marked = self._marked(x, k, v, start)
            if state:
                marked = tuple(append(a, b) for a, b in zip(state.marked, marked, strict=True))
            out = self._with_globals(x, q, local, marked, start)
        y = self.o_proj(out.flatten(-2))
        if state is None:
            return y
        k, v = last_tokens(keys, self.span), last_tokens(values, self.span)
        return y, LongformerState(k, v, marked, start + x.shape[1])

    def _rotated(self, x: Tensor, start: int) -> Float[Tensor, "b t h d"]:
        return self.positions.rotate(self.by_head(x), start)

    def _local(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        if self.causal:
            see = partial(window, size=self.window + 1, backend=self.backend)
        else:
            see = partial(two_sided_window, side=self.window // 2, backend=self.backend)
        return by_dilation(see, q, k, v, self.dilations)

    def _marked(self, x: Tensor, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, ...]:
        """k and v of the global tokens in x; k_g and v_g of what these see."""
        left = max(0, self.global_tokens - start)
        readable = x[:, :left] if self.causal else x
        k_g, v_g = (
            self._rotated(self.k_global(readable), start),
            self.by_head(self.v_global(readable)),
        )
        return k[:, :left], v[:, :left], k_g, v_g

    def _with_globals(
        self, x: Tensor, q: Tensor, local: Partial, marked: tuple[Tensor, ...], start: int
    ) -> Tensor:
        """Local queries with the global keys outside their windows; then the global queries."""
        k, v, k_g, v_g = marked
        left = max(0, self.global_tokens - start)
        rows = torch.arange(start, start + q.shape[1], device=q.device)
        columns = torch.arange(k_g.shape[1], device=q.device)
        keys, past = columns[: k.shape[1]], rows[:, None] >= columns
        outside = torch.stack([~self._sees(rows, keys, r) for r in self.dilations])
        if self.causal:
            outside = outside & past
        distant = attend([Part(q, k, v, mask=outside[None])], backend=self.backend)
        out, _ = merge([local, distant])
        if not left:
            return out
        q_g = self._rotated(self.q_global(x[:, :left]), start)
        mask = past[None, None, :left] if self.causal else None
        whole, _ = attend([Part(q_g, k_g, v_g, mask=mask)], backend=self.backend)
        return torch.cat([whole, out[:, left:]], 1)

    def _sees(self, rows: Tensor, keys: Tensor, r: int) -> Tensor:
        """Whether the window of each query holds each key."""
        ahead = 0 if self.causal else self.window // 2
        return in_window(rows + ahead * r, keys, self.window + 1, r)

    def empty_state(self, batch: int) -> LongformerState:
        weight = self.k_proj.weight
        none = no_keys(weight, batch, self.heads, self.head_width)
        return LongformerState(none, none, (none,) * 4 if self.global_tokens else (), 0)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        held = 2 * min(tokens, self.span) + 4 * min(tokens, self.global_tokens)
        size = self.empty_state(batch).k.element_size()
        return batch * held * self.heads * self.head_width * size

    def truncate_state(self, state: State, window: int) -> State:
        """The last `window` keys, and the global tokens."""
        k, v, marked, tokens_seen = super().truncate_state(state, window)
        return LongformerState(
            last_tokens(k, window),
            last_tokens(v, window),
            tuple(x[:, :window] for x in marked),
            tokens_seen,
        )
