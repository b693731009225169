"""The gated linear recurrence, element by element: RG-LRU's (De 2024, equation 4), and any other's.

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
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.runtime import cpu as native
from zoo.ops.runtime import cuda
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.dispatch import select_backend

KERNEL = native.CpuKernel(
    "linear_recurrence/linear_recurrence.c",
    sizes="batch tokens width",
    rows={"a u h dh da du": "batch tokens width"},
    pointers={"state last dstate": "batch width"},
    outputs="h last da du dstate",
)
CUDA = cuda.CudaKernel(
    "linear_recurrence/linear_recurrence.cu",
    sizes="tokens width chunks back",
    rows="a u",
    sequences="h dh da du",
    pointers="state last edges dlast dstate",
)
SHAPES = {"u": "b t d", "a": "b t d", "state": "b d?"}
CHUNK, THREADS = 64, 64  # of the CUDA kernel: tokens of a chunk, channels of a block
MAX_WARPS = 32  # that share its composition


def linear_recurrence(
    a: Float[Tensor, "b t d"],
    u: Float[Tensor, "b t d"],
    state: Float[Tensor, "b d"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """Every h after `state`, by default zeros, in u's dtype, and the last.

    All arithmetic and the last are float32, or float64 where a or u is. Raises `ValueError` on
    shapes that do not fit, `UserError` where the backend is not there.
    """
    check("linear_recurrence", SHAPES, u, a, state)
    b, t, d = u.shape
    if not t:
        raise ValueError("linear_recurrence: no tokens")
    row = torch.promote_types(a.dtype, u.dtype)
    here = cuda.native_here(KERNEL, CUDA, u.device, row, _macros)
    name = select_backend(
        "linear_recurrence", backend, {"native": here, "torch": True, "reference": True}
    )
    wide = torch.promote_types(row, torch.float32)
    if not (name == "native" and u.device.type == "cuda"):  # that reads narrow types itself
        row = wide
    state = u.new_zeros((b, d), dtype=wide) if state is None else state.to(wide)
    form = {"native": _native, "torch": _torch, "reference": _reference}[name]
    h, last = form(a.to(row), u.to(row), state)
    return h.to(u.dtype), last


def _reference(a, u, state) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
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
    """Every state h_1 .. h_t after the one before the first step; `a` broadcasts against `u`.

    Affine maps h -> a h + u compose: every block of steps from zero, then the states between
    blocks, then their decay into each block. Steps are tokens, or chunks of tokens for
    matrix-valued states. Differentiable in all three; the gradient is the same recurrence backwards
    in time.
    """
    return _LinearScan.apply(a, u, h)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, u, h):
        hs = _scan(a, u, h)
        ctx.save_for_backward(a, h, hs)
        return hs

    @staticmethod
    def backward(ctx, dhs):
        a, h, hs = ctx.saved_tensors
        # g_t = dh_t + a_{t+1} g_{t+1}
        following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        g = _scan(following.flip(1), dhs.flip(1), torch.zeros_like(h)).flip(1)
        before = torch.cat([h[:, None], hs[:, :-1]], 1)
        return (g * before).sum_to_size(a.shape), g, a[:, 0] * g[:, 0]


def _scan(a: Tensor, u: Tensor, h: Tensor) -> Tensor:
    """By blocks of about sqrt(t) steps."""
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


def _native(a, u, state) -> tuple[Tensor, Tensor]:
    if native.can_bypass_dispatcher(a, u, state):
        form = _recurrence if u.device.type == "cpu" else _recurrence_cuda
        return form(a, u, state)
    return recurrence(a, u, state)


def _recurrence(a: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.empty(u.shape, dtype=u.dtype)
    last = state.clone(memory_format=torch.contiguous_format)
    KERNEL.call("forward", tuple(u.shape), a=a, u=u, h=h, last=last)
    return h, last


recurrence = torch.library.custom_op(
    "zoo::linear_recurrence", _recurrence, mutates_args=(), device_types="cpu"
)


@recurrence.register_fake
def _(a, u, state):
    del a
    return u.new_empty(u.shape), state.new_empty(state.shape)


def _recurrence_backward(
    dh: Tensor, dlast: Tensor | None, a: Tensor, h: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, u and the incoming state: with g_t = dh_t + a_{t+1} g_{t+1}, those are
    g_t h_{t-1}, g_t and a_1 g_1.
    """
    da, du = torch.empty(h.shape, dtype=h.dtype), torch.empty(h.shape, dtype=h.dtype)
    dstate = torch.zeros(state.shape, dtype=h.dtype)
    if dlast is not None:
        dstate.copy_(dlast)
    arrays = {"a": a, "h": h, "state": state, "dh": dh, "da": da, "du": du, "dstate": dstate}
    KERNEL.call("backward", tuple(h.shape), **arrays)
    return da, du, dstate


recurrence_backward = torch.library.custom_op(
    "zoo::linear_recurrence_backward", _recurrence_backward, mutates_args=(), device_types="cpu"
)


@recurrence_backward.register_fake
def _(dh, dlast, a, h, state):
    del dh, dlast, a
    return h.new_empty(h.shape), h.new_empty(h.shape), state.new_empty(state.shape)


def _macros(dtype: torch.dtype) -> cuda.Macros:
    return (("DTYPE", cuda.DTYPES[dtype]),)


def _launch(
    function: str, a: Tensor, edges: Tensor | None, *, back: bool, **tensors: Tensor | None
) -> None:
    """Chunk by chunk from what reaches each, which `edges` hold where there are several."""
    b, t, d = a.shape
    chunks = -(-t // CHUNK)
    sizes = {"tokens": t, "width": d, "chunks": chunks, "back": int(back)}
    threads, grid = THREADS, (chunks * -(-d // THREADS), 1, b)
    if function == "compose":
        threads, grid = cuda.WARP * min(MAX_WARPS, chunks), (-(-d // cuda.WARP), 1, b)
    CUDA.call(function, grid, threads, _macros(a.dtype), sizes, a=cuda.dense(a), edges=edges,
              **tensors)  # fmt: skip


def _edges(a: Tensor, state: Tensor) -> Tensor | None:
    """Of each chunk what it does to a state, and then the state that reaches it."""
    b, t, d = a.shape
    return state.new_empty((b, -(-t // CHUNK), 2, d)) if t > CHUNK else None


@recurrence.register_kernel("cuda")
def _recurrence_cuda(a: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    h, last, edges = u.new_empty(u.shape), state.new_empty(state.shape), _edges(a, state)
    tensors = {"u": cuda.dense(u), "state": state.contiguous()}
    if edges is not None:
        _launch("chunk_ends", a, edges, back=False, **tensors)
        _launch("compose", a, edges, back=False, **tensors)
    _launch("outputs", a, edges, back=False, **tensors, h=h, last=last)
    return h, last


@recurrence_backward.register_kernel("cuda")
def _recurrence_backward_cuda(
    dh: Tensor, dlast: Tensor | None, a: Tensor, h: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    da, du, dstate = h.new_empty(h.shape), h.new_empty(h.shape), state.new_empty(state.shape)
    edges = _edges(a, state)
    tensors = {"dh": dh.contiguous(), "dlast": None if dlast is None else dlast.contiguous()}
    if edges is not None:
        _launch("chunk_beginnings", a, edges, back=True, **tensors)
        _launch("compose", a, edges, back=True, **tensors)
    tensors |= {"h": h.contiguous(), "state": state.contiguous()}
    _launch("gradients", a, edges, back=True, **tensors, da=da, du=du, dstate=dstate)
    return da, du, dstate


def _save(ctx, inputs, output) -> None:
    a, _, state = inputs
    ctx.save_for_backward(a, output[0], state)
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dlast):
    a, h, state = ctx.saved_tensors
    dh = torch.zeros_like(h) if dh is None else dh
    form = recurrence_backward
    if native.can_bypass_dispatcher(dh, dlast, a, h, state):
        form = _recurrence_backward if dh.device.type == "cpu" else _recurrence_backward_cuda
    return form(dh, dlast, a, h, state)


recurrence.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.linear_recurrence)
def _flops(a: torch.Size, *_: Any, **__: Any) -> int:
    """A product and a sum per channel and token."""
    return 2 * a.numel()
