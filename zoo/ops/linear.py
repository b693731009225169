"""Computes products of rows x with a matrix W (n, k), y = x W^T + b, fast for a few rows.

Backends: `reference` multiplies in float32 or better, `torch` is `F.linear`, `native` is
kernels/linear (CPU, at most MAX_ROWS rows, no gradient): one token's products cost one read of W.
`auto` takes the kernel where it is faster, and has `torch`'s own numbers everywhere else: in
training, for a prompt, for small matrices.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.ops.dtypes import wide_dtype
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.dispatch import Available, select_backend
from zoo.ops.runtime.native_op import can_bypass_dispatcher

MAX_ROWS = 2  # of x, for which the kernel is the faster one
MIN_WEIGHTS = 2**15  # numbers of W; a call of the kernel costs as much as reading so many

KERNEL = CpuKernel(
    "linear/linear.c",
    sizes="rows<=max_rows outputs inputs",
    rows={"x": "1 rows inputs", "y": "1 rows outputs"},
    pointers={"weight": "outputs inputs", "narrow": "outputs inputs", "bias": "outputs"},
    outputs="y",
    dtypes={"narrow": torch.bfloat16},
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def linear(
    x: Float[Tensor, "... k"],
    weight: Float[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "... n"]:
    """The product, in x's dtype.

    Raises `ValueError` on shapes that do not fit, `UserError` where the backend is not available.
    """
    if backend == "auto" and not _pays(x, weight, bias):
        return F.linear(x, weight, bias)
    if backend != "auto":
        check("linear", {"x": "* k", "weight": "n k", "bias": "n?"}, x, weight, bias)
    accepted = _accepts(x, weight, bias)
    name = select_backend("linear", backend, {"native": accepted, "torch": True, "reference": True})
    if name == "torch":
        return F.linear(x, weight, bias)
    if name == "native":
        return _native(x, weight, bias)
    wide = wide_dtype(x)
    b_wide = None if bias is None else bias.to(wide)
    return F.linear(x.to(wide), weight.to(wide), b_wide).to(x.dtype)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, k = weight.shape
    rows = x.shape[:-1].numel()
    x_rows = x if x.dim() == 3 and len(x) == 1 else x.reshape(1, rows, k)
    if weight.dtype == torch.bfloat16:
        x_wide, b_wide = x_rows.float(), None if bias is None else bias.float()
        given = {"x": x_wide, "narrow": weight, "bias": b_wide}
        y = KERNEL.run("bfloat16", (rows, n, k), ["y"], **given)[0].bfloat16()
    else:
        given = {"x": x_rows, "weight": weight, "bias": bias}
        (y,) = KERNEL.run("real", (rows, n, k), ["y"], **given)
    return y if x_rows is x else y.view(*x.shape[:-1], n)


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes the call and is faster."""
    k = x.shape[-1]
    if x.numel() > MAX_ROWS * k or _accepts(x, weight, bias) is False:
        return False
    return weight.numel() >= MIN_WEIGHTS and weight.shape[-1] == k


def _accepts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Available:
    given = (x, weight) if bias is None else (x, weight, bias)
    if not can_bypass_dispatcher(*given) or torch.is_autocast_enabled("cpu"):
        return False
    dtype = x.dtype
    if dtype not in _DTYPES or x.shape[:-1].numel() > MAX_ROWS:
        return False
    if any(one.layout != torch.strided for one in given) or not (x.is_cpu and weight.is_cpu):
        return False
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return False
    fits = bias is None or bias.shape == weight.shape[:1]  # PyTorch broadcasts another
    return KERNEL.usable if fits else False


class Linear(nn.Linear):
    """PyTorch's layer, whose products are `linear`."""

    def forward(self, input: Float[Tensor, "... k"]) -> Float[Tensor, "... n"]:
        return linear(input, self.weight, self.bias)
