"""Computes the causal depthwise convolution before Mamba's recurrence (Gu & Dao 2023, figure 3).

    y_t = silu(bias + sum_k weight_k x_{t - width + 1 + k})        per channel

The state is the last `width - 1` inputs; before the first token they are zero.
Backends: `reference` is that sum; `torch` is `F.conv1d`; `native` is kernels/causal_conv (CPU and
CUDA); `causal_conv1d`, by name only, is that library (CUDA).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.errors import choose
from zoo.ops.runtime import libraries
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.cuda import CudaKernel
from zoo.ops.runtime.dispatch import select_backend
from zoo.ops.runtime.native_op import NativeOp, compute_dtypes
from zoo.ops.runtime.sizes import ceil_div

KERNEL = CpuKernel(
    "causal_conv/causal_conv.c",
    sizes="batch tokens width 1<=window<=max_window silu",
    rows={
        "x": "batch tokens width",
        "state": "batch window-1 width",
        "y": "batch tokens width",
        "last": "batch window-1 width",
        "dy dx": "batch tokens width",
        "dstate": "batch window-1 width",
    },
    pointers={
        "weight": "width window",
        "bias": "width",
        "dweight": "batch tokens/segment window width",
        "dbias": "batch tokens/segment width",
    },
    outputs="y last dx dstate dweight dbias",
)
CUDA = CudaKernel(
    "causal_conv/causal_conv.cu",
    sizes="tokens width segments silu",
    rows="x state",
    sequences="y last dy dx dstate",
    pointers="weight bias dweight dbias",
    macros=(("WINDOW", 4),),
)
SHAPES = {"x": "b t>0 d", "weight": "d width", "bias": "d?", "state": "b before d?"}
CUDA_SEGMENT, CUDA_THREADS = 64, 128  # tokens and channels of a block


def causal_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d width"],
    bias: Float[Tensor, " d"] | None = None,
    activation: str | None = "silu",
    state: Float[Tensor, "b width-1 d"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b width-1 d"]]:
    """Convolve each channel of x with its own window of 2 to 8 tokens. Returns y and the state.

    Both have x's dtype; sums are in float32 or better. Raises `ValueError` on shapes that do not
    fit, `UserError` where the backend is not available.
    """
    choose("activation", str(activation), ["silu", "None"])
    check("causal_conv", SHAPES, x, weight, bias, state)
    (b, _, d), width = x.shape, weight.shape[-1]
    if state is not None and state.shape[1] != width - 1:
        raise ValueError(f"causal_conv: state is {tuple(state.shape)}, must be {(b, width - 1, d)}")
    if not 2 <= width <= 8:
        raise ValueError(f"causal_conv: the window is 2 to 8 tokens wide, not {width}")
    here = CONV.available(x.device, x.dtype, (("WINDOW", width),))
    theirs = libraries.usable(
        "causal_conv1d",
        x,
        (width > 4, "its window is 2 to 4 tokens wide"),
        (d % 8 != 0, "it needs a multiple of 8 channels"),
        (x.dtype not in libraries.DTYPES, "it has no float64"),
    )
    available = {"native": here, "torch": True, "causal_conv1d": theirs, "reference": True}
    name = select_backend("causal_conv", backend, available)
    row, wide = compute_dtypes(name, x)
    before = x.new_zeros((b, width - 1, d)) if state is None else state
    x_, before = x.to(row), before.to(row)
    w, bias = weight.to(wide), None if bias is None else bias.to(wide)
    if name == "causal_conv1d":
        before = before.to(x.dtype)
        y = libraries.causal_conv(x, w, bias, None if state is None else before, activation)
        last = torch.cat([before, x[:, -(width - 1) :]], 1)[:, -(width - 1) :]
    elif name == "native":
        y, last = CONV(x_, w, bias, before, activation == "silu")
    else:
        inputs = torch.cat([before, x_], 1)
        y = (_reference if name == "reference" else _torch)(inputs, w)
        y = y if bias is None else y + bias
        y = y if activation is None else F.silu(y)
        last = inputs[:, -(width - 1) :]
    return y.to(x.dtype), last.to(x.dtype)


def _reference(inputs: Tensor, weight: Tensor) -> Tensor:
    windows = inputs.unfold(1, weight.shape[1], 1)  # (b, t, d, width)
    return (windows * weight).sum(-1)


def _torch(inputs: Tensor, weight: Tensor) -> Tensor:
    y = F.conv1d(inputs.transpose(1, 2), weight[:, None], groups=weight.shape[0])
    return y.transpose(1, 2)


def _forward(x, weight, bias, state, silu: bool) -> list[Tensor]:
    arrays = {"x": x, "weight": weight, "bias": bias, "state": state}
    return KERNEL.run("forward", (*x.shape, weight.shape[1], silu), ["y", "last"], **arrays)


def _backward(dy, dlast, x, weight, bias, state, silu: bool) -> tuple[Tensor, ...]:
    arrays = {"x": x, "weight": weight, "bias": bias, "state": state, "dy": dy}
    outputs = ["dx", "dstate", "dweight", "dbias"]
    found = KERNEL.run("backward", (*x.shape, weight.shape[1], silu), outputs, **arrays)
    return _gradients(dlast, *found)


def _gradients(dlast: Tensor | None, dx: Tensor, dstate: Tensor, dweight: Tensor, dbias: Tensor):
    """Sum over segments; `dlast` is that of the last inputs: of x, and before them of the state."""
    if dlast is not None:
        t, before = dx.shape[1], dstate.shape[1]
        older = max(before - t, 0)
        dstate[:, before - older :] += dlast[:, :older]
        dx[:, t - (before - older) :] += dlast[:, older:]
    dweight = dweight.sum((0, 1)).t().clone(memory_format=torch.contiguous_format)
    return dx, dweight, dbias.sum((0, 1)), dstate


def _launch(function: str, x: Tensor, weight: Tensor, silu: bool, **tensors: Tensor | None) -> None:
    b, t, d = x.shape
    segments = ceil_div(t, CUDA_SEGMENT)
    sizes = {"tokens": t, "width": d, "segments": segments, "silu": int(silu)}
    grid, macros = (ceil_div(d, CUDA_THREADS) * segments, 1, b), (("WINDOW", weight.shape[1]),)
    tensors |= CUDA.laid_out(x=x, weight=weight)
    CUDA.call(function, grid, CUDA_THREADS, sizes, macros, **tensors)


def _forward_cuda(x, weight, bias, state, silu: bool) -> tuple[Tensor, Tensor]:
    y, last = x.new_empty(x.shape), x.new_empty(state.shape)
    tensors = CUDA.laid_out(bias=bias, state=state)
    _launch("forward", x, weight, silu, **tensors, y=y, last=last)
    return y, last


def _backward_cuda(dy, dlast, x, weight, bias, state, silu: bool) -> tuple[Tensor, ...]:
    (b, t, d), window = x.shape, weight.shape[1]
    segments = ceil_div(t, CUDA_SEGMENT)
    dweight, dbias = weight.new_empty((b, segments, window, d)), weight.new_empty((b, segments, d))
    outputs = {"dx": x.new_empty(x.shape), "dstate": x.new_empty(state.shape)}
    outputs |= {"dweight": dweight, "dbias": dbias}
    tensors = CUDA.laid_out(bias=bias, state=state, dy=dy)
    _launch("backward", x, weight, silu, **tensors, **outputs)
    return _gradients(dlast, **outputs)


CONV = NativeOp(
    "causal_conv",
    forward="x weight bias? state silu:bool -> y last",
    backward="dy dlast? x weight bias? state silu:bool -> dx dweight dbias dstate",
    cpu=(_forward, _backward),
    cuda=(_forward_cuda, _backward_cuda),
    kernels=(KERNEL, CUDA),
    flops=lambda x, weight, **_: 2 * x.numel() * weight[-1],  # a product and a sum per tap
)
