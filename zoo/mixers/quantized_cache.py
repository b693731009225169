"""A key/value cache in 8 or 4 bits (Liu 2024, KIVI, arXiv 2402.02750).

    X_q         round((X - z) / s), s = (max X - min X) / (2^bits - 1), z = min X
    keys        per channel: s and z of each channel, over GROUP consecutive tokens
    values      per token: s and z of each token, over GROUP channels of a head (or all of them)
    RECENT      the last tokens, whose keys and values stay as the model computed them

Queries of the RECENT tokens j RECENT .. (j + 1) RECENT - 1 read keys and values before position
(j - 1) RECENT from their bits, and the 1 to 2 RECENT - 1 before their own as they are. So every
chunking of a text gives the same output. Departures from the paper, whose keys wait 0 to 127 tokens
and whose values wait 128: both wait alike here, at least 128; a prompt is read as it is written on,
with rounded keys, where the paper rounds after the prompt. s and z are float16, as there.

Keys are rounded as their position scheme caches them: rotated in a plain rotary model, as in the
paper; before any rotation under an extension, which may rotate a key to several positions (so does
Hooper 2024, KVQuant, section 3.2, arXiv 2401.18079). Where a scheme evicts tokens, a group's s and
z are of those that are cached when it is rounded.

Only memory is saved: each call restores what it reads, one layer at a time.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from zoo.errors import refuse
from zoo.mixers.parts import KeyValues, grow
from zoo.ops.attention import Part
from zoo.positions.base import CrossLayer, Positions

CacheBits = Literal["int8", "int4"]
GROUP = 32  # tokens or channels that share a scale
RECENT = 128  # tokens that are not rounded, at least
FLOAT16 = torch.finfo(torch.float16)


class QuantizedKeyValues(NamedTuple):
    """Keys and values of `m` tokens in bits, and those of the `n` tokens after them as they are."""

    k: Float[Tensor, "b n h d"]
    v: Float[Tensor, "b n h d"]
    k_bits: UInt8[Tensor, "b m h bytes"]
    k_scales: Float[Tensor, "b groups h d 2"]  # s and z
    v_bits: UInt8[Tensor, "b m h bytes"]
    v_scales: Float[Tensor, "b m h groups 2"]
    tokens_seen: int


def quantize(x: Float[Tensor, "*rows n"], levels: int) -> tuple[Tensor, Tensor]:
    """Return the codes 0 .. levels of x, each row rounded for itself, and its s and z, (*rows, 2).

    They are float16; what exceeds its range is cut to it.
    """
    wide = x.float().clamp(FLOAT16.min, FLOAT16.max)
    low, high = wide.aminmax(dim=-1)
    scale = ((high - low) / levels).clamp(2.0**-24, FLOAT16.max).half()
    zero = low.half()
    codes = (wide - zero.float()[..., None]) / scale.float()[..., None]
    return codes.round_().clamp_(0, levels).to(torch.uint8), torch.stack([scale, zero], -1)


def restore(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that codes (*rows, n) stand for, with the s and z of their rows."""
    scale, zero = scales.float().unbind(-1)
    return torch.addcmul(zero[..., None], codes.float(), scale[..., None]).to(dtype)


class QuantizedCache:
    """How an attention layer reads from a cache of so few bits.

    Args:
        bits: of a key's or value's channel.
        positions: the layer's position scheme, which attends and evicts.
        heads, head_width: of keys and values.
    """

    def __init__(
        self, bits: CacheBits, positions: Positions, *, heads: int, head_width: int
    ) -> None:
        if bits == "int4" and head_width % 2:
            rule = f"packs channels in pairs, and heads have {head_width}"
            refuse("kv_cache", bits, rule, "Use kv_cache=int8.")
        self.bits, self.positions, self.heads, self.head_width = bits, positions, heads, head_width
        self.levels = 15 if bits == "int4" else 255
        self.channels = GROUP if head_width % GROUP == 0 else head_width  # of a value's group

    def empty(self, state: KeyValues) -> QuantizedKeyValues:
        """Return the state before the first token; `state` is that of plain numbers."""
        b, h, d = len(state.k), self.heads, self.head_width
        none = state.k.new_empty
        bits = none((b, 0, h, d // 2 if self.bits == "int4" else d), dtype=torch.uint8)
        k_scales = none((b, 0, h, d, 2), dtype=torch.float16)
        v_scales = none((b, 0, h, d // self.channels, 2), dtype=torch.float16)
        return QuantizedKeyValues(state.k, state.v, bits, k_scales, bits, v_scales, 0)

    def state_bytes(self, tokens: int, batch: int, item: int) -> int:
        """Return the bytes of a state after so many tokens; recent numbers have `item` each."""
        cached = self._cached(tokens)
        old = cached[cached < _boundary(tokens)]
        codes = self.head_width // 2 if self.bits == "int4" else self.head_width
        groups = len((old // GROUP).unique()) * self.head_width
        groups += len(old) * self.head_width // self.channels
        recent = (len(cached) - len(old)) * self.head_width * item
        return 2 * batch * self.heads * (len(old) * codes + 2 * groups + recent)

    def attend(
        self,
        q: Float[Tensor, "b t h d"],
        k: Float[Tensor, "b t g d"],
        v: Float[Tensor, "b t g d"],
        state: QuantizedKeyValues,
        cross_layer: CrossLayer | None,
        sinks: Sequence[Part],
        backend: str,
    ) -> tuple[Float[Tensor, "b t h d"], QuantizedKeyValues]:
        """Return the attention of a chunk's queries, and the state after the chunk.

        Args:
            q, k, v: as `Positions.prepare` left them.
            sinks: as in `Positions.attend`, for the chunk's queries.
        """
        first, last, outs = state.tokens_seen, state.tokens_seen + q.shape[1], []
        past_k, past_v = self._restored(state, k.dtype)
        for start, stop in _blocks(first, last):
            rows = slice(start - first, stop - first)
            past_k, past_v = grow(past_k, k[:, rows]), grow(past_v, v[:, rows])
            sink_parts = [part._replace(q=part.q[:, rows]) for part in sinks]
            args = q[:, rows], past_k, past_v, start, cross_layer
            outs.append(self.positions.attend(*args, sinks=sink_parts, backend=backend))
            past_k, past_v = self.positions.evict(past_k, past_v)
            state = self._evicted(state, start, stop)
            if stop % RECENT == 0 and _boundary(stop):
                state = self._rounded(state, past_k, past_v, stop)
        y = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
        old = state.k_bits.shape[1]
        recent = [x[:, old:].clone() for x in (past_k, past_v)]  # a view would keep all of them
        return y, state._replace(k=recent[0], v=recent[1], tokens_seen=last)

    def _cached(self, tokens: int) -> Tensor:
        """Return the positions that are cached after so many tokens: sinks and the last ones."""
        count, pattern = self.positions.cached(tokens), self.positions.pattern
        sinks = min(pattern.sinks if pattern is not None else 0, count)
        last = torch.arange(tokens - (count - sinks), tokens)
        return torch.cat([torch.arange(sinks), last])

    def _restored(self, state: QuantizedKeyValues, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return all cached keys and values as numbers."""
        old = self._cached(state.tokens_seen)[: state.k_bits.shape[1]]
        if not len(old):
            return state.k.to(dtype), state.v.to(dtype)
        k_codes, v_codes = (self._unpacked(x) for x in (state.k_bits, state.v_bits))
        groups = (old // GROUP).unique_consecutive(return_inverse=True)[1].to(k_codes.device)
        k = restore(k_codes[..., None], state.k_scales[:, groups], dtype).squeeze(-1)
        v = restore(v_codes.unflatten(-1, (-1, self.channels)), state.v_scales, dtype).flatten(-2)
        return torch.cat([k, state.k.to(dtype)], 1), torch.cat([v, state.v.to(dtype)], 1)

    def _evicted(self, state: QuantizedKeyValues, start: int, stop: int) -> QuantizedKeyValues:
        """Drop the codes of tokens that were evicted after `start` and up to `stop` tokens."""
        if self.positions.cached(stop) == stop or not state.k_bits.shape[1]:
            return state
        old = self._cached(start)[: state.k_bits.shape[1]]
        left = torch.isin(old, self._cached(stop))
        if left.all():
            return state
        groups = torch.isin((old // GROUP).unique(), (old[left] // GROUP).unique())
        left, groups = (x.nonzero()[:, 0].to(state.k_bits.device) for x in (left, groups))
        codes = {name: getattr(state, name)[:, left] for name in ("k_bits", "v_bits", "v_scales")}
        return state._replace(k_scales=state.k_scales[:, groups], **codes)

    def _rounded(
        self, state: QuantizedKeyValues, past_k: Tensor, past_v: Tensor, tokens: int
    ) -> QuantizedKeyValues:
        """Round the tokens that are old after so many, in the past in place, and in the state."""
        cached, first, last = self._cached(tokens), _boundary(tokens) - RECENT, _boundary(tokens)
        for group in range(first // GROUP, last // GROUP):
            rows = (cached // GROUP == group).nonzero()[:, 0].to(past_k.device)
            if not len(rows):
                continue
            k_codes, k_scales = quantize(past_k[:, rows].movedim(1, -1), self.levels)
            past_k[:, rows] = restore(k_codes, k_scales, past_k.dtype).movedim(-1, 1)
            by_token = past_v[:, rows].unflatten(-1, (-1, self.channels))
            v_codes, v_scales = quantize(by_token, self.levels)
            past_v[:, rows] = restore(v_codes, v_scales, past_v.dtype).flatten(-2)
            state = state._replace(
                k_bits=grow(state.k_bits, self._packed(k_codes.movedim(-1, 1))),
                k_scales=grow(state.k_scales, k_scales[:, None]),
                v_bits=grow(state.v_bits, self._packed(v_codes.flatten(-2))),
                v_scales=grow(state.v_scales, v_scales),
            )
        return state

    def _packed(self, codes: UInt8[Tensor, "*rows d"]) -> UInt8[Tensor, "*rows bytes"]:
        """Return codes as the state has them: two in a byte where they have 4 bits."""
        if self.bits == "int8":
            return codes
        first, second = codes.chunk(2, -1)
        return first | (second << 4)

    def _unpacked(self, codes: UInt8[Tensor, "*rows bytes"]) -> UInt8[Tensor, "*rows d"]:
        return codes if self.bits == "int8" else torch.cat([codes & 15, codes >> 4], -1)


def _boundary(tokens: int) -> int:
    """Return how many tokens are old for the query after so many."""
    return max(tokens // RECENT - 1, 0) * RECENT


def _blocks(first: int, last: int) -> list[tuple[int, int]]:
    """Return the tokens first .. last - 1 cut at the multiples of RECENT."""
    edges = [first, *range((first // RECENT + 1) * RECENT, last, RECENT), last]
    return [*pairwise(edges)]
