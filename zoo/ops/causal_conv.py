"""Depthwise causal convolution, as stands before Mamba's recurrence (Gu & Dao 2023, figure 3).

    y_t = silu(bias + sum_k weight_k x_{t - width + 1 + k})        per channel

The state is the last `width - 1` inputs; before the first token they are zero.
Backends: `reference` is that sum; `torch` is `F.conv1d`; `native` is kernels/causal_conv (CPU and
CUDA); `causal_conv1d`, by name only, is that library (CUDA).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import choose
from zoo.ops.runtime import cpu as native
from zoo.ops.runtime import cuda, libraries
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.dispatch import select_backend

KERNEL = native.CpuKernel(
    "causal_conv/causal_conv.c",
    sizes="batch tokens width 1<=window<=most silu",
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
CUDA = cuda.CudaKernel(
    "causal_conv/causal_conv.cu",
    sizes="tokens width segments silu",
    rows="x state",
    sequences="y last dy dx dstate",
    pointers="weight bias dweight dbias",
)
SHAPES = {"x": "b t d", "weight": "d width", "bias": "d?", "state": "b before d?"}
SEGMENT, THREADS = 64, 128  # of the CUDA kernel


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
    fit, `UserError` where the backend is not there.
    """
    choose("activation", str(activation), ["silu", "None"])
    check("causal_conv", SHAPES, x, weight, bias, state)
    (b, t, d), width = x.shape, weight.shape[-1]
    if state is not None and state.shape[1] != width - 1:
        raise ValueError(f"causal_conv: state is {tuple(state.shape)}, must be {(b, width - 1, d)}")
    if not t:
        raise ValueError("causal_conv: no tokens")
    if not 2 <= width <= 8:
        raise ValueError(f"causal_conv: the window is 2 to 8 tokens wide, not {width}")
    macros = partial(_macros, window=width)
    here = cuda.native_here(KERNEL, CUDA, x.device, x.dtype, macros)
    theirs = libraries.usable(
        "causal_conv1d",
        x,
        (width > 4, "its window is 2 to 4 tokens wide"),
        (d % 8 != 0, "it needs a multiple of 8 channels"),
        (x.dtype not in libraries.DTYPES, "it has no float64"),
    )
    available = {"native": here, "torch": True, "causal_conv1d": theirs, "reference": True}
    name = select_backend("causal_conv", backend, available)
    wide = torch.promote_types(x.dtype, torch.float32)
    before = x.new_zeros((b, width - 1, d)) if state is None else state
    narrow = name == "native" and x.device.type == "cuda"  # it reads and writes x's type itself
    x_, before = (a.to(x.dtype if narrow else wide) for a in (x, before))
    w, bias = weight.to(wide), None if bias is None else bias.to(wide)
    if name == "causal_conv1d":
        before = before.to(x.dtype)
        y = libraries.causal_conv(x, w, bias, None if state is None else before, activation)
        last = torch.cat([before, x[:, -(width - 1) :]], 1)[:, -(width - 1) :]
    elif name == "native":
        form = conv
        if native.can_bypass_dispatcher(x_, w, bias, before):
            form = _conv_cuda if narrow else _conv
        y, last = form(x_, w, bias, before, activation == "silu")
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


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """y and the last inputs, (b, window - 1, d)."""
    y, last = (torch.empty_like(a, memory_format=torch.contiguous_format) for a in (x, state))
    inputs = {"x": x, "weight": weight, "bias": bias, "state": state}
    KERNEL.call("forward", (*x.shape, weight.shape[1], silu), **inputs, y=y, last=last)
    return y, last


conv = torch.library.custom_op("zoo::causal_conv", _conv, mutates_args=(), device_types="cpu")


@conv.register_fake
def _(x, weight, bias, state, silu):
    del weight, bias, silu
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _conv_backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the incoming state."""
    (b, t, d), window = x.shape, weight.shape[1]
    segments = -(-t // KERNEL.constant("segment", x.dtype))
    dx, dstate = torch.empty(x.shape, dtype=x.dtype), torch.empty(state.shape, dtype=x.dtype)
    dweight = torch.empty((b, segments, window, d), dtype=x.dtype)
    dbias = torch.empty((b, segments, d), dtype=x.dtype)
    inputs = {"x": x, "weight": weight, "bias": bias, "state": state, "dy": dy}
    outputs = {"dx": dx, "dstate": dstate, "dweight": dweight, "dbias": dbias}
    KERNEL.call("backward", (*x.shape, window, silu), **inputs, **outputs)
    _add_last(dx, dstate, dlast)
    return dx, dweight.sum((0, 1)).t().contiguous(), dbias.sum((0, 1)), dstate


def _add_last(dx: Tensor, dstate: Tensor, dlast: Tensor | None) -> None:
    """The last inputs are those of x, and before them of the old state."""
    if dlast is not None:
        t, before = dx.shape[1], dstate.shape[1]
        kept = max(before - t, 0)
        dstate[:, before - kept :] += dlast[:, :kept]
        dx[:, t - (before - kept) :] += dlast[:, kept:]


conv_backward = torch.library.custom_op(
    "zoo::causal_conv_backward", _conv_backward, mutates_args=(), device_types="cpu"
)


@conv_backward.register_fake
def _(dy, dlast, x, weight, bias, state, silu):
    del dy, dlast, bias, silu
    dbias = weight.new_empty(x.shape[2])
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, state.new_empty(state.shape)


def _macros(dtype: torch.dtype, window: int) -> cuda.Macros:
    return ("DTYPE", cuda.DTYPES[dtype]), ("WINDOW", window)


def _launch(
    function: str, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, **tensors: Tensor
) -> None:
    b, t, d = x.shape
    segments = -(-t // SEGMENT)
    sizes = {"tokens": t, "width": d, "segments": segments, "silu": int(silu)}
    inputs = {"x": cuda.dense(x), "state": cuda.dense(tensors.pop("state"))}
    inputs |= {"weight": weight.contiguous(), "bias": None if bias is None else bias.contiguous()}
    grid, macros = (-(-d // THREADS) * segments, 1, b), _macros(x.dtype, weight.shape[1])
    CUDA.call(function, grid, THREADS, macros, sizes, **inputs, **tensors)


@conv.register_kernel("cuda")
def _conv_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    y, last = x.new_empty(x.shape), x.new_empty(state.shape)
    _launch("forward", x, weight, bias, silu, state=state, y=y, last=last)
    return y, last


@conv_backward.register_kernel("cuda")
def _conv_backward_cuda(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, t, d), window = x.shape, weight.shape[1]
    segments = -(-t // SEGMENT)
    dx, dstate = x.new_empty(x.shape), x.new_empty(state.shape)
    dweight = weight.new_empty((b, segments, window, d))
    dbias = weight.new_empty((b, segments, d))
    outputs = {"dx": dx, "dstate": dstate, "dweight": dweight, "dbias": dbias}
    _launch("backward", x, weight, bias, silu, state=state, dy=dy.contiguous(), **outputs)
    _add_last(dx, dstate, dlast)
    return dx, dweight.sum((0, 1)).t().contiguous(), dbias.sum((0, 1)), dstate


def _save(ctx, inputs, output) -> None:
    del output
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dlast):
    x, weight, bias, state = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    arguments = (dy, dlast, x, weight, bias, state)
    form = conv_backward
    if native.can_bypass_dispatcher(*arguments):
        form = _conv_backward if dy.device.type == "cpu" else _conv_backward_cuda
    dx, dweight, dbias, dstate = form(*arguments, ctx.silu)
    return dx, dweight, None if bias is None else dbias, dstate, None


conv.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.zoo.causal_conv)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """A product and a sum per tap."""
    return 2 * x.numel() * weight[-1]
