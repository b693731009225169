"""Computes the causal averages of the Attention Free Transformer (Zhai 2021, section 3):

    y_t = sum_{t' <= t} e^{k_t' + w_{t,t'}} v_t' / sum_{t' <= t} e^{k_t' + w_{t,t'}}     per channel

`aft` has w = 0 (AFT-simple): it is WKV without decay and bonus, and runs on it. `aft_window` has
a w for the last s tokens and 0 beyond (AFT-conv where w depends on t - t' alone, AFT-local where it
does not): the last tokens one by one and a running average of the rest. `aft_full`, with a w for
every pair, is in `zoo.ops.aft_full`.

Backends of `aft_window`: `reference` is the definition, query by query; `torch` computes blocks of
queries at once, in chunks recomputed in the backward; `native` is kernels/aft (AFT-conv, CPU and
CUDA), called in `zoo.ops.aft_kernel`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.ops.aft_kernel import MAX_WINDOW, WINDOW, window_macros
from zoo.ops.dtypes import wide_dtype
from zoo.ops.exponential_sums import Sums, average, causal_sums, dense_sums
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.dispatch import select_backend
from zoo.ops.runtime.native_op import common_dtype, compute_dtypes
from zoo.ops.runtime.sizes import ceil_div, next_power_of_two
from zoo.ops.wkv4 import LOG_ZERO, empty_average, running_averages, wkv4

SHAPES = {"k": "b t>0 d", "v": "* d", "w": "rows heads s"}
SHAPES |= {"state": "b 3 d?", "state.k": "b n d?", "state.v": "b n d?"}
MIN_BLOCK = 32  # queries of a block of the torch form
CHUNK_TOKENS = 1024  # tokens it holds intermediate tensors for


def aft(
    k: Float[Tensor, "b t d"],
    v: Float[Tensor, "b t d"],
    bias: Float[Tensor, "#b t #d"] | None = None,
    state: Float[Tensor, "b 3 d"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b 3 d"]]:
    """Average all v so far, weighted by e^{k + bias}. Backends and state are `wkv4`'s."""
    if bias is not None:
        k = k + bias.to(wide_dtype(k))
    none = k.new_zeros(k.shape[-1])
    return wkv4(k, v, none, none, state, backend)


class AFTWindow(NamedTuple):
    """Holds `wkv4`'s running average of older tokens, and the last s - 1 keys and values."""

    older: Float[Tensor, "b 3 d"]
    k: Float[Tensor, "b n d"]
    v: Float[Tensor, "b n d"]


def aft_window(
    k: Float[Tensor, "b t d"],
    v: Float[Tensor, "b t d"],
    w: Float[Tensor, "#t h s"],
    state: AFTWindow | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], AFTWindow]:
    """Average v by e^{k + w}; w[t, h, i] is for the token i before t in the channels of head h.

    Beyond s tokens w is 0. One w for all t is AFT-conv. The state's average is float32 or better;
    its keys and values are of k's and v's dtype. Linear in t. Raises `ValueError` on shapes that do
    not fit, `UserError` where the backend is not available.
    """
    check("aft_window", SHAPES, k, v, w, *(state or (None,) * 3))
    (b, t, d), (rows, heads, s) = k.shape, w.shape
    fits = rows in (1, t) and heads and d % heads == 0 and s >= 1
    if v.shape != k.shape or not fits:
        raise ValueError(
            f"aft_window: k {tuple(k.shape)}, v {tuple(v.shape)} and w {tuple(w.shape)} do not fit"
        )
    if state is not None and state.k.shape[1] >= s:
        raise ValueError(f"aft_window: {state.k.shape[1]} keys before those of a window of {s}")
    fits = rows == 1 and s <= MAX_WINDOW
    here = fits and WINDOW.available(k.device, common_dtype(k, v), window_macros(s))
    name = select_backend("aft_window", backend, {"native": here, "torch": True, "reference": True})
    row, wide = compute_dtypes(name, k, v)
    if state is None:
        keys, values, older = k, v, empty_average(k, b, d)
    else:
        keys = torch.cat([state.k.to(k.dtype), k], 1)
        values, older = torch.cat([state.v.to(v.dtype), v], 1), state.older
    cached_from = max(0, keys.shape[1] - (s - 1))
    form = {"native": _native, "torch": _torch, "reference": _reference}[name]
    with torch.autocast(k.device.type, enabled=False):
        y, older = form(keys.to(row), values.to(row), w.to(wide), older.to(wide), t)
    return y.to(v.dtype), AFTWindow(older, keys[:, cached_from:], values[:, cached_from:])


def absorb(
    state: Float[Tensor, "b 3 d"], k: Float[Tensor, "b t d"], v: Float[Tensor, "b t d"]
) -> Float[Tensor, "b 3 d"]:
    """Return the running average after more tokens."""
    if not k.shape[1]:
        return state
    top = torch.maximum(state[:, 2], k.amax(1))
    e = torch.exp(k - top[:, None])
    sums = torch.stack([(e * v).sum(1), e.sum(1)], 1)
    past = torch.exp(state[:, 2] - top)[:, None] * state[:, :2]
    return torch.cat([past + sums, top[:, None]], 1)


def _reference(k, v, w, older, t: int) -> tuple[Tensor, Tensor]:
    """Compute the definition, for each of the last t tokens."""
    s, channels, ys, gone = w.shape[-1], k.shape[-1] // w.shape[1], [], 0
    for end, w_t in zip(
        range(k.shape[1] - t + 1, k.shape[1] + 1), w.expand(t, -1, -1).unbind(), strict=True
    ):
        first = max(0, end - s)
        older, gone = absorb(older, k[:, gone:first], v[:, gone:first]), first
        weights = w_t[:, : end - first].flip(1).t().repeat_interleave(channels, 1)
        exponents = k[:, first:end] + weights
        top = torch.maximum(older[:, 2], exponents.amax(1))
        past, e = torch.exp(older[:, 2] - top), torch.exp(exponents - top[:, None])
        numerator = past * older[:, 0] + (e * v[:, first:end]).sum(1)
        ys.append(numerator / (past * older[:, 1] + e.sum(1)))
    cached_from = max(gone, k.shape[1] - (s - 1))
    return torch.stack(ys, 1), absorb(older, k[:, gone:cached_from], v[:, gone:cached_from])


def _torch(k, v, w, older, t: int) -> tuple[Tensor, Tensor]:
    """Compute the last t tokens in blocks, which see themselves, the one before and what is older.

    A block alone has all tokens of the window before it.
    """
    (_, n, d), s = k.shape, w.shape[-1]
    cached_from = max(0, n - (s - 1))
    last = absorb(older, k[:, :cached_from], v[:, :cached_from])
    size = min(next_power_of_two(max(s - 1, MIN_BLOCK)), next_power_of_two(t))
    blocks = ceil_div(t, size)
    before = size if blocks > 1 else n - t
    pad = (0, 0, before - (n - t), blocks * size - t)
    k, v = F.pad(k, pad, value=LOG_ZERO), F.pad(v, pad)
    weights = _block_weights(w, size, before)

    now = [x[:, before:].unflatten(1, (blocks, size)) for x in (k, v)]
    past = [x[:, : before + (blocks - 1) * size].unflatten(1, (blocks, before)) for x in (k, v)]
    many = max(1, CHUNK_TOKENS // size)
    chunks = [weights] * ceil_div(blocks, many) if len(weights) == 1 else weights.split(many)
    ys = []
    for *parts, weights in zip(*(x.split(many, 1) for x in (*now, *past)), chunks, strict=True):
        y, older = checkpoint(
            _blocks, *parts, weights, older, use_reentrant=False, preserve_rng_state=False
        )
        ys.append(y)
    return torch.cat(ys, 1).reshape(len(k), -1, d)[:, :t], last


def _block_weights(w: Tensor, size: int, before: int) -> Tensor:
    """Return (n|1, h, q, keys): w of each block's queries over the keys before it and its own."""
    length = before + size
    distance = before + torch.arange(size, device=w.device)[:, None]
    distance = (distance - torch.arange(length, device=w.device)).clamp(min=0)
    w = F.pad(w[..., :length], (0, length - min(length, w.shape[-1])))
    rows = w.expand(size, -1, -1) if len(w) == 1 else F.pad(w, (0, 0) * 2 + (0, -len(w) % size))
    w = rows.unflatten(0, (-1, size))
    index = distance[None, :, None].expand(*w.shape[:-1], length)
    return w.gather(-1, index).transpose(1, 2)


def _blocks(k, v, past_k, past_v, w, older) -> tuple[Tensor, Tensor]:
    """k, v (b, n, q, d), the keys before each block, w (n|1, h, q, keys), what is older still."""
    heads, before = w.shape[1], past_k.shape[2]
    split = [x.unflatten(-1, (heads, -1)).transpose(2, 3) for x in (k, v, past_k, past_v)]
    parts = [causal_sums(w[..., before:], *split[:2])]
    if before:
        parts.append(dense_sums(w[..., :before], *split[2:]))
        top = past_k.detach().amax(2)
        e = torch.exp(past_k - top[:, :, None])
        sums = torch.stack([(e * past_v).sum(2), e.sum(2)], 2)
        sums, top, after = running_averages(sums, top, older.new_zeros(older.shape[-1]), older)
    else:
        sums, top, after = older[:, None, :2], older[:, None, 2], older
    sums = sums.unflatten(-1, (heads, -1)).transpose(2, 3)[:, :, :, None]
    parts.append(Sums(sums, top.unflatten(-1, (heads, 1, -1))))
    return average(parts).transpose(2, 3).flatten(-2), after


def _native(k, v, w, older, t: int) -> tuple[Tensor, Tensor]:
    w = F.pad(w[0], (0, 1))  # what is older than the window has w = 0
    weights = torch.exp(w - w.detach().amax(1, keepdim=True))
    m = weights.t().repeat_interleave(k.shape[-1] // len(w), 1)
    y, last = WINDOW(k, v, m, older, k.shape[1] - t)
    return y, last
