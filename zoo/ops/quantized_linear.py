"""Computes products with a matrix W (n, k) that is kept in 8 or 4 bits:

    y = x W^T,      int8   W_oi = s_o q_oi,                     q in -127 .. 127
                    int4   W_oi = s_og q_oi + z_og, g = i / 32, q in -8 .. 7

W may be rounded however one likes; here is only how it is kept and used. Scales s and zeros z are
bfloat16. In 4 bits a byte holds two inputs of a group of 32: byte i has input i in its lower half
and input i + 16 in its upper one.

Backends: `reference` restores W and multiplies; `torch` does so by blocks of outputs, so that W is
never restored whole; `native` is kernels/quantized_linear, which reads the bits (CPU, few rows, no
gradient): there a product costs what its memory costs, a quarter or less.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor

from zoo.ops.dtypes import wide_dtype
from zoo.ops.runtime.checks import DTYPES, check
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.dispatch import Available, record, select_backend
from zoo.ops.runtime.native_op import can_bypass_dispatcher

GROUP = 32  # inputs that share a scale in 4 bits
MAX_ROWS = 64  # of x, for which the kernel is the faster one
BLOCK = 2**22  # numbers of W that are restored at a time

MAX_MATRICES = 4  # of one call of the kernel

_NUMBERS = ("", *range(1, MAX_MATRICES))
KERNEL = CpuKernel(
    "quantized_linear/quantized_linear.c",
    sizes=" ".join(["rows<=max_rows inputs bytes scales", *(f"outputs{i}" for i in _NUMBERS)]),
    rows={"x": "1 rows inputs"} | {f"y{i}": f"1 rows outputs{i}" for i in _NUMBERS},
    pointers={f"q{i}": f"outputs{i} bytes" for i in _NUMBERS}
    | {f"scale{i}": f"outputs{i} scales" for i in _NUMBERS},
    outputs=" ".join(f"y{i}" for i in _NUMBERS),
    dtypes={f"q{i}": torch.int8 for i in _NUMBERS}
    | {f"scale{i}": torch.bfloat16 for i in _NUMBERS},
)
_OUTPUTS = [f"y{i}" for i in _NUMBERS]
_ARRAYS = [(f"q{i}", f"scale{i}") for i in _NUMBERS]


def quantized_linear(
    x: Float[Tensor, "... k"],
    q: Int8[Tensor, "n bytes"],
    scale: BFloat16[Tensor, "n scales"],
    backend: str = "auto",
) -> Float[Tensor, "... n"]:
    """The product, in x's dtype; sums are in float32 or better.

    `scale` (n, 1) says that q (n, k) is int8; else q is (n, k / 2), and scale (n, k / 16) has each
    group's s and z side by side. Raises `ValueError` on shapes that do not fit, `UserError` where
    the backend is not available.
    """
    check("quantized_linear", {"x": "* k"}, x)
    n, k = shape(q, scale)
    if x.shape[-1] != k:
        raise ValueError(f"quantized_linear: x is {tuple(x.shape)}, must be (.., {k})")
    here = _accepts(x, q)
    available = {"native": here, "torch": True, "reference": True}
    name = select_backend("quantized_linear", backend, available)
    if name == "native":
        return _native(x, [(q, scale)])[0]
    if name == "reference":
        wide = x.to(wide_dtype(x))
        return F.linear(wide, restored(q, scale, wide.dtype)).to(x.dtype)
    rows, step = x.reshape(-1, k), max(1, BLOCK // k)
    parts = zip(q.split(step), scale.split(step), strict=True)
    y = torch.cat([F.linear(rows, restored(*part, x.dtype)) for part in parts], -1)
    return y.view(*x.shape[:-1], n)


def quantized_linears(
    x: Float[Tensor, "... k"], matrices: Sequence[tuple[Tensor, Tensor]]
) -> list[Float[Tensor, "... _"]]:
    """The products of x with several matrices (q, scale), each as `quantized_linear` returns it."""
    if not _one_call(x, matrices) or KERNEL.usable() is not True:
        return [quantized_linear(x, *one) for one in matrices]
    record("quantized_linear", "native")
    return _native(x, matrices)


def _one_call(x: Tensor, matrices: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the kernel takes all of them together; what does not fit is refused elsewhere."""
    bits, scales = matrices[0]
    k, columns, groups = x.shape[-1], bits.shape[1], scales.shape[1]
    if len(matrices) > MAX_MATRICES or not k or x.numel() > MAX_ROWS * k or not x.is_cpu:
        return False
    if x.dtype not in DTYPES or k != (columns if groups == 1 else 2 * columns):
        return False
    for q, scale in matrices:
        if q.shape[1] != columns or scale.shape[1] != groups or q.shape[0] != scale.shape[0]:
            return False
        if q.dtype != torch.int8 or not q.is_cpu:
            return False
    tensors = [part for pair in matrices for part in pair]
    return can_bypass_dispatcher(x, *tensors) and (groups == 1 or groups * GROUP == 2 * k)


def _native(x: Tensor, matrices: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    lead, k = x.shape[:-1], x.shape[-1]
    rows, dtype = lead.numel(), wide_dtype(x)
    wide = x if x.dtype == dtype else x.to(dtype)
    x_rows = wide if len(lead) == 2 and lead[0] == 1 else wide.reshape(1, rows, k)
    given, outputs, count = {"x": x_rows}, [0] * MAX_MATRICES, len(matrices)
    for i in range(count):
        (q, scale), (q_name, scale_name) = matrices[i], _ARRAYS[i]
        given[q_name], given[scale_name], outputs[i] = q, scale, q.shape[0]
    q, scale = matrices[0]
    sizes = (rows, k, q.shape[1], scale.shape[1], *outputs)
    function = "int8" if scale.shape[1] == 1 else "int4"
    ys = KERNEL.run(function, sizes, _OUTPUTS[:count], **given)
    return ys if x_rows is x else [y.to(x.dtype).view(*lead, y.shape[-1]) for y in ys]


def shape(q: Int8[Tensor, "n bytes"], scale: BFloat16[Tensor, "n scales"]) -> tuple[int, int]:
    """The matrix's shape (n, k). Raises `ValueError` where the two do not fit together."""
    (n, k), (rows, scales) = q.shape, scale.shape
    k = k if scales == 1 else 2 * k
    if rows != n or (scales != 1 and scales * GROUP != 2 * k):
        raise ValueError(
            f"quantized_linear: q {tuple(q.shape)} and scale {tuple(scale.shape)} do not fit"
        )
    return n, k


def restored(
    q: Int8[Tensor, "*n bytes"],
    scale: BFloat16[Tensor, "*n scales"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*n k"]:
    """The matrix itself, or some of its rows, computed in float32 or better."""
    wide = torch.promote_types(dtype, torch.float32)
    if scale.shape[-1] == 1:
        return (q.to(wide) * scale.to(wide)).to(dtype)
    pairs = q.unflatten(-1, (-1, GROUP // 2))
    both = torch.cat([(pairs << 4) >> 4, pairs >> 4], -1)
    s, z = scale.to(wide).unflatten(-1, (-1, 2)).unsqueeze(-1).unbind(-2)
    return (both * s + z).flatten(-2).to(dtype)


def _accepts(x: Tensor, q: Tensor) -> Available:
    k = x.shape[-1]
    if not x.is_cpu or not q.is_cpu or not can_bypass_dispatcher(x, q):
        return False
    return KERNEL.usable if x.numel() <= MAX_ROWS * k else False
