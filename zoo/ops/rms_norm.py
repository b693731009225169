"""Root mean square layer normalisation (Zhang & Sennrich 2019, equation 4).

    y_i = x_i w_i / sqrt(mean_k x_k^2 + eps)        over the last dimension

Backends: `reference` is the formula, `torch` is `F.rms_norm`, `native` is kernels/rms_norm (CPU).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.ops.runtime import cpu as native
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.dispatch import select_backend

KERNEL = native.CpuKernel(
    "rms_norm/rms_norm.c",
    sizes="batch tokens width",
    rows={"x y dy dx": "batch tokens width"},
    pointers={"weight": "width", "eps": "1", "dweight": "batch tokens/segment width"},
    outputs="y dx dweight",
)


def rms_norm(
    x: Float[Tensor, "... d"], weight: Float[Tensor, " d"], eps: float, backend: str = "auto"
) -> Float[Tensor, "... d"]:
    """Every token at the scale `weight`, in x's dtype.

    Raises `ValueError` on shapes that do not fit, `UserError` where the backend is not there.
    """
    check("rms_norm", {"x": "* d", "weight": "d"}, x, weight)
    if x.dim() != 3:
        d = len(weight)
        tokens = x.numel() // d if d else 0
        return rms_norm(x.reshape(1, tokens, d), weight, eps, backend).view(x.shape)
    here = KERNEL.takes(x, weight)
    name = select_backend("rms_norm", backend, {"native": here, "torch": True, "reference": True})
    if name == "torch":
        return F.rms_norm(x, weight.shape, weight, eps)
    if name == "reference":
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return (
        _norm(x, weight, eps) if native.can_bypass_dispatcher(x, weight) else norm(x, weight, eps)
    )


class RMSNorm(nn.Module):
    """The op as a layer."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return rms_norm(x, self.weight, self.eps)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    KERNEL.call("forward", (*x.shape,), x=x, y=y, weight=weight, eps=x.new_tensor([eps]))
    return y


norm = torch.library.custom_op("zoo::rms_norm", _norm, mutates_args=(), device_types="cpu")


@norm.register_fake
def _(x, weight, eps):
    del weight, eps
    return x.new_empty(x.shape)


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    (b, t, d), dx = x.shape, torch.empty(x.shape, dtype=x.dtype)
    dweight = x.new_empty((b, -(-t // KERNEL.constant("segment", x.dtype)), d))
    inputs = {"x": x, "dy": dy, "weight": weight, "eps": x.new_tensor([eps])}
    KERNEL.call("backward", (b, t, d), **inputs, dx=dx, dweight=dweight)
    return dx, dweight.sum((0, 1))


norm_backward = torch.library.custom_op(
    "zoo::rms_norm_backward", _norm_backward, mutates_args=(), device_types="cpu"
)


@norm_backward.register_fake
def _(dy, x, weight, eps):
    del dy, eps
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    del output
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    form = _norm_backward if native.can_bypass_dispatcher(dy, x, weight) else norm_backward
    return *form(dy, x, weight, ctx.eps), None


norm.register_autograd(_backward, setup_context=_save)
