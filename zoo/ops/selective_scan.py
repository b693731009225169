"""Selective scan: the recurrence of Mamba (Gu & Dao 2023, section 3.2, algorithm 2).

    step_t = softplus(dt_t + dt_bias)
    h_t    = exp(step_t A) h_{t-1} + step_t B_t x_t        per channel, h in R^n
    y_t    = (C_t . h_t + D x_t) silu(z_t)

Backends: `reference` is that loop; `torch` does the recurrence in blocks of tokens and keeps only
the state before each chunk; `native` is kernels/selective_scan (CPU and CUDA); `mamba_ssm`, by name
only, is that library (CUDA, from an empty state).
"""

from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.linear_recurrence import linear_scan
from zoo.ops.runtime import cpu as native
from zoo.ops.runtime import cuda, libraries
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.dispatch import Available, select_backend

KERNEL = native.CpuKernel(
    "selective_scan/selective_scan.c",
    sizes="batch tokens width states<=most",
    rows={
        "x dt z": "batch tokens width",
        "B C": "batch tokens states",
        "y dy dx ddt dz": "batch tokens width",
        "dB dC": "batch tokens states",
    },
    pointers={
        "A": "width states",
        "D dt_bias": "width",
        "state last": "batch width states",
        "saved": "batch width/lanes tokens/chunk states lanes",
        "dA": "batch width states",
        "dD dbias": "batch width",
        "dstate": "batch width states",
    },
    outputs="y last saved dx ddt dz dB dC dA dD dbias dstate",
)
CUDA = cuda.CudaKernel(
    "selective_scan/selective_scan.cu",
    sizes="tokens width states chunk chunks",
    rows="x dt z B C",
    sequences="y dy dx ddt dz",
    pointers="A D dt_bias state last saved edges steps dA dD dbias dBC dlast dstate",
)
SHAPES = {"x": "b t d", "dt": "b t d", "A": "d n", "B": "b t n", "C": "b t n"}
SHAPES |= {"D": "d?", "z": "b t d?", "dt_bias": "d?", "state": "b d n?"}
TILE = 32  # of the CUDA kernel: tokens between saved states
MAX_STATES = 64  # of the CUDA kernel
CHUNK_TOKENS = 256  # tokens the torch form holds (b, t, d, n) tensors for


def selective_scan(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b t d"] | None = None,
    dt_bias: Float[Tensor, " d"] | None = None,
    state: Float[Tensor, "b d n"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Scan x with input-dependent steps; A is negative. Returns y in x's dtype and the state.

    All arithmetic and the state are float32, or float64 where x is. Raises `ValueError` on shapes
    that do not fit, `UserError` where the backend is not there.
    """
    check("selective_scan", SHAPES, x, dt, A, B, C, D, z, dt_bias, state)
    if not x.shape[1]:
        raise ValueError("selective_scan: no tokens")
    theirs = libraries.usable(
        "mamba_ssm",
        x,
        (state is not None, "it starts from an empty state only"),
        (A.shape[1] > libraries.MAX_STATES, f"it has at most {libraries.MAX_STATES} states"),
        (_common_dtype(x, dt, B, C, z) not in libraries.DTYPES, "it has no float64"),
    )
    dtype, wide = _common_dtype(x, dt, B, C, z), torch.promote_types(x.dtype, torch.float32)
    available = {"native": _native_here(x, dtype, wide, A.shape[1]), "torch": True}
    available |= {"mamba_ssm": theirs, "reference": True}
    name = select_backend("selective_scan", backend, available)
    if name == "mamba_ssm":
        x_, dt, B, C = (a.to(dtype) for a in (x, dt, B, C))
        z = None if z is None else z.to(dtype)
        y, last = libraries.selective_scan(x_, dt, A, B, C, D, z, dt_bias)
        return y.to(x.dtype), last
    if state is None and name != "native":
        state = x.new_zeros((x.shape[0], *A.shape), dtype=wide)
    form = {"native": _native, "torch": _torch, "reference": _reference}[name]
    arguments = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    arguments["state"] = state
    types = dict.fromkeys(arguments, wide)
    if name == "native" and x.device.type == "cuda":  # reads and writes narrow sequences itself
        types |= dict.fromkeys(SEQUENCES, _common_dtype(x, dt, B, C, z))
    y, last = form(*(a if a is None else a.to(types[name]) for name, a in arguments.items()))
    return y.to(x.dtype), last


SEQUENCES = ("x", "dt", "B", "C", "z")


def _common_dtype(*sequences: Tensor | None) -> torch.dtype:
    return reduce(torch.promote_types, (a.dtype for a in sequences if a is not None))


def _native_here(x: Tensor, dtype: torch.dtype, wide: torch.dtype, n: int) -> Available:
    if x.device.type == "cpu":
        return partial(KERNEL.has_room, wide, states=n)
    return n <= MAX_STATES and cuda.native_here(
        KERNEL, CUDA, x.device, dtype, partial(_macros, n=n)
    )


def _reference(x, dt, A, B, C, D, z, dt_bias, h) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    step = F.softplus(dt if dt_bias is None else dt + dt_bias)
    ys = []
    for x_t, step_t, B_t, C_t in zip(*(a.unbind(1) for a in (x, step, B, C)), strict=True):
        h = torch.exp(step_t[..., None] * A) * h + (step_t * x_t)[..., None] * B_t[:, None]
        ys.append((h * C_t[:, None]).sum(-1))
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + D * x
    return (y if z is None else y * F.silu(z)), h


def _torch(x, dt, A, B, C, D, z, dt_bias, h, chunk: int = CHUNK_TOKENS) -> tuple[Tensor, Tensor]:
    """Piece by chunk; the backward recomputes a chunk from the state before it."""
    sequences = [a.split(chunk, 1) for a in (x, dt, B, C)]
    gates = [None] * len(sequences[0]) if z is None else z.split(chunk, 1)
    ys = []
    for *parts, gate in zip(*sequences, gates, strict=True):
        y, h = checkpoint(
            _chunk, *parts, A, D, gate, dt_bias, h, use_reentrant=False, preserve_rng_state=False
        )
        ys.append(y)
    return torch.cat(ys, 1), h


def _chunk(x, dt, B, C, A, D, z, dt_bias, h) -> tuple[Tensor, Tensor]:
    step = F.softplus(dt if dt_bias is None else dt + dt_bias)
    decay = torch.exp(step[..., None] * A)
    hs = linear_scan(decay, (step * x)[..., None] * B[:, :, None], h)
    y = (hs @ C[..., None]).squeeze(-1)
    if D is not None:
        y = y + D * x
    return (y if z is None else y * F.silu(z)), hs[:, -1]


def _native(x, dt, A, B, C, D, z, dt_bias, state) -> tuple[Tensor, Tensor]:
    tensors = (x, dt, A, B, C, D, z, dt_bias, state)
    if native.can_bypass_dispatcher(*tensors):
        return (_scan if x.device.type == "cpu" else _scan_cuda)(*tensors, save=False)[:2]
    save = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors)
    y, last, _ = scan(*tensors, save)
    return y, last


def _saved_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    """The states before each chunk: (b, blocks, chunks, n, lanes), or in CUDA (b, tiles, n, d)."""
    if x.device.type == "cuda":
        return _tiles_shape(x, A)
    lanes, chunk = (KERNEL.constant(name, x.dtype) for name in ("lanes", "chunk"))
    b, t, d = x.shape
    return b, (d + lanes - 1) // lanes, (t + chunk - 1) // chunk, A.shape[1], lanes


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the chunk starts the backward pass needs (empty unless `save`)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = x.new_empty((x.shape[0], *A.shape))
    saved = x.new_empty(_saved_shape(x, A) if save else 0)
    inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    outputs = {"y": y, "last": last, "saved": saved if save else None}
    KERNEL.call("forward", (*x.shape, A.shape[1]), **inputs, state=state, **outputs)
    return y, last, saved


scan = torch.library.custom_op("zoo::selective_scan", _scan, mutates_args=(), device_types="cpu")


@scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, state, save):
    saved = A.new_empty(_saved_shape(x, A) if save else 0)
    return x.new_empty(x.shape), A.new_empty((x.shape[0], *A.shape)), saved


def _scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z (empty without z), dt_bias and the incoming state."""
    b, _, d = x.shape
    dx, ddt, dB, dC = (torch.empty(a.shape, dtype=a.dtype) for a in (x, dt, B, C))
    dz = torch.empty(0 if z is None else z.shape, dtype=x.dtype)
    dA = torch.zeros((b, *A.shape), dtype=x.dtype)
    dD, dbias = torch.zeros((b, d), dtype=x.dtype), torch.zeros((b, d), dtype=x.dtype)
    dstate = torch.zeros_like(dA) if dlast is None else dlast.contiguous().clone()
    inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    outputs = {"dx": dx, "ddt": ddt, "dA": dA, "dB": dB, "dC": dC, "dD": dD, "dbias": dbias}
    outputs |= {"dz": None if z is None else dz, "dstate": dstate}
    KERNEL.call("backward", (*x.shape, A.shape[1]), **inputs, dy=dy, saved=saved, **outputs)
    return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0), dstate


scan_backward = torch.library.custom_op(
    "zoo::selective_scan_backward", _scan_backward, mutates_args=(), device_types="cpu"
)


@scan_backward.register_fake
def _(dy, dlast, x, dt, A, B, C, D, z, dt_bias, saved):
    del dlast, D, dt_bias, saved
    dx, ddt, dA, dB, dC = (a.new_empty(a.shape) for a in (x, dt, A, B, C))
    dD, dbias, dz = A.new_empty(x.shape[2]), A.new_empty(x.shape[2]), x.new_empty(0)
    dz = dz if z is None else z.new_empty(z.shape)
    return dx, ddt, dA, dB, dC, dD, dz, dbias, A.new_empty((x.shape[0], *A.shape))


def _macros(dtype: torch.dtype, n: int) -> cuda.Macros:
    return ("DTYPE", cuda.DTYPES[dtype]), ("STATES", _padded(n))


def _padded(n: int) -> int:
    """What the CUDA kernel calls STATES."""
    return max(4, 1 << (n - 1).bit_length())


def _tiles_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    (b, t, d), n = x.shape, A.shape[1]
    return b, -(-t // TILE), n, d


@scan.register_kernel("cuda")
def _scan_cuda(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (b, t, d), n = x.shape, A.shape[1]
    threads = 128  # `Forward` of the kernel
    groups = -(-d // (threads // max(1, _padded(n) // 16)))
    chunk, chunks = cuda.time_chunks(t, TILE, b * groups, x.device)
    y, last = x.new_empty(x.shape), A.new_empty((b, d, n))
    saved = A.new_empty(_tiles_shape(x, A) if save else 0)
    tensors = {name: cuda.dense(a) for name, a in zip(SEQUENCES, (x, dt, B, C, z), strict=True)}
    tensors |= {"A": A, "D": D, "dt_bias": dt_bias, "state": state}
    tensors = {k: a if a is None or k in SEQUENCES else a.contiguous() for k, a in tensors.items()}
    tensors |= {"y": y, "last": last, "saved": saved if save else None}
    sizes = {"tokens": t, "width": d, "states": n, "chunk": chunk, "chunks": chunks}
    macros = _macros(x.dtype, n)
    if chunks > 1:
        tensors |= {"edges": A.new_empty((b, chunks, n, d)), "steps": A.new_empty((b, chunks, d))}
        CUDA.call("chunk_ends", (groups, chunks - 1, b), threads, macros, sizes, **tensors)
        CUDA.call("compose", (-(-n * d // 128), 1, b), 128, macros, sizes, **tensors)
    CUDA.call("outputs", (groups, chunks, b), threads, macros, sizes, **tensors)
    return y, last, saved


@scan_backward.register_kernel("cuda")
def _scan_backward_cuda(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (b, t, d), n = x.shape, A.shape[1]
    padded, macros = _padded(n), _macros(x.dtype, n)
    threads = 256 if padded <= 32 else 128  # `Backward` of the kernel
    groups = -(-d // (threads // (padded // 4)))
    chunk, chunks = cuda.time_chunks(t, TILE, b * groups, x.device)
    tensors = {name: cuda.dense(a) for name, a in zip(SEQUENCES, (x, dt, B, C, z), strict=True)}
    outer = {"A": A, "D": D, "dt_bias": dt_bias, "dlast": dlast}
    tensors |= {k: a if a is None else a.contiguous() for k, a in outer.items()}
    tensors |= {"dy": dy.contiguous(), "saved": saved}
    dx, ddt = x.new_empty(x.shape), x.new_empty(x.shape)
    dz = x.new_empty(0 if z is None else z.shape)
    dA, dstate = A.new_empty((b, chunks, n, d)), A.new_empty((b, d, n))
    dD, dbias = A.new_empty((b, chunks, d)), A.new_empty((b, chunks, d))
    dBC = A.new_empty((b, groups, t, 2, n))
    tensors |= {"dx": dx, "ddt": ddt, "dz": None if z is None else dz, "dstate": dstate}
    tensors |= {"dA": dA, "dD": dD, "dbias": dbias, "dBC": dBC}
    sizes = {"tokens": t, "width": d, "states": n, "chunk": chunk, "chunks": chunks}
    if chunks > 1:
        per_block = 128 // max(1, padded // 16)
        grid = -(-d // per_block), chunks - 1, b
        tensors |= {"edges": torch.empty_like(dA), "steps": torch.empty_like(dD)}
        CUDA.call("chunk_starts", grid, 128, macros, sizes, **tensors)
        CUDA.call("compose_back", (-(-n * d // 128), 1, b), 128, macros, sizes, **tensors)
    CUDA.call("gradients", (groups, chunks, b), threads, macros, sizes, **tensors)
    dB, dC = dBC.sum(1).to(x.dtype).unbind(2)
    dA = dA.sum((0, 1)).t().contiguous()
    return (
        dx,
        ddt,
        dA,
        dB.contiguous(),
        dC.contiguous(),
        dD.sum((0, 1)),
        dz,
        dbias.sum((0, 1)),
        dstate,
    )


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.save = inputs
    ctx.present = [a is not None for a in tensors]
    ctx.save_for_backward(*tensors[:-1], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dlast, _):
    if not ctx.save:
        raise RuntimeError("selective_scan: the forward was told to save nothing for a backward")
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    form = scan_backward
    if native.can_bypass_dispatcher(dy, dlast, *tensors):
        form = _scan_backward if dy.device.type == "cpu" else _scan_backward_cuda
    gradients = form(dy, dlast, *tensors)
    return *(g if p else None for g, p in zip(gradients, ctx.present, strict=True)), None


scan.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.selective_scan)
def _flops(x: torch.Size, dt: torch.Size, A: torch.Size, *_: Any, **__: Any) -> int:
    """Nine operations per state and token, as the authors count; exp counts as one."""
    del dt
    return 9 * x.numel() * A[-1]
