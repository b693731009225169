"""Averages of the Attention Free Transformer (Zhai 2021, section 3), causal, per channel:

    y_t = sum_{t' <= t} e^{k_t' + w_{t,t'}} v_t' / sum_{t' <= t} e^{k_t' + w_{t,t'}}

`aft` has w = 0 (AFT-simple): it is WKV without decay and bonus, and runs on it. `aft_window` has
a w for the last s tokens and 0 beyond (AFT-conv where w depends on t - t' alone, AFT-local where it
does not): the last tokens one by one and a running average of the rest. `aft_full` has a w for
every pair: quadratic, in tiles.

Backends of `aft_window`: `reference` is the definition, query by query; `torch` does blocks of
queries at once, in pieces recomputed in the backward; `native` is kernels/aft (CPU and CUDA,
AFT-conv).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.exponential_sums import Sums, average, causal_sums, dense_sums
from zoo.ops.runtime import cpu as native
from zoo.ops.runtime import cuda
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.dispatch import select_backend
from zoo.ops.wkv4 import LOG_ZERO, empty_average, running_averages, wkv4

KERNEL = native.CpuKernel(
    "aft/aft.c",
    sizes="batch tokens before width 1<=window<=most",
    rows={
        "k v": "batch tokens width",
        "y dy": "batch tokens-before width",
        "dk dv": "batch tokens width",
    },
    pointers={
        "m": "window+1 width",
        "state last": "batch 3 width",
        "saved": "batch width/lanes tokens-before/chunk 3 lanes",
        "dm": "batch window+1 width",
        "dstate": "batch 3 width",
    },
    outputs="y last saved dk dv dm dstate",
)
CUDA = cuda.CudaKernel(
    "aft/aft.cu",
    sizes="batch tokens before width window chunks run",
    rows="k v",
    sequences="y dy dk dv",
    pointers="m state last edges read ahead dm dlast dstate",
)
SHAPES = {"k": "b t d", "v": "* d", "w": "rows heads s"}
SHAPES |= {"state": "b 3 d?", "state.k": "b n d?", "state.v": "b n d?"}
TILE, TILES_PER_CHUNK = 8, 8  # of the CUDA kernel: tokens of a tile, tiles of a chunk
MAX_WARPS = 32  # that share its composition
MAX_BLOCKS = 4096  # about, that walk: several times what a device runs at once, and each keeps dm
MIN_BLOCK = 32  # queries at least of a block of the torch form
CHUNK_TOKENS = 1024  # tokens it holds intermediate tensors for
TILE_QUERIES = 128  # queries of a tile of `aft_full`
MAX_WINDOW = 128  # tokens in the kernels' window


def aft(
    k: Float[Tensor, "b t d"],
    v: Float[Tensor, "b t d"],
    bias: Float[Tensor, "#b t #d"] | None = None,
    state: Float[Tensor, "b 3 d"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b 3 d"]]:
    """The average of all v so far, weighted by e^{k + bias}. Backends and state are `wkv4`'s."""
    if bias is not None:
        k = k + bias.to(torch.promote_types(k.dtype, torch.float32))
    none = k.new_zeros(k.shape[-1])
    return wkv4(k, v, none, none, state, backend)


class Window(NamedTuple):
    """The running average of older tokens, as of `wkv4`, and the last s - 1 keys and values."""

    older: Float[Tensor, "b 3 d"]
    k: Float[Tensor, "b n d"]
    v: Float[Tensor, "b n d"]


def aft_window(
    k: Float[Tensor, "b t d"],
    v: Float[Tensor, "b t d"],
    w: Float[Tensor, "#t h s"],
    state: Window | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Window]:
    """w[t, h, i] weighs the token i before t in the channels of head h; beyond s tokens it is 0.

    One w for all t is AFT-conv. The state's average is float32 or better; its keys and values are
    of k's and v's dtype. Linear in t. Raises `ValueError` on shapes that do not fit, `UserError`
    where the backend is not there.
    """
    check("aft_window", SHAPES, k, v, w, *(state or (None,) * 3))
    (b, t, d), (rows, heads, s) = k.shape, w.shape
    fits = rows in (1, t) and heads and d % heads == 0 and s >= 1 and t >= 1
    if v.shape != k.shape or not fits:
        raise ValueError(
            f"aft_window: k {tuple(k.shape)}, v {tuple(v.shape)} and w {tuple(w.shape)} do not fit"
        )
    if state is not None and state.k.shape[1] >= s:
        raise ValueError(f"aft_window: {state.k.shape[1]} keys before those of a window of {s}")
    fits = rows == 1 and s <= MAX_WINDOW
    row = torch.promote_types(k.dtype, v.dtype)
    here = fits and cuda.native_here(KERNEL, CUDA, k.device, row, partial(_macros, s=s))
    name = select_backend("aft_window", backend, {"native": here, "torch": True, "reference": True})
    wide = torch.promote_types(k.dtype, torch.float32)
    if state is None:
        keys, values, older = k, v, empty_average(k, b, d)
    else:
        keys = torch.cat([state.k.to(k.dtype), k], 1)
        values, older = torch.cat([state.v.to(v.dtype), v], 1), state.older
    kept = max(0, keys.shape[1] - (s - 1))
    form = {"native": _native, "torch": _torch, "reference": _reference}[name]
    if not (name == "native" and k.device.type == "cuda"):  # that reads narrow types itself
        row = wide
    with torch.autocast(k.device.type, enabled=False):
        y, older = form(keys.to(row), values.to(row), w.to(wide), older.to(wide), t)
    return y.to(v.dtype), Window(older, keys[:, kept:], values[:, kept:])


def absorb(
    state: Float[Tensor, "b 3 d"], k: Float[Tensor, "b t d"], v: Float[Tensor, "b t d"]
) -> Float[Tensor, "b 3 d"]:
    """The running average after more tokens."""
    if not k.shape[1]:
        return state
    top = torch.maximum(state[:, 2], k.amax(1))
    e = torch.exp(k - top[:, None])
    sums = torch.stack([(e * v).sum(1), e.sum(1)], 1)
    past = torch.exp(state[:, 2] - top)[:, None] * state[:, :2]
    return torch.cat([past + sums, top[:, None]], 1)


def _reference(k, v, w, older, t: int) -> tuple[Tensor, Tensor]:
    """The definition, for each of the last t tokens."""
    s, channels, ys, gone = w.shape[-1], k.shape[-1] // w.shape[1], [], 0
    for end, w_t in zip(
        range(k.shape[1] - t + 1, k.shape[1] + 1), w.expand(t, -1, -1).unbind(), strict=True
    ):
        first = max(0, end - s)
        older, gone = absorb(older, k[:, gone:first], v[:, gone:first]), first
        near = w_t[:, : end - first].flip(1).t().repeat_interleave(channels, 1)
        exponents = k[:, first:end] + near
        top = torch.maximum(older[:, 2], exponents.amax(1))
        past, e = torch.exp(older[:, 2] - top), torch.exp(exponents - top[:, None])
        numerator = past * older[:, 0] + (e * v[:, first:end]).sum(1)
        ys.append(numerator / (past * older[:, 1] + e.sum(1)))
    kept = max(gone, k.shape[1] - (s - 1))
    return torch.stack(ys, 1), absorb(older, k[:, gone:kept], v[:, gone:kept])


def _torch(k, v, w, older, t: int) -> tuple[Tensor, Tensor]:
    """The last t tokens in blocks that see themselves, the tokens before and what is older.

    Each block but the first has a whole block before it; that of one block alone is as long as it
    comes.
    """
    (_, n, d), s = k.shape, w.shape[-1]
    kept = max(0, n - (s - 1))
    last = absorb(older, k[:, :kept], v[:, :kept])
    size = min(_power_of_two(max(s - 1, MIN_BLOCK)), _power_of_two(t))
    blocks = -(-t // size)
    before = size if blocks > 1 else n - t
    pad = (0, 0, before - (n - t), blocks * size - t)
    k, v = F.pad(k, pad, value=LOG_ZERO), F.pad(v, pad)
    weights = _block_weights(w, size, before)

    now = [x[:, before:].unflatten(1, (blocks, size)) for x in (k, v)]
    past = [x[:, : before + (blocks - 1) * size].unflatten(1, (blocks, before)) for x in (k, v)]
    many = max(1, CHUNK_TOKENS // size)
    pieces = [weights] * -(-blocks // many) if len(weights) == 1 else weights.split(many)
    ys = []
    for *parts, weights in zip(*(x.split(many, 1) for x in (*now, *past)), pieces, strict=True):
        y, older = checkpoint(
            _blocks, *parts, weights, older, use_reentrant=False, preserve_rng_state=False
        )
        ys.append(y)
    return torch.cat(ys, 1).reshape(len(k), -1, d)[:, :t], last


def _block_weights(w: Tensor, size: int, before: int) -> Tensor:
    """w of each block's queries over the `before` keys before it and its own: (n|1, h, q, keys)."""
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


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _native(k, v, w, older, t: int) -> tuple[Tensor, Tensor]:
    w = F.pad(w[0], (0, 1))  # what is older than the window has w = 0
    weights = torch.exp(w - w.detach().amax(1, keepdim=True))
    m = weights.t().repeat_interleave(k.shape[-1] // len(w), 1)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, m, older))
    y, last, _ = window(k, v, m, older, t, save)
    return y, last


def _saved_shape(k: Tensor, t: int, s: int) -> tuple[int, ...]:
    """The older tokens' state before each chunk, (b, channel blocks, chunks, 3, lanes) on the CPU;
    (b, chunks + 1, 3, d) on CUDA, the last state at the end."""
    b, _, d = k.shape
    if k.device.type == "cuda":
        return b, _chunks(t, s) + 1, 3, d
    lanes, chunk = (KERNEL.constant(name, k.dtype) for name in ("lanes", "chunk"))
    return b, -(-d // lanes), -(-t // chunk), 3, lanes


@torch.library.custom_op("zoo::aft_window", mutates_args=(), device_types="cpu")
def window(
    k: Tensor, v: Tensor, m: Tensor, state: Tensor, t: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y of the last t tokens, the last state of those older than the window, and the chunk starts
    the backward pass needs (empty unless `save`). m (s + 1, d) weighs them, e^w."""
    b, n, d = k.shape
    y, last = torch.empty((b, t, d), dtype=k.dtype), torch.empty(state.shape, dtype=k.dtype)
    saved = torch.empty(_saved_shape(k, t, len(m) - 1) if save else 0, dtype=k.dtype)
    outputs = {"y": y, "last": last, "saved": saved if save else None}
    KERNEL.call("forward", (b, n, n - t, d, len(m) - 1), k=k, v=v, m=m, state=state, **outputs)
    return y, last, saved


@window.register_fake
def _(k, v, m, state, t, save):
    del v
    saved = m.new_empty(_saved_shape(k, t, len(m) - 1) if save else 0)
    return k.new_empty((k.shape[0], t, k.shape[2])), state.new_empty(state.shape), saved


@torch.library.custom_op("zoo::aft_window_backward", mutates_args=(), device_types="cpu")
def window_backward(
    dy: Tensor, dlast: Tensor | None, k: Tensor, v: Tensor, m: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, m and the incoming state."""
    (b, n, d), t = k.shape, dy.shape[1]
    dk, dv = torch.empty(k.shape, dtype=k.dtype), torch.empty(k.shape, dtype=k.dtype)
    dm = torch.empty((b, *m.shape), dtype=k.dtype)
    dstate = torch.zeros((b, 3, d), dtype=k.dtype) if dlast is None else dlast.contiguous().clone()
    outputs = {"dk": dk, "dv": dv, "dm": dm, "dstate": dstate}
    sizes = (b, n, n - t, d, len(m) - 1)
    KERNEL.call("backward", sizes, k=k, v=v, m=m, dy=dy, saved=saved, **outputs)
    return dk, dv, dm.sum(0), dstate


@window_backward.register_fake
def _(dy, dlast, k, v, m, saved):
    del dy, dlast, saved
    dk, dv, dm = (a.new_empty(a.shape) for a in (k, v, m))
    return dk, dv, dm, m.new_empty((k.shape[0], 3, k.shape[2]))


def _tiles(s: int) -> int:
    """Tiles before its own in which a query may have tokens of its window."""
    return -(-(s - 1) // TILE)


def _macros(dtype: torch.dtype, s: int) -> cuda.Macros:
    return ("DTYPE", cuda.DTYPES[dtype]), ("TILES", _tiles(s))


def _chunks(t: int, s: int) -> int:
    """Chunks of keys: those of queries begin as many tiles later as a query sees."""
    return -(-(-(-t // TILE) + _tiles(s)) // TILES_PER_CHUNK)


def _channels(s: int) -> int:
    """Of a thread block: fewer where the window takes much of its shared memory."""
    return 64 if _tiles(s) <= 4 else 32


def _walks(k: Tensor, t: int, s: int) -> tuple[int, int]:
    """Parts of the time of the queries, and the chunks of each part."""
    chunks = -(-t // (TILE * TILES_PER_CHUNK))
    run = -(-len(k) * chunks * -(-k.shape[2] // _channels(s)) // MAX_BLOCKS)
    return -(-chunks // run), run


def _launch(function: str, k: Tensor, t: int, s: int, parts: int, **tensors: Tensor | None) -> None:
    """`parts` of time, or the composition of the chunks where that is zero."""
    b, n, d = k.shape
    chunks, run = _chunks(t, s), _walks(k, t, s)[1]
    sizes = {"batch": b, "tokens": n, "before": n - t, "width": d, "window": s}
    sizes |= {"chunks": chunks, "run": run}
    threads = channels = _channels(s)
    if not parts:
        threads, channels = cuda.WARP * min(MAX_WARPS, chunks), cuda.WARP
    grid = (b * max(parts, 1) * -(-d // channels), 1, 1)
    CUDA.call(function, grid, threads, _macros(k.dtype, s), sizes, k=cuda.dense(k), **tensors)


def _all_weights(m: Tensor) -> Tensor:
    """m of every distance within the tiles a query sees, and beyond."""
    s = len(m) - 1
    rows = TILE * _tiles(s) + 2
    return torch.cat([m, m[-1:].expand(rows - len(m), -1)])


@window.register_kernel("cuda")
def _window_cuda(
    k: Tensor, v: Tensor, m: Tensor, state: Tensor, t: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (b, _, d), s = k.shape, len(m) - 1
    y, last = k.new_empty((b, t, d)), m.new_empty(state.shape)
    chunks = _chunks(t, s)
    edges = m.new_empty(_saved_shape(k, t, s)) if save or chunks > 1 else None
    tensors = {"v": cuda.dense(v), "m": _all_weights(m), "state": state.contiguous()}
    tensors["edges"] = edges
    if chunks > 1:  # nobody asks what is after the last
        _launch("chunk_sums", k, t, s, chunks - 1, **tensors)
    if edges is not None:
        _launch("compose", k, t, s, 0, **tensors)
    _launch("outputs", k, t, s, _walks(k, t, s)[0], **tensors, y=y, last=last)
    return y, last, edges if save and edges is not None else m.new_empty(0)


@window_backward.register_kernel("cuda")
def _window_backward_cuda(
    dy: Tensor, dlast: Tensor | None, k: Tensor, v: Tensor, m: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, _, d), t, s = k.shape, dy.shape[1], len(m) - 1
    chunks, walks, weights = _chunks(t, s), _walks(k, t, s)[0], _all_weights(m)
    dk, dv, dstate = k.new_empty(k.shape), k.new_empty(k.shape), m.new_empty((b, 3, d))
    dm = m.new_empty((b, walks, *weights.shape))
    tensors = {"v": cuda.dense(v), "m": weights, "edges": saved, "dy": dy.contiguous()}
    tensors |= {"read": m.new_empty((b, t, 2, d)), "ahead": m.new_empty((b, chunks, 2, d))}
    tensors["dlast"] = None if dlast is None else dlast.contiguous()
    _launch("reads", k, t, s, walks, **tensors, dm=dm)
    _launch("compose_back", k, t, s, 0, **tensors, dstate=dstate)
    _launch("gradients", k, t, s, chunks, **tensors, dk=dk, dv=dv)
    dm = dm.sum((0, 1))
    return dk, dv, torch.cat([dm[:s], dm[s:].sum(0, keepdim=True)]), dstate


def _save(ctx, inputs, output) -> None:
    k, v, m, _, ctx.t, ctx.save = inputs
    ctx.save_for_backward(k, v, m, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dlast, _):
    if not ctx.save:
        raise RuntimeError("aft_window: the forward was told to save nothing for a backward")
    k, v, m, saved = ctx.saved_tensors
    dy = k.new_zeros((k.shape[0], ctx.t, k.shape[2])) if dy is None else dy
    return *window_backward(dy, dlast, k, v, m, saved), None, None


window.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.aft_window)
def _flops(
    k: torch.Size, v: torch.Size, m: torch.Size, state: Any, t: int, *_: Any, **__: Any
) -> int:
    """A product and a sum for numerator and denominator and each weight; exponentials besides."""
    del v, state
    return (4 * m[0] + 15) * k[0] * t * k[2]


def aft_full(
    k: Float[Tensor, "b n d"],
    v: Float[Tensor, "b n d"],
    left: Float[Tensor, "t r"],
    right: Float[Tensor, "n r"],
) -> Float[Tensor, "b t d"]:
    """The last t of n tokens, with w = left right^T. Time t n, memory linear."""
    if left.shape[0] > k.shape[1] or right.shape[0] != k.shape[1] or v.shape != k.shape:
        raise ValueError(
            f"aft_full: k {tuple(k.shape)}, v {tuple(v.shape)}, left {tuple(left.shape)} and right "
            f"{tuple(right.shape)} do not fit"
        )
    t, wide = len(left), torch.promote_types(k.dtype, torch.float32)
    size = min(TILE_QUERIES, _power_of_two(t))
    short = -t % size
    with torch.autocast(k.device.type, enabled=False):
        keys = F.pad(k.to(wide), (0, 0, 0, short), value=LOG_ZERO)
        values = F.pad(v.to(wide), (0, 0, 0, short))
        left, right = (F.pad(x.to(wide), (0, 0, 0, short)) for x in (left, right))
        ys, end = [], k.shape[1] - t
        for rows in left.split(size):
            end += size
            y = checkpoint(
                _rows, rows, right[:end], keys[:, :end], values[:, :end],
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            ys.append(y)
    return torch.cat(ys, 1)[:, :t].to(v.dtype)


def _rows(left: Tensor, right: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last queries over all keys: those before them are a square, their own a triangle."""
    w, past = left @ right.t(), len(right) - len(left)
    parts = [causal_sums(w[:, past:], k[:, past:], v[:, past:])]
    if past:
        parts.append(dense_sums(w[:, :past], k[:, :past], v[:, :past]))
    return average(parts)
