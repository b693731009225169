"""WKV, the weighted average of RWKV-4 (Peng 2023, section 3.1.2).

    y_t = (N_{t-1} + e^{u+k_t} v_t) / (D_{t-1} + e^{u+k_t})          per channel
    N_t = e^{-w} N_{t-1} + e^{k_t} v_t
    D_t = e^{-w} D_{t-1} + e^{k_t}

The state is (p, q, o): N = p e^o and D = q e^o, with o the largest exponent in them, so that
nothing overflows. Backends: `reference` is that loop; `torch` does the recurrence over pieces of
tokens at once and keeps only the state before each; `native` is kernels/wkv4 (CPU and CUDA).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.linear_recurrence import linear_scan
from zoo.ops.runtime import cpu as native
from zoo.ops.runtime import cuda
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.dispatch import select_backend

KERNEL = native.CpuKernel(
    "wkv4/wkv4.c",
    sizes="batch tokens width",
    rows={"k v y dy dk dv": "batch tokens width"},
    pointers={
        "w u": "width",
        "state last": "batch 3 width",
        "saved": "batch width/lanes tokens/chunk 4 lanes",
        "dw du": "batch width",
        "dstate": "batch 3 width",
    },
    outputs="y last saved dk dv dw du dstate",
)
CUDA = cuda.CudaKernel(
    "wkv4/wkv4.cu",
    sizes="tokens width chunks",
    rows="k v",
    sequences="y dy dk dv",
    pointers="w u state last edges ahead top dw du dlast dstate",
)
SHAPES = {"k": "b t d", "v": "b t d", "w": "d", "u": "d", "state": "b 3 d?"}
CHUNK, THREADS = 64, 64  # of the CUDA kernel: tokens between saved states, channels of a block
MAX_WARPS = 32  # that share its composition
CHUNK_TOKENS = 1024  # tokens the torch form holds its intermediate tensors for
LOG_ZERO = -1e38  # the maximum over no tokens: e to the power of it is zero beside any token's


def empty_average(like: Tensor, batch: int, width: int) -> Float[Tensor, "b 3 d"]:
    """The state before the first token, in float32 or better."""
    state = like.new_zeros((batch, 3, width), dtype=torch.promote_types(like.dtype, torch.float32))
    state[:, 2] = LOG_ZERO
    return state


def wkv4(
    k: Float[Tensor, "b t d"],
    v: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    u: Float[Tensor, " d"],
    state: Float[Tensor, "b 3 d"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b 3 d"]]:
    """Average v with weights e^k that fade by e^-w a token, w >= 0. Returns y in v's dtype and the
    state.

    All arithmetic and the state are float32, or float64 where k is. Raises `ValueError` on shapes
    that do not fit, `UserError` where the backend is not there.
    """
    check("wkv4", SHAPES, k, v, w, u, state)
    b, t, d = k.shape
    if not t:
        raise ValueError("wkv4: no tokens")
    row = torch.promote_types(k.dtype, v.dtype)
    here = cuda.native_here(KERNEL, CUDA, k.device, row, _macros)
    name = select_backend("wkv4", backend, {"native": here, "torch": True, "reference": True})
    wide = torch.promote_types(k.dtype, torch.float32)
    state = empty_average(k, b, d) if state is None else state
    form = {"native": _native, "torch": _torch, "reference": _reference}[name]
    if not (name == "native" and k.device.type == "cuda"):  # that reads narrow types itself
        row = wide
    y, last = form(k.to(row), v.to(row), *(a.to(wide) for a in (w, u, state)))
    return y.to(v.dtype), last


def _reference(k, v, w, u, state) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    p, q, o = state.unbind(1)
    ys = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
        top = torch.maximum(o, u + k_t)
        past, here = torch.exp(o - top), torch.exp(u + k_t - top)
        ys.append((past * p + here * v_t) / (past * q + here))
        top = torch.maximum(o - w, k_t)
        past, here = torch.exp((o - top) - w), torch.exp(k_t - top)
        p, q, o = past * p + here * v_t, past * q + here, top
    return torch.stack(ys, 1), torch.stack([p, q, o], 1)


def _torch(k, v, w, u, state, chunk: int = CHUNK_TOKENS) -> tuple[Tensor, Tensor]:
    """Piece by chunk; the backward recomputes a chunk from the state before it."""
    ys = []
    for parts in zip(k.split(chunk, 1), v.split(chunk, 1), strict=True):
        y, state = checkpoint(
            _chunk, *parts, w, u, state, use_reentrant=False, preserve_rng_state=False
        )
        ys.append(y)
    return torch.cat(ys, 1), state


def _chunk(k, v, w, u, state) -> tuple[Tensor, Tensor]:
    sums, o, last = running_averages(torch.stack([v, torch.ones_like(v)], 2), k, w, state)
    top = torch.maximum(o, u + k).detach()
    past, here = torch.exp(o - top), torch.exp(u + k - top)
    p, q = sums.unbind(2)
    return (past * p + here * v) / (past * q + here), last


def running_averages(
    sums: Float[Tensor, "b t 2 d"],
    k: Float[Tensor, "b t d"],
    w: Float[Tensor, " d"],
    state: Float[Tensor, "b 3 d"],
) -> tuple[Float[Tensor, "b t 2 d"], Float[Tensor, "b t d"], Float[Tensor, "b 3 d"]]:
    """(p, q) and o before each step of a recurrence that adds `sums` e^k, and the last state.

    N and D do not depend on the o they are written with, so o is a constant to autograd, but for
    the state's at both ends: there the change of p and q with it is made up for.
    """
    t, before, o = k.shape[1], state[:, 2], _running_maximum(k, w, state[:, 2])
    past = torch.cat([before.detach()[:, None], o[:, :-1]], 1)
    start = state[:, :2] * torch.exp(before - before.detach())[:, None]
    decay, added = torch.exp((past - o) - w), torch.exp(k - o)
    after = linear_scan(decay[:, :, None], added[:, :, None] * sums, start)

    steps = torch.arange(t, device=k.device)[:, None]
    index = torch.where(k > past - w, steps, -1).amax(1)  # the token whose k is the last maximum
    latest = k.gather(1, index.clamp(min=0)[:, None]).squeeze(1) - (t - 1 - index) * w
    maximum = torch.where(index < 0, before - t * w, latest)
    last = after[:, -1] * torch.exp(o[:, -1] - maximum)[:, None]
    return (
        torch.cat([start[:, None], after[:, :-1]], 1),
        past,
        torch.cat([last, maximum[:, None]], 1),
    )


@torch.no_grad()
def _running_maximum(k: Tensor, w: Tensor, before: Tensor) -> Tensor:
    """o_t = max(o_{t-1} - w, k_t), by doubling the number of tokens each has seen."""
    o = k.clone()
    o[:, 0] = torch.maximum(before - w, k[:, 0])
    shift = 1
    while shift < k.shape[1]:
        o[:, shift:] = torch.maximum(o[:, shift:], o[:, :-shift] - shift * w)
        shift *= 2
    return o


def _native(k, v, w, u, state) -> tuple[Tensor, Tensor]:
    if native.can_bypass_dispatcher(k, v, w, u, state):
        form = _wkv if k.device.type == "cpu" else _wkv_cuda
        return form(k, v, w, u, state, save=False)[:2]
    save = torch.is_grad_enabled() and any(a.requires_grad for a in (k, v, w, u, state))
    y, last, _ = wkv(k, v, w, u, state, save)
    return y, last


def _saved_shape(k: Tensor) -> tuple[int, ...]:
    """The state before each chunk: (b, channel blocks, chunks, 4, lanes), or (b, chunks, 4, d)."""
    if k.device.type == "cuda":
        return _edges_shape(k)
    lanes, chunk = (KERNEL.constant(name, k.dtype) for name in ("lanes", "chunk"))
    b, t, d = k.shape
    return b, (d + lanes - 1) // lanes, (t + chunk - 1) // chunk, 4, lanes


def _wkv(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the chunk starts the backward pass needs (empty unless `save`)."""
    y, last = torch.empty(k.shape, dtype=k.dtype), torch.empty(state.shape, dtype=k.dtype)
    saved = torch.empty(_saved_shape(k) if save else 0, dtype=k.dtype)
    outputs = {"y": y, "last": last, "saved": saved if save else None}
    KERNEL.call("forward", tuple(k.shape), k=k, v=v, w=w, u=u, state=state, **outputs)
    return y, last, saved


wkv = torch.library.custom_op("zoo::wkv4", _wkv, mutates_args=(), device_types="cpu")


@wkv.register_fake
def _(k, v, w, u, state, save):
    del v, u
    saved = w.new_empty(_saved_shape(k) if save else 0)
    return k.new_empty(k.shape), state.new_empty(state.shape), saved


def _wkv_backward(
    dy: Tensor, dlast: Tensor | None, k: Tensor, v: Tensor, w: Tensor, u: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the incoming state."""
    b, _, d = k.shape
    dk, dv = torch.empty(k.shape, dtype=k.dtype), torch.empty(k.shape, dtype=k.dtype)
    dw, du = torch.empty((b, d), dtype=k.dtype), torch.empty((b, d), dtype=k.dtype)
    dstate = torch.zeros((b, 3, d), dtype=k.dtype) if dlast is None else dlast.contiguous().clone()
    outputs = {"dk": dk, "dv": dv, "dw": dw, "du": du, "dstate": dstate}
    KERNEL.call("backward", tuple(k.shape), k=k, v=v, w=w, u=u, dy=dy, saved=saved, **outputs)
    return dk, dv, dw.sum(0), du.sum(0), dstate


wkv_backward = torch.library.custom_op(
    "zoo::wkv4_backward", _wkv_backward, mutates_args=(), device_types="cpu"
)


@wkv_backward.register_fake
def _(dy, dlast, k, v, w, u, saved):
    del dy, dlast, saved
    b, _, d = k.shape
    dk, dv, dw, du = (a.new_empty(a.shape) for a in (k, v, w, u))
    return dk, dv, dw, du, w.new_empty((b, 3, d))


def _macros(dtype: torch.dtype) -> cuda.Macros:
    return (("DTYPE", cuda.DTYPES[dtype]),)


def _edges_shape(k: Tensor) -> tuple[int, ...]:
    b, t, d = k.shape
    return b, -(-t // CHUNK), 4, d


def _launch(function: str, k: Tensor, chunks: int, **tensors: Tensor | None) -> None:
    """`chunks` of time, or their composition where that is zero."""
    b, t, d = k.shape
    sizes = {"tokens": t, "width": d, "chunks": -(-t // CHUNK)}
    threads, grid = THREADS, (chunks * -(-d // THREADS), 1, b)
    if not chunks:
        threads, grid = cuda.WARP * min(MAX_WARPS, sizes["chunks"]), (-(-d // cuda.WARP), 1, b)
    CUDA.call(function, grid, threads, _macros(k.dtype), sizes, k=cuda.dense(k), **tensors)


@wkv.register_kernel("cuda")
def _wkv_cuda(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, last = k.new_empty(k.shape), w.new_empty(state.shape)
    w, u, state = w.contiguous(), u.contiguous(), state.contiguous()
    shape = _edges_shape(k)
    edges = w.new_empty(shape) if save or shape[1] > 1 else None
    tensors = {"v": cuda.dense(v), "w": w, "u": u, "state": state, "edges": edges}
    if shape[1] > 1:  # nobody asks what is after the last
        _launch("chunk_ends", k, shape[1] - 1, **tensors)
    if edges is not None:
        _launch("compose", k, 0, **tensors)
    _launch("outputs", k, shape[1], **tensors, y=y, last=last)
    return y, last, edges if save and edges is not None else w.new_empty(0)


@wkv_backward.register_kernel("cuda")
def _wkv_backward_cuda(
    dy: Tensor, dlast: Tensor | None, k: Tensor, v: Tensor, w: Tensor, u: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, chunks, _, d = _edges_shape(k)
    dk, dv, dstate = k.new_empty(k.shape), k.new_empty(k.shape), w.new_empty((b, 3, d))
    dw, du = w.new_empty((b, chunks, d)), w.new_empty((b, chunks, d))
    tensors = {"v": cuda.dense(v), "w": w.contiguous(), "u": u.contiguous(), "edges": saved}
    tensors |= {"dy": dy.contiguous()}
    tensors |= {"ahead": torch.empty_like(saved), "top": w.new_empty((b, d))}
    tensors["dlast"] = None if dlast is None else dlast.contiguous()
    _launch("chunk_futures", k, chunks, **tensors)
    _launch("compose_back", k, 0, **tensors)
    _launch("gradients", k, chunks, **tensors, dk=dk, dv=dv, dw=dw, du=du, dstate=dstate)
    return dk, dv, dw.sum((0, 1)), du.sum((0, 1)), dstate


def _save(ctx, inputs, output) -> None:
    k, v, w, u, _, ctx.save = inputs
    ctx.save_for_backward(k, v, w, u, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dlast, _):
    if not ctx.save:
        raise RuntimeError("wkv4: the forward was told to save nothing for a backward")
    k, v, w, u, saved = ctx.saved_tensors
    dy = torch.zeros_like(k) if dy is None else dy
    form = wkv_backward
    if native.can_bypass_dispatcher(dy, dlast, k, v, w, u, saved):
        form = _wkv_backward if dy.device.type == "cpu" else _wkv_backward_cuda
    return *form(dy, dlast, k, v, w, u, saved), None


wkv.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.wkv4)
def _flops(k: torch.Size, *_: Any, **__: Any) -> int:
    """Per channel and token four exponentials, six products, four sums and a division."""
    return 15 * k.numel()
