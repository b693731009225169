"""Computes WKV, the weighted average of RWKV-4 (Peng 2023, section 3.1.2).

    y_t = (N_{t-1} + e^{u+k_t} v_t) / (D_{t-1} + e^{u+k_t})          per channel
    N_t = e^{-w} N_{t-1} + e^{k_t} v_t
    D_t = e^{-w} D_{t-1} + e^{k_t}

The state is (p, q, o): N = p e^o and D = q e^o, with o the largest exponent in them, so that
nothing overflows. Backends: `reference` is that loop; `torch` does the recurrence over pieces of
tokens at once and keeps only the state before each; `native` is kernels/wkv4 (CPU and CUDA).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear_recurrence import linear_scan
from zoo.ops.runtime import cuda
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.cuda import CudaKernel
from zoo.ops.runtime.dispatch import select_backend
from zoo.ops.runtime.native_op import NativeOp, common_dtype, compute_dtypes
from zoo.ops.runtime.sizes import ceil_div

KERNEL = CpuKernel(
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
CUDA = CudaKernel(
    "wkv4/wkv4.cu",
    sizes="tokens width chunks",
    rows="k v",
    sequences="y dy dk dv",
    pointers="w u state last edges ahead top dw du dlast dstate",
)
SHAPES = {"k": "b t>0 d", "v": "b t d", "w": "d", "u": "d", "state": "b 3 d?"}
CUDA_CHUNK, CUDA_THREADS = 64, 64  # tokens between saved states, channels of a block
CHUNK_TOKENS = 1024  # tokens the torch form holds its intermediate tensors for
LOG_ZERO = -1e38  # the maximum over no tokens: e to the power of it is zero beside any token's


def empty_average(like: Tensor, batch: int, width: int) -> Float[Tensor, "b 3 d"]:
    """Return the state before the first token, in float32 or better."""
    state = like.new_zeros((batch, 3, width), dtype=wide_dtype(like))
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

    All arithmetic and the state are float32, or float64 where k or v is. Raises `ValueError` on
    shapes that do not fit, `UserError` where the backend is not available.
    """
    check("wkv4", SHAPES, k, v, w, u, state)
    here = WKV.available(k.device, common_dtype(k, v))
    name = select_backend("wkv4", backend, {"native": here, "torch": True, "reference": True})
    row, wide = compute_dtypes(name, k, v)
    state = empty_average(k, k.shape[0], k.shape[2]) if state is None else state
    form = {"native": WKV, "torch": _torch, "reference": _reference}[name]
    y, last = form(k.to(row), v.to(row), *(a.to(wide) for a in (w, u, state)))
    return y.to(v.dtype), last


def _reference(k, v, w, u, state) -> tuple[Tensor, Tensor]:
    """Compute the definition, token by token."""
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
    """Go chunk by chunk; the backward recomputes a chunk from the state before it."""
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
    """Return (p, q) and o before each step of a recurrence adding `sums` e^k, and the last state.

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
    """Compute o_t = max(o_{t-1} - w, k_t), by doubling the number of tokens each has seen."""
    o = k.clone()
    o[:, 0] = torch.maximum(before - w, k[:, 0])
    shift = 1
    while shift < k.shape[1]:
        o[:, shift:] = torch.maximum(o[:, shift:], o[:, :-shift] - shift * w)
        shift *= 2
    return o


def _saved_shape(k: Tensor) -> tuple[int, ...]:
    b, t, d = k.shape
    return b, ceil_div(t, CUDA_CHUNK), 4, d


def _forward(k, v, w, u, state, save: bool) -> list[Tensor]:
    """y, the last state, and the state before each chunk."""
    outputs = ["y", "last", *["saved"] * save]
    found = KERNEL.run("forward", (*k.shape,), outputs, k=k, v=v, w=w, u=u, state=state)
    return found if save else [*found, k.new_empty(0)]


def _backward(dy, dlast, k, v, w, u, saved) -> tuple[Tensor, ...]:
    b, _, d = k.shape
    dstate = torch.zeros((b, 3, d), dtype=k.dtype) if dlast is None else dlast.contiguous().clone()
    arrays = {"k": k, "v": v, "w": w, "u": u, "dy": dy, "saved": saved, "dstate": dstate}
    dk, dv, dw, du = KERNEL.run("backward", (*k.shape,), ["dk", "dv", "dw", "du"], **arrays)
    return dk, dv, dw.sum(0), du.sum(0), dstate


def _launch(function: str, k: Tensor, parts: int, **tensors: Tensor | None) -> None:
    """Run `parts` chunks of time, or the composition of all where that is zero."""
    b, t, d = k.shape
    chunks = ceil_div(t, CUDA_CHUNK)
    threads, grid = CUDA_THREADS, (parts * ceil_div(d, CUDA_THREADS), 1, b)
    if not parts:
        threads, grid = cuda.composition(chunks, b, d)
    sizes = {"tokens": t, "width": d, "chunks": chunks}
    CUDA.call(function, grid, threads, sizes, (), k=k, **tensors)


def _forward_cuda(k, v, w, u, state, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, last = k.new_empty(k.shape), w.new_empty(state.shape)
    shape = _saved_shape(k)
    edges = w.new_empty(shape) if save or shape[1] > 1 else None
    tensors = CUDA.laid_out(k=k, v=v, w=w, u=u, state=state, edges=edges)
    if shape[1] > 1:  # the end of the last chunk is not needed
        _launch("chunk_ends", parts=shape[1] - 1, **tensors)
    if edges is not None:
        _launch("compose", parts=0, **tensors)
    _launch("outputs", parts=shape[1], **tensors, y=y, last=last)
    return y, last, edges if save and edges is not None else w.new_empty(0)


def _backward_cuda(dy, dlast, k, v, w, u, saved) -> tuple[Tensor, ...]:
    b, chunks, _, d = _saved_shape(k)
    dk, dv, dstate = k.new_empty(k.shape), k.new_empty(k.shape), w.new_empty((b, 3, d))
    dw, du = w.new_empty((b, chunks, d)), w.new_empty((b, chunks, d))
    tensors = CUDA.laid_out(k=k, v=v, w=w, u=u, dy=dy, dlast=dlast)
    tensors |= {"edges": saved, "ahead": torch.empty_like(saved), "top": w.new_empty((b, d))}
    _launch("chunk_futures", parts=chunks, **tensors)
    _launch("compose_back", parts=0, **tensors)
    _launch("gradients", parts=chunks, **tensors, dk=dk, dv=dv, dw=dw, du=du, dstate=dstate)
    return dk, dv, dw.sum((0, 1)), du.sum((0, 1)), dstate


WKV = NativeOp(
    "wkv4",
    forward="k v w u state save:bool -> y last saved",
    backward="dy dlast? k v w u saved -> dk dv dw du dstate",
    cpu=(_forward, _backward),
    cuda=(_forward_cuda, _backward_cuda),
    kernels=(KERNEL, CUDA),
    # per channel and token four exponentials, six products, four sums and a division
    flops=lambda k, **_: 15 * k.numel(),
)
