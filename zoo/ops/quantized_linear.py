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

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor

from zoo.ops.dtypes import wide_dtype
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.dispatch import Available, select_backend
from zoo.ops.runtime.native_op import can_bypass_dispatcher

GROUP = 32  # inputs that share a scale in 4 bits
MAX_ROWS = 64  # of x, for which the kernel is the faster one
BLOCK = 2**22  # numbers of W that are restored at a time

KERNEL = CpuKernel(
    "quantized_linear/quantized_linear.c",
    sizes="rows<=max_rows outputs inputs bytes scales",
    rows={"x": "1 rows inputs", "y": "1 rows outputs"},
    pointers={"q": "outputs bytes", "scale": "outputs scales"},
    outputs="y",
    dtypes={"q": torch.int8, "scale": torch.bfloat16},
)


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
    if name == "reference":
        wide = x.to(wide_dtype(x))
        return F.linear(wide, restored(q, scale, wide.dtype)).to(x.dtype)
    rows = x.reshape(-1, k)
    if name == "torch":
        step = max(1, BLOCK // k)
        parts = zip(q.split(step), scale.split(step), strict=True)
        y = torch.cat([F.linear(rows, restored(*part, x.dtype)) for part in parts], -1)
        return y.view(*x.shape[:-1], n)
    wide = rows.to(wide_dtype(x))
    sizes = (len(rows), n, k, q.shape[1], scale.shape[1])
    function = "int8" if scale.shape[1] == 1 else "int4"
    (y,) = KERNEL.run(function, sizes, ["y"], x=wide[None], q=q, scale=scale)
    return y.to(x.dtype).view(*x.shape[:-1], n)


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
