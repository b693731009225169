"""Linformer: keys and values projected along the tokens to a few slots (Wang 2020, section 4).

    q, k, v     W_q x, W_k x, W_v x, split into heads of d channels
    E, F        projections over tokens: slots K~ = E K, V~ = F V
    y           W_o softmax(q K~^T / sqrt(d)) V~                                  (eq. 7)

Bidirectional (`causal=False`), as published: E and F are (rank, max_length), the columns of a
shorter text are its first, and a longer one is refused. `sharing`: `none`, a pair for every head;
`headwise`, one pair; `kv`, one with E = F. Sharing over layers as well is not offered. The mixer
adds no positions of its own here: the paper's are learned, at the embedding.

Causal. A row of E mixes all positions, so masking its slots would show the future. Instead each
completed block of `block` tokens is compressed to `slots` by the same E and F (slots, block), and a
query sees the slots of the blocks before its own and, exactly, the keys of its own block up to
itself, in one softmax. What that costs: of what lies before its block a query sees r/c of the
numbers, at the first token of a block of everything; and time and state still grow with the
tokens, by slots / block. In return there is no longest text. Under positions=rope keys are rotated
inside a block (from its start, as only differences count) and slots, compressed unrotated, are
biased by -slope_h per block of distance (ALiBi); under none neither is.

E and F are drawn so that a slot of a full text or block has the variance of a key (the paper's
proof has 1/rank, whose scores would grow with the length). The state is all slots so far and the
keys (unrotated) and values of the block that is being read.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from zoo.config.domains import Positive
from zoo.mixers.base import MixerOutput, State, compute_dtype, linear, refuse_state, residual_gain
from zoo.mixers.parts import MultiHead, append, no_keys
from zoo.ops.attention import Part, attend, attention
from zoo.ops.merge import merge
from zoo.positions.alibi import add_bias_channels, slopes
from zoo.positions.base import build_positions
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope

SEGMENT = 512  # queries, or one block if that is longer, that read the slots together


class LinformerState(NamedTuple):
    slot_k: Float[Tensor, "b s h d"]
    slot_v: Float[Tensor, "b s h d"]
    k: Float[Tensor, "b p h d"]  # of the block being read; p < block
    v: Float[Tensor, "b p h d"]
    tokens_seen: int


class Linformer(MultiHead):
    """Attention over compressed keys, causal by blocks or over the whole text.

    Args:
        width: channels of the input and the output.
        heads: heads, which must divide the width.
        sharing: of E and F: none, a pair per head; headwise, one pair; kv, one with E = F.
        block: tokens that are compressed together (causal).
        slots: what they are compressed to (causal).
        max_length: n, the most tokens that can be read (bidirectional).
        rank: k, what they are compressed to (bidirectional).
        positions: rope or none.
        rope_base: base of the rotary frequencies.
        backend: of zoo.ops.attention.
        causal: False for the published form.
        layer, layers: this layer's index and the number of layers.
    """

    recurrent = False

    def __init__(
        self,
        *,
        width: int,
        heads: Positive,
        sharing: Literal["none", "headwise", "kv"] = "headwise",
        block: Positive = 32,
        slots: Positive = 8,
        max_length: Positive = 512,
        rank: Positive = 48,
        positions: Callable[..., Any] = Rope,
        backend: str = "auto",
        causal: bool = True,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__(width, heads, causal=causal, backend=backend)
        names = ("slots", "block") if causal else ("rank", "max_length")
        few, many = (slots, block) if causal else (rank, max_length)
        if few > many:
            raise ValueError(f"{names[0]}={few}: must be at most {names[1]}={many}.")
        self.block, self.slots = block, slots
        self.max_length = None if causal else max_length
        self.min_window = block + 1 if causal else 1
        self.positions = build_positions(
            positions, heads, self.head_width, supported=(Rope, NoPositions)
        )
        self.biased = not isinstance(self.positions, NoPositions)  # between blocks
        shape = (heads if sharing == "none" else 1, few, many)
        self.E = nn.Parameter(torch.randn(shape) * many**-0.5)
        self.F = self.E if sharing == "kv" else nn.Parameter(torch.randn(shape) * many**-0.5)
        self.o_proj = linear(width, width, gain=residual_gain(layers))

    def forward(
        self, x: Float[Tensor, "b t d"], state: LinformerState | None = None
    ) -> MixerOutput:
        q, k, v = self.qkv(x)
        if not self.causal:
            refuse_state(state)
            return self.o_proj(self._bidirectional(q, k, v).flatten(-2))
        y, after = self._causal(q, k, v, state)
        y = self.o_proj(y.flatten(-2))
        return y if state is None else (y, after)

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[1]
        if self.max_length is not None and tokens > self.max_length:
            raise ValueError(f"it reads at most {self.max_length} tokens and was given {tokens}")
        slot_k = self._compressed(self.E[..., :tokens], k)
        slot_v = self._compressed(self.F[..., :tokens], v)
        return attention([Part(q, slot_k, slot_v)], backend=self.backend)

    def _compressed(self, E: Tensor, x: Tensor) -> Float[Tensor, "*b r h d"]:
        """E x for each head: (b, ..., n, h, d) -> (b, ..., slots, h, d)."""
        return torch.einsum("hrn,...nhd->...rhd", E.expand(self.heads, -1, -1), x)

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, state: LinformerState | None
    ) -> tuple[Tensor, LinformerState]:
        start, tokens_seen = 0, q.shape[1]
        if state:
            k, v = append(state.k, k), append(state.v, v)
            start = state.slot_k.shape[1] // self.slots * self.block + state.k.shape[1]
            tokens_seen += state.tokens_seen
        local = self._local(q, k, v)

        done = k.shape[1] - k.shape[1] % self.block  # tokens in blocks that are now complete
        slot_k, slot_v = (
            self._compressed(P, x[:, :done].unflatten(1, (-1, self.block))).flatten(1, 2)
            for P, x in ((self.E, k), (self.F, v))
        )
        if state:
            slot_k = append(state.slot_k, slot_k)
            slot_v = append(state.slot_v, slot_v)

        outs = []
        segments = list(self._segments(start, q.shape[1]))
        pieces = zip(*(x.split([*map(len, segments)], 1) for x in (q, *local)), strict=True)
        for rows, (queries, *own) in zip(segments, pieces, strict=True):
            remote = self._remote(rows, queries, slot_k, slot_v)
            outs.append(merge([(own[0], own[1]), remote])[0] if remote else own[0])
        return torch.cat(outs, 1), LinformerState(
            slot_k, slot_v, k[:, done:], v[:, done:], tokens_seen
        )

    def _local(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of each query over its own block; k and v begin with their block."""
        batch, tokens, before = len(q), q.shape[1], k.shape[1] - q.shape[1]
        short = -k.shape[1] % self.block
        q, k, v = (
            pad(x, (0, 0, 0, 0, ahead, short)).unflatten(1, (-1, self.block)).flatten(0, 1)
            for x, ahead in ((q, before), (k, 0), (v, 0))
        )
        q, k = self.positions.prepare(q, k, 0)
        results = attend([Part(q, k, v, causal=True)], backend=self.backend)
        out, lse = (x.unflatten(0, (batch, -1)).flatten(1, 2) for x in results)
        return out[:, before : before + tokens], lse[:, before : before + tokens]

    def _remote(
        self, rows: range, q: Tensor, slot_k: Tensor, slot_v: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """(out, lse) of the queries at `rows` over the slots of the blocks before; None at first.

        Rows count from the first block of which slots are held.
        The bias counts from the block of the first row, and the lse makes up for the rest: one
        constant per row is all it is.
        """
        first, last = rows.start // self.block, (rows.stop - 1) // self.block
        if not last:
            return None
        whole, part = first * self.slots, last * self.slots
        scale = None
        if self.biased:
            blocks = slot_k.new_empty((len(q), last, self.heads, 0))
            q, bias = add_bias_channels(q, blocks, origin=first)
            slot_k = torch.cat([slot_k[:, :part], bias.repeat_interleave(self.slots, 1)], -1)
            scale = 1.0
        block = torch.arange(rows.start, rows.stop, device=q.device) // self.block
        parts = [Part(q, slot_k[:, :whole], slot_v[:, :whole])] if whole else []
        if part > whole:
            owner = torch.arange(whole, part, device=q.device) // self.slots
            mask = (owner < block[:, None])[None, None]
            parts.append(Part(q, slot_k[:, whole:part], slot_v[:, whole:part], mask=mask))
        out, lse = attend(parts, scale=scale, backend=self.backend)
        if self.biased:
            slope = torch.tensor(slopes(self.heads), dtype=lse.dtype, device=q.device)
            lse = lse - slope * (block - first)[:, None]
        return out, lse

    def _segments(self, start: int, tokens: int) -> Iterator[range]:
        """The rows start .. start + tokens - 1, cut at every multiple of SEGMENT or a block."""
        step = max(1, SEGMENT // self.block) * self.block
        stop = start + tokens
        while start < stop:
            end = min(stop, (start // step + 1) * step)
            yield range(start, end)
            start = end

    def empty_state(self, batch: int) -> LinformerState:
        weight = self.k_proj.weight
        none = no_keys(weight, batch, self.heads, self.head_width)
        return LinformerState(none, none, none, none, 0)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        weight = self.k_proj.weight
        return 2 * batch * self._held(tokens) * weight.shape[0] * compute_dtype(weight).itemsize

    def _held(self, tokens: int) -> int:
        """Slots and keys held after so many tokens."""
        return tokens // self.block * self.slots + tokens % self.block

    def truncate_state(self, state: State, window: int) -> State:
        """The block being read and the last slots, no more in all than a window leaves."""
        state = super().truncate_state(state, window)
        blocks = max(0, self._held(window) - state.k.shape[1]) // self.slots
        old = max(0, state.slot_k.shape[1] - blocks * self.slots)
        return state._replace(slot_k=state.slot_k[:, old:], slot_v=state.slot_v[:, old:])
