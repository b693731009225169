"""Computes the gated linear recurrence, element by element (De 2024, RG-LRU, equation 4).

    h_t = a_t h_{t-1} + u_t          a_t in [0, 1]

Decays are only ever multiplied, never divided by, so that 0 and 1 are as exact as any other.
Backends: `reference` is that loop; `torch` is `linear_scan`, below; `native` is
kernels/linear_recurrence (CPU and CUDA).
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.ops.runtime import cuda
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.cuda import CudaKernel
from zoo.ops.runtime.dispatch import select_backend
from zoo.ops.runtime.native_op import NativeOp, common_dtype, compute_dtypes
from zoo.ops.runtime.sizes import ceil_div

KERNEL = CpuKernel(
    "linear_recurrence/linear_recurrence.c",
    sizes="batch tokens width",
    rows={"a u h dh da du": "batch tokens width"},
    pointers={"state last dstate": "batch width"},
    outputs="h last da du dstate",
)
CUDA = CudaKernel(
    "linear_recurrence/linear_recurrence.cu",
    sizes="tokens width chunks back",
    rows="a u",
    sequences="h dh da du",
    pointers="state last edges dlast dstate",
)
SHAPES = {"u": "b t>0 d", "a": "b t d", "state": "b d?"}
CUDA_CHUNK, CUDA_THREADS = 64, 64  # tokens of a chunk, channels of a block


def linear_recurrence(
    a: Float[Tensor, "b t d"],
    u: Float[Tensor, "b t d"],
    state: Float[Tensor, "b d"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """Return every h after `state` (zeros by default), in u's dtype, and the last.

    All arithmetic and the last are float32, or float64 where a or u is. Raises `ValueError` on
    shapes that do not fit, `UserError` where the backend is not available.
    """
    check("linear_recurrence", SHAPES, u, a, state)
    here = RECURRENCE.available(u.device, common_dtype(a, u))
    name = select_backend(
        "linear_recurrence", backend, {"native": here, "torch": True, "reference": True}
    )
    row, wide = compute_dtypes(name, a, u)
    b, _, d = u.shape
    state = u.new_zeros((b, d), dtype=wide) if state is None else state.to(wide)
    form = {"native": RECURRENCE, "torch": _torch, "reference": _reference}[name]
    h, last = form(a.to(row), u.to(row), state)
    return h.to(u.dtype), last


def _reference(a, u, state) -> tuple[Tensor, Tensor]:
    """Compute the definition, token by token."""
    hs = []
    for a_t, u_t in zip(a.unbind(1), u.unbind(1), strict=True):
        state = a_t * state + u_t
        hs.append(state)
    return torch.stack(hs, 1), state


def _torch(a, u, state) -> tuple[Tensor, Tensor]:
    h = linear_scan(a, u, state)
    return h, h[:, -1]


def linear_scan(
    a: Float[Tensor, "b t ..."], u: Float[Tensor, "b t ..."], h: Float[Tensor, "b ..."]
) -> Float[Tensor, "b t ..."]:
    """Return every state h_1 .. h_t after the initial one; `a` broadcasts against `u`.

    Affine maps h -> a h + u compose: every block of steps from zero, then the states between
    blocks, then their decay into each block. Steps are tokens, or chunks of tokens for
    matrix-valued states. Differentiable in all three; the gradient is the same recurrence backwards
    in time.
    """
    return _LinearScan.apply(a, u, h)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, u: Tensor, h: Tensor) -> Tensor:
        hs = _scan(a, u, h)
        ctx.save_for_backward(a, h, hs)
        return hs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (dhs,) = grads
        a, h, hs = ctx.saved_tensors
        # g_t = dh_t + a_{t+1} g_{t+1}
        following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        g = _scan(following.flip(1), dhs.flip(1), torch.zeros_like(h)).flip(1)
        before = torch.cat([h[:, None], hs[:, :-1]], 1)
        return (g * before).sum_to_size(a.shape), g, a[:, 0] * g[:, 0]


def _scan(a: Tensor, u: Tensor, h: Tensor) -> Tensor:
    """Scan in blocks of about sqrt(t) steps."""
    t = a.shape[1]
    size = math.isqrt(t - 1) + 1
    short = -t % size
    if short:
        a = torch.cat([a, torch.ones_like(a[:, :short])], 1)
        u = torch.cat([u, torch.zeros_like(u[:, :short])], 1)
    a, u = (x.unflatten(1, (-1, size)) for x in (a, u))
    hs, decays = torch.empty_like(u), torch.empty_like(a)  # from the start of each block
    hs[:, :, 0], decays[:, :, 0] = u[:, :, 0], a[:, :, 0]
    for i in range(1, size):
        torch.addcmul(u[:, :, i], a[:, :, i], hs[:, :, i - 1], out=hs[:, :, i])
        torch.mul(a[:, :, i], decays[:, :, i - 1], out=decays[:, :, i])
    starts = []
    for end, decay in zip(hs[:, :, -1].unbind(1), decays[:, :, -1].unbind(1), strict=True):
        starts.append(h)
        h = torch.addcmul(end, decay, h)
    hs.addcmul_(decays, torch.stack(starts, 1)[:, :, None])
    return hs.flatten(1, 2)[:, :t]


def _forward(a, u, state) -> tuple[Tensor, Tensor]:
    last = state.clone(memory_format=torch.contiguous_format)
    (h,) = KERNEL.run("forward", (*u.shape,), ["h"], a=a, u=u, last=last)
    return h, last


def _backward(dh, dlast, a, h, state) -> tuple[Tensor, Tensor, Tensor]:
    """With g_t = dh_t + a_{t+1} g_{t+1}: g_t h_{t-1}, g_t and a_1 g_1."""
    dstate = torch.zeros(state.shape, dtype=h.dtype)
    if dlast is not None:
        dstate.copy_(dlast)
    arrays = {"dh": dh, "a": a, "h": h, "state": state, "dstate": dstate}
    da, du = KERNEL.run("backward", (*h.shape,), ["da", "du"], **arrays)
    return da, du, dstate


def _launch(
    function: str, a: Tensor, edges: Tensor | None, *, back: bool, **tensors: Tensor | None
) -> None:
    """Run chunk by chunk from what reaches each, which `edges` hold where there are several."""
    b, t, d = a.shape
    chunks = ceil_div(t, CUDA_CHUNK)
    sizes = {"tokens": t, "width": d, "chunks": chunks, "back": int(back)}
    threads, grid = CUDA_THREADS, (chunks * ceil_div(d, CUDA_THREADS), 1, b)
    if function == "compose":
        threads, grid = cuda.composition(chunks, b, d)
    CUDA.call(function, grid, threads, sizes, (), a=a, edges=edges, **tensors)


def _edges(a: Tensor, state: Tensor) -> Tensor | None:
    """Allocate each chunk's effect on a state, which the state that reaches it replaces."""
    b, t, d = a.shape
    return state.new_empty((b, ceil_div(t, CUDA_CHUNK), 2, d)) if t > CUDA_CHUNK else None


def _forward_cuda(a, u, state) -> tuple[Tensor, Tensor]:
    h, last, edges = u.new_empty(u.shape), state.new_empty(state.shape), _edges(a, state)
    tensors = CUDA.laid_out(a=a, u=u, state=state)
    if edges is not None:
        _launch("chunk_ends", edges=edges, back=False, **tensors)
        _launch("compose", edges=edges, back=False, **tensors)
    _launch("outputs", edges=edges, back=False, **tensors, h=h, last=last)
    return h, last


def _backward_cuda(dh, dlast, a, h, state) -> tuple[Tensor, Tensor, Tensor]:
    da, du, dstate = h.new_empty(h.shape), h.new_empty(h.shape), state.new_empty(state.shape)
    edges = _edges(a, state)
    tensors = CUDA.laid_out(a=a, dh=dh, dlast=dlast)
    if edges is not None:
        _launch("chunk_beginnings", edges=edges, back=True, **tensors)
        _launch("compose", edges=edges, back=True, **tensors)
    tensors |= CUDA.laid_out(h=h, state=state)
    _launch("gradients", edges=edges, back=True, **tensors, da=da, du=du, dstate=dstate)
    return da, du, dstate


RECURRENCE = NativeOp(
    "linear_recurrence",
    forward="a u state -> h last",
    backward="dh dlast? a h state -> da du dstate",
    cpu=(_forward, _backward),
    cuda=(_forward_cuda, _backward_cuda),
    kernels=(KERNEL, CUDA),
    flops=lambda a, **_: 2 * a.numel(),  # a product and a sum per channel and token
)
