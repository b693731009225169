"""Computes root mean square layer normalisation (Zhang & Sennrich 2019, equation 4).

    y_i = x_i w_i / sqrt(mean_k x_k^2 + eps)        over the last dimension

Backends: `reference` is the formula, `torch` is `F.rms_norm`, `native` is kernels/rms_norm (CPU).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.ops.dtypes import wide_dtype
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel, number
from zoo.ops.runtime.dispatch import record, select_backend
from zoo.ops.runtime.native_op import NativeOp, can_bypass_dispatcher

KERNEL = CpuKernel(
    "rms_norm/rms_norm.c",
    sizes="batch tokens width",
    rows={"x y dy dx": "batch tokens width"},
    pointers={"weight": "width", "eps": "1", "dweight": "batch tokens/segment width"},
    outputs="y dx dweight",
)


def rms_norm(
    x: Float[Tensor, "... d"], weight: Float[Tensor, " d"], eps: float, backend: str = "auto"
) -> Float[Tensor, "... d"]:
    """Normalise every token, in x's dtype.

    Raises `ValueError` on shapes that do not fit, `UserError` where the backend is not available.
    """
    if backend == "auto" and x.dim() == 3 and weight.shape == x.shape[2:]:
        here = KERNEL.accepts(x, weight) is not False and can_bypass_dispatcher(x, weight)
        if here and KERNEL.usable() is True:
            record("rms_norm", "native")
            return _forward(x, weight, eps)
    check("rms_norm", {"x": "* d", "weight": "d"}, x, weight)
    if x.dim() != 3:
        d = len(weight)
        tokens = x.numel() // d if d else 0
        return rms_norm(x.reshape(1, tokens, d), weight, eps, backend).view(x.shape)
    here = KERNEL.accepts(x, weight)
    name = select_backend("rms_norm", backend, {"native": here, "torch": True, "reference": True})
    if name == "torch":
        if x.dtype == weight.dtype:
            return F.rms_norm(x, weight.shape, weight, eps)
        wide = torch.promote_types(wide_dtype(x), weight.dtype)  # PyTorch warns of two dtypes
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)
    if name == "reference":
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return NORM(x, weight, eps)


class RMSNorm(nn.Module):
    """Applies `rms_norm` with a weight that is learned."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return rms_norm(x, self.weight, self.eps)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose weight is what is added to one, so that weight decay pulls to one (Gemma)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        wide = wide_dtype(x)
        return rms_norm(x.to(wide), 1 + self.weight.to(wide), self.eps).to(x.dtype)


def _forward(x, weight, eps: float) -> Tensor:
    arrays = {"x": x, "weight": weight, "eps": number(eps, x.dtype)}
    return KERNEL.run("forward", (*x.shape,), ["y"], **arrays)[0]


def _backward(dy, x, weight, eps: float) -> tuple[Tensor, Tensor]:
    arrays = {"x": x, "dy": dy, "weight": weight, "eps": number(eps, x.dtype)}
    dx, dweight = KERNEL.run("backward", (*x.shape,), ["dx", "dweight"], **arrays)
    return dx, dweight.sum((0, 1))


NORM = NativeOp(
    "rms_norm",
    forward="x weight eps:float -> y",
    backward="dy x weight eps:float -> dx dweight",
    cpu=(_forward, _backward),
    kernels=(KERNEL, None),
)
