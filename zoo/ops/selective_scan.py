"""Computes the selective scan, Mamba's recurrence (Gu & Dao 2023, section 3.2, algorithm 2).

    step_t = softplus(dt_t + dt_bias)
    h_t    = exp(step_t A) h_{t-1} + step_t B_t x_t        per channel, h in R^n
    y_t    = (C_t . h_t + D x_t) silu(z_t)

Backends: `reference` is that loop; `torch` computes chunks of tokens at once and keeps only the
state before each; `native` is kernels/selective_scan (CPU and CUDA); `mamba_ssm`, by name
only, is that library (CUDA, from an empty state).
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.ops.linear_recurrence import linear_scan
from zoo.ops.runtime import cuda, libraries
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.cuda import CudaKernel
from zoo.ops.runtime.dispatch import Available, select_backend
from zoo.ops.runtime.native_op import NativeOp, common_dtype, compute_dtypes
from zoo.ops.runtime.sizes import ceil_div, next_power_of_two

KERNEL = CpuKernel(
    "selective_scan/selective_scan.c",
    sizes="batch tokens width states<=max_states",
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
CUDA = CudaKernel(
    "selective_scan/selective_scan.cu",
    sizes="tokens width states chunk chunks",
    rows="x dt z B C",
    sequences="y dy dx ddt dz",
    pointers="A D dt_bias state last saved edges steps dA dD dbias dBC dlast dstate",
    macros=(("STATES", 16),),
)
SHAPES = {"x": "b t>0 d", "dt": "b t d", "A": "d n", "B": "b t n", "C": "b t n"}
SHAPES |= {"D": "d?", "z": "b t d?", "dt_bias": "d?", "state": "b d n?"}
SEQUENCES = ("x", "dt", "B", "C", "z")
CUDA_TILE = 32  # tokens between saved states
CUDA_MAX_STATES = 64
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

    All arithmetic and the state are float32, or float64 where a sequence is. Raises `ValueError` on
    shapes that do not fit, `UserError` where the backend is not available.
    """
    check("selective_scan", SHAPES, x, dt, A, B, C, D, z, dt_bias, state)
    dtype, states = common_dtype(x, dt, B, C, z), A.shape[1]
    theirs = libraries.usable(
        "mamba_ssm",
        x,
        (state is not None, "it starts from an empty state only"),
        (states > libraries.MAX_STATES, f"it has at most {libraries.MAX_STATES} states"),
        (dtype not in libraries.DTYPES, "it has no float64"),
    )
    here = _native_available(x.device, dtype, states)
    available = {"native": here, "torch": True, "mamba_ssm": theirs, "reference": True}
    name = select_backend("selective_scan", backend, available)
    if name == "mamba_ssm":
        x_, dt_, B_, C_ = (a.to(dtype) for a in (x, dt, B, C))
        z_ = None if z is None else z.to(dtype)
        y, last = libraries.selective_scan(x_, dt_, A, B_, C_, D, z_, dt_bias)
        return y.to(x.dtype), last
    row, wide = compute_dtypes(name, x, dt, B, C, z)
    if state is None and name != "native":
        state = x.new_zeros((x.shape[0], *A.shape), dtype=wide)
    arguments = zip(SHAPES, (x, dt, A, B, C, D, z, dt_bias, state), strict=True)
    types = {name: row if name in SEQUENCES else wide for name in SHAPES}
    form = {"native": SCAN, "torch": _torch, "reference": _reference}[name]
    y, last = form(*(a if a is None else a.to(types[argument]) for argument, a in arguments))
    return y.to(x.dtype), last


def _native_available(device: torch.device, dtype: torch.dtype, states: int) -> Available:
    if device.type == "cpu":
        wide = torch.promote_types(dtype, torch.float32)
        return partial(KERNEL.has_room, wide, states=states)
    return states <= CUDA_MAX_STATES and SCAN.available(device, dtype, _macros(states))


def _reference(x, dt, A, B, C, D, z, dt_bias, h) -> tuple[Tensor, Tensor]:
    """Compute the definition, token by token."""
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
    """Go chunk by chunk; the backward recomputes a chunk from the state before it."""
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


def _forward(x, dt, A, B, C, D, z, dt_bias, state, save: bool) -> list[Tensor]:
    """y, the last state, and the state before each chunk."""
    arrays = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    arrays["state"] = state
    outputs = ["y", "last", *["saved"] * save]
    found = KERNEL.run("forward", (*x.shape, A.shape[1]), outputs, **arrays)
    return found if save else [*found, x.new_empty(0)]


def _backward(dy, dlast, x, dt, A, B, C, D, z, dt_bias, saved) -> tuple[Tensor, ...]:
    b, _, d = x.shape
    dA = torch.zeros((b, *A.shape), dtype=x.dtype)
    dD, dbias = torch.zeros((b, d), dtype=x.dtype), torch.zeros((b, d), dtype=x.dtype)
    dstate = torch.zeros_like(dA) if dlast is None else dlast.contiguous().clone()
    arrays = {"dy": dy, "saved": saved, "dA": dA, "dD": dD, "dbias": dbias, "dstate": dstate}
    arrays |= {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    outputs = ["dx", "ddt", "dB", "dC", *["dz"] * (z is not None)]
    found = KERNEL.run("backward", (*x.shape, A.shape[1]), outputs, **arrays)
    dx, ddt, dB, dC, dz = found if z is not None else (*found, x.new_empty(0))
    return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0), dstate


def _macros(states: int) -> cuda.Macros:
    return (("STATES", max(4, next_power_of_two(states))),)


def _forward_cuda(x, dt, A, B, C, D, z, dt_bias, state, save: bool) -> tuple[Tensor, ...]:
    (b, t, d), n, macros = x.shape, A.shape[1], _macros(A.shape[1])
    threads = 128  # `Forward` of the kernel
    groups = ceil_div(d, threads // max(1, macros[0][1] // 16))
    chunk, chunks = cuda.time_chunks(t, CUDA_TILE, b * groups, x.device)
    y, last = x.new_empty(x.shape), A.new_empty((b, d, n))
    saved = A.new_empty((b, ceil_div(t, CUDA_TILE), n, d) if save else 0)
    tensors = CUDA.laid_out(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state)
    tensors |= {"y": y, "last": last, "saved": saved if save else None}
    sizes = {"tokens": t, "width": d, "states": n, "chunk": chunk, "chunks": chunks}
    if chunks > 1:
        tensors |= {"edges": A.new_empty((b, chunks, n, d)), "steps": A.new_empty((b, chunks, d))}
        CUDA.call("chunk_ends", (groups, chunks - 1, b), threads, sizes, macros, **tensors)
        CUDA.call("compose", (ceil_div(n * d, 128), 1, b), 128, sizes, macros, **tensors)
    CUDA.call("outputs", (groups, chunks, b), threads, sizes, macros, **tensors)
    return y, last, saved


def _backward_cuda(dy, dlast, x, dt, A, B, C, D, z, dt_bias, saved) -> tuple[Tensor, ...]:
    (b, t, d), n, macros = x.shape, A.shape[1], _macros(A.shape[1])
    padded = macros[0][1]
    threads = 256 if padded <= 32 else 128  # `Backward` of the kernel
    groups = ceil_div(d, threads // (padded // 4))
    chunk, chunks = cuda.time_chunks(t, CUDA_TILE, b * groups, x.device)
    tensors = CUDA.laid_out(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    tensors |= CUDA.laid_out(dy=dy, dlast=dlast, saved=saved)
    dx, ddt = x.new_empty(x.shape), x.new_empty(x.shape)
    dz = x.new_empty(0 if z is None else z.shape)
    dA, dstate = A.new_empty((b, chunks, n, d)), A.new_empty((b, d, n))
    dD, dbias = A.new_empty((b, chunks, d)), A.new_empty((b, chunks, d))
    dBC = A.new_empty((b, groups, t, 2, n))
    tensors |= {"dx": dx, "ddt": ddt, "dz": None if z is None else dz, "dstate": dstate}
    tensors |= {"dA": dA, "dD": dD, "dbias": dbias, "dBC": dBC}
    sizes = {"tokens": t, "width": d, "states": n, "chunk": chunk, "chunks": chunks}
    if chunks > 1:
        grid = ceil_div(d, 128 // max(1, padded // 16)), chunks - 1, b
        tensors |= {"edges": torch.empty_like(dA), "steps": torch.empty_like(dD)}
        CUDA.call("chunk_starts", grid, 128, sizes, macros, **tensors)
        CUDA.call("compose_back", (ceil_div(n * d, 128), 1, b), 128, sizes, macros, **tensors)
    CUDA.call("gradients", (groups, chunks, b), threads, sizes, macros, **tensors)
    dense = torch.contiguous_format
    dB, dC = (a.clone(memory_format=dense) for a in dBC.sum(1).to(x.dtype).unbind(2))
    dA = dA.sum((0, 1)).t().clone(memory_format=dense)
    return dx, ddt, dA, dB, dC, dD.sum((0, 1)), dz, dbias.sum((0, 1)), dstate


SCAN = NativeOp(
    "selective_scan",
    forward="x dt A B C D? z? dt_bias? state? save:bool -> y last saved",
    backward="dy dlast? x dt A B C D? z? dt_bias? saved -> dx ddt dA dB dC dD dz ddt_bias dstate",
    cpu=(_forward, _backward),
    cuda=(_forward_cuda, _backward_cuda),
    kernels=(KERNEL, CUDA),
    # per state and token, as the authors count; exp counts as one
    flops=lambda x, A, **_: 9 * x.numel() * A[-1],
)
