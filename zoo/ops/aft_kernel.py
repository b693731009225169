"""Calls the kernels of AFT-conv, kernels/aft: a running average and a window of weighted tokens."""

import torch
from torch import Tensor

from zoo.ops.runtime import cuda
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.cuda import CudaKernel
from zoo.ops.runtime.native_op import NativeOp
from zoo.ops.runtime.sizes import ceil_div

KERNEL = CpuKernel(
    "aft/aft.c",
    sizes="batch tokens before width 1<=window<=max_window",
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
CUDA = CudaKernel(
    "aft/aft.cu",
    sizes="batch tokens before width window chunks run",
    rows="k v",
    sequences="y dy dk dv",
    pointers="m state last edges read ahead dm dlast dstate",
    macros=(("TILES", 4),),
)
MAX_WINDOW = 128  # tokens
CUDA_TILE, CUDA_TILES_PER_CHUNK = 8, 8  # tokens of a tile, tiles of a chunk
CUDA_MAX_BLOCKS = 4096  # about: several times what a device runs at once, and each keeps dm


def _forward(k, v, m, state, before: int, save: bool) -> list[Tensor]:
    """y, the last state of the tokens older than the window, and that before each chunk.

    The first `before` tokens of k and v are no queries; m (s + 1, d) weighs tokens, e^w.
    """
    b, n, d = k.shape
    outputs = ["y", "last", *["saved"] * save]
    sizes = (b, n, before, d, len(m) - 1)
    found = KERNEL.run("forward", sizes, outputs, k=k, v=v, m=m, state=state)
    return found if save else [*found, k.new_empty(0)]


def _backward(dy, dlast, k, v, m, saved) -> tuple[Tensor, ...]:
    b, n, d = k.shape
    dstate = torch.zeros((b, 3, d), dtype=k.dtype) if dlast is None else dlast.contiguous().clone()
    arrays = {"k": k, "v": v, "m": m, "dy": dy, "saved": saved, "dstate": dstate}
    sizes = (b, n, n - dy.shape[1], d, len(m) - 1)
    dk, dv, dm = KERNEL.run("backward", sizes, ["dk", "dv", "dm"], **arrays)
    return dk, dv, dm.sum(0), dstate


def _tiles(s: int) -> int:
    """Count the tiles before its own in which a query may have tokens of its window."""
    return ceil_div(s - 1, CUDA_TILE)


def window_macros(s: int) -> cuda.Macros:
    """Return what the CUDA kernel is compiled with for a window of s tokens."""
    return (("TILES", _tiles(s)),)


def _chunks(t: int, s: int) -> int:
    """Count the chunks of keys: those of queries begin as many tiles later as a query sees."""
    return ceil_div(ceil_div(t, CUDA_TILE) + _tiles(s), CUDA_TILES_PER_CHUNK)


def _channels(s: int) -> int:
    """Return the channels of a thread block: fewer where the window fills its shared memory."""
    return 64 if _tiles(s) <= 4 else 32


def _walks(k: Tensor, t: int, s: int) -> tuple[int, int]:
    """Cut the time of the queries into parts: (parts, chunks of each part)."""
    chunks = ceil_div(t, CUDA_TILE * CUDA_TILES_PER_CHUNK)
    run = ceil_div(len(k) * chunks * ceil_div(k.shape[2], _channels(s)), CUDA_MAX_BLOCKS)
    return ceil_div(chunks, run), run


def _launch(function: str, k: Tensor, t: int, s: int, parts: int, **tensors: Tensor | None) -> None:
    """Run `parts` of time, or the composition of the chunks where that is zero."""
    b, n, d = k.shape
    chunks, run = _chunks(t, s), _walks(k, t, s)[1]
    sizes = {"batch": b, "tokens": n, "before": n - t, "width": d, "window": s}
    sizes |= {"chunks": chunks, "run": run}
    threads = channels = _channels(s)
    if not parts:
        threads, channels = cuda.composition(chunks, b, d)[0], cuda.WARP
    grid = (b * max(parts, 1) * ceil_div(d, channels), 1, 1)
    CUDA.call(function, grid, threads, sizes, window_macros(s), k=k, **tensors)


def _all_weights(m: Tensor) -> Tensor:
    """Extend m to every distance within the tiles that a query sees, and beyond."""
    s = len(m) - 1
    rows = CUDA_TILE * _tiles(s) + 2
    return torch.cat([m, m.narrow(0, s, 1).expand(rows - len(m), -1)])


def _forward_cuda(k, v, m, state, before: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    (b, n, d), s = k.shape, len(m) - 1
    t, chunks = n - before, _chunks(n - before, s)
    y, last = k.new_empty((b, t, d)), m.new_empty(state.shape)
    # the state before each chunk, and the last one at the end
    edges = m.new_empty((b, chunks + 1, 3, d)) if save or chunks > 1 else None
    tensors = CUDA.laid_out(k=k, v=v, m=_all_weights(m), state=state, edges=edges)
    if chunks > 1:  # the end of the last chunk is not needed
        _launch("chunk_sums", t=t, s=s, parts=chunks - 1, **tensors)
    if edges is not None:
        _launch("compose", t=t, s=s, parts=0, **tensors)
    _launch("outputs", t=t, s=s, parts=_walks(k, t, s)[0], **tensors, y=y, last=last)
    return y, last, edges if save and edges is not None else m.new_empty(0)


def _backward_cuda(dy, dlast, k, v, m, saved) -> tuple[Tensor, ...]:
    (b, _, d), t, s = k.shape, dy.shape[1], len(m) - 1
    chunks, walks, weights = _chunks(t, s), _walks(k, t, s)[0], _all_weights(m)
    dk, dv, dstate = k.new_empty(k.shape), k.new_empty(k.shape), m.new_empty((b, 3, d))
    dm = m.new_empty((b, walks, *weights.shape))
    tensors = CUDA.laid_out(k=k, v=v, m=weights, edges=saved, dy=dy, dlast=dlast)
    tensors |= {"read": m.new_empty((b, t, 2, d)), "ahead": m.new_empty((b, chunks, 2, d))}
    _launch("reads", t=t, s=s, parts=walks, **tensors, dm=dm)
    _launch("compose_back", t=t, s=s, parts=0, **tensors, dstate=dstate)
    _launch("gradients", t=t, s=s, parts=chunks, **tensors, dk=dk, dv=dv)
    inside, beyond = dm.sum((0, 1)).split([s, len(weights) - s])
    return dk, dv, torch.cat([inside, beyond.sum(0, keepdim=True)]), dstate


WINDOW = NativeOp(
    "aft_window",
    forward="k v m state before:int save:bool -> y last saved",
    backward="dy dlast? k v m saved -> dk dv dm dstate",
    cpu=(_forward, _backward),
    cuda=(_forward_cuda, _backward_cuda),
    kernels=(KERNEL, CUDA),
    # a product and a sum for numerator and denominator and each weight; exponentials besides
    flops=lambda k, m, before, **_: (4 * m[0] + 15) * k[0] * (k[1] - before) * k[2],
)
