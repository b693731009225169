"""Rotates pairs of channels by given angles (Su 2021, RoFormer, section 3.4).

    y_i        = x_i cos_i - x_(i+half) sin_i
    y_(i+half) = x_i sin_i + x_(i+half) cos_i        i = 0 .. half - 1, the rest as they are

Backends: `reference` is the formula, `torch` writes it in place, `native` is kernels/rotary (CPU).
The gradient of the last two is the rotation back and reaches x alone, so `auto` takes the formula
where cos or sin require a gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.dispatch import record, select_backend
from zoo.ops.runtime.native_op import NativeOp, can_bypass_dispatcher

KERNEL = CpuKernel(
    "rotary/rotary.c",
    sizes="batch tokens heads0 heads1 width half",
    rows={
        "x0": "batch tokens heads0*width",
        "x1": "batch tokens heads1*width",
        "y0": "batch tokens heads0*width",
        "y1": "batch tokens heads1*width",
        "cos sin": "batch tokens half",
    },
    pointers={},
    outputs="y0 y1",
)


def apply_rotary(
    x: Float[Tensor, "b t h d"],
    cos: Float[Tensor, "*bt 1 half"],
    sin: Float[Tensor, "*bt 1 half"],
    backend: str = "auto",
) -> Float[Tensor, "b t h d"]:
    """Rotate x, in its dtype; cos and sin are broadcast over the batch, the tokens and the heads.

    Raises `ValueError` on more pairs than channels, `UserError` where the backend is not available.
    """
    width = _width(x, cos, sin)
    fixed = not (cos.requires_grad or sin.requires_grad)
    here = KERNEL.accepts(x, cos, sin) if fixed else False
    name = select_backend("rotary", backend, {"native": here, "torch": fixed, "reference": True})
    if name == "native":
        return ROTATION(x, cos, sin)
    x, rest = x[..., :width], x[..., width:]
    rotated = _InPlace.apply(x, cos, sin) if name == "torch" else _formula(x, cos, sin)
    return torch.cat([rotated, rest], -1) if rest.shape[-1] else rotated


def apply_rotary_to_both(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    cos: Float[Tensor, "*bt 1 half"],
    sin: Float[Tensor, "*bt 1 half"],
) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b t g d"]]:
    """`apply_rotary` of queries and keys, in one call of the kernel where no gradient is wanted."""
    alike = q.dim() == 4 and q.shape[:2] == k.shape[:2] and q.shape[3:] == k.shape[3:]
    here = KERNEL.accepts(q, k, cos, sin) is not False and can_bypass_dispatcher(q, k, cos, sin)
    if not (alike and here) or KERNEL.usable() is not True:
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    _width(q, cos, sin)
    record("rotary", "native")
    y_q, y_k = _rotated((q, k), cos, sin)
    return y_q, y_k


def _width(x: Tensor, cos: Tensor, sin: Tensor) -> int:
    """Check everything; returns how many channels are rotated."""
    check("rotary", {"x": "b t h d", "cos": "* 1 half", "sin": "* 1 half"}, x, cos, sin)
    b, t, _, d = x.shape
    *lead, _, half = cos.shape
    broadcast = [size in (1, whole) for size, whole in zip(lead[::-1], (t, b), strict=False)]
    if len(lead) > 2 or not all(broadcast):
        raise ValueError(f"rotary: cos is {tuple(cos.shape)} and x {tuple(x.shape)}")
    _fit(2 * half, d)
    return 2 * half


def _fit(width: int, d: int) -> None:
    if width > d:
        raise ValueError(f"rotary width {width} is more than the head width {d}")


def _formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return torch.cat(rotate_pairs(x1, x2, cos, sin), -1)


def rotate_pairs(x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first and the second channel of all pairs, of any shapes that broadcast."""
    return x1 * cos - x2 * sin, x1 * sin + x2 * cos


class _InPlace(torch.autograd.Function):
    """Computes the formula without its copies, which take half of its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = x.new_empty(x.shape)
        (x1, x2), (y1, y2) = x.chunk(2, -1), out.chunk(2, -1)
        torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
        torch.mul(x1, sin, out=y2).addcmul_(x2, cos)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        cos, sin = ctx.saved_tensors
        return _InPlace.apply(grad, cos, -sin), None, None


def _forward(x, cos, sin) -> Tensor:
    return _rotated((x,), cos, sin)[0]


def _rotated(xs: Sequence[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """One or two arrays of the same tokens."""
    (b, t, h, d), half = xs[0].shape, cos.shape[-1]
    _fit(2 * half, d)
    if cos.shape != (b, t, half):  # as that of one token of one text is
        cos, sin = cos.squeeze(-2).expand(b, t, half), sin.squeeze(-2).expand(b, t, half)
    both = len(xs) > 1
    given: dict[str, Tensor | None] = {"x0": xs[0].flatten(2), "cos": cos, "sin": sin}
    if both:
        given["x1"] = xs[1].flatten(2)
    sizes = b, t, h, xs[1].shape[2] if both else 0, d, half
    ys = KERNEL.run("forward", sizes, ["y0", "y1"] if both else ["y0"], **given)
    return [y.view(x.shape) for x, y in zip(xs, ys, strict=True)]


def _backward(dy, cos, sin) -> Tensor:
    return _forward(dy, cos, -sin)


ROTATION = NativeOp(
    "rotary",
    forward="x cos sin -> y",
    backward="dy cos sin -> dx",
    cpu=(_forward, _backward),
    kernels=(KERNEL, None),
)


def _keep_angles(ctx, inputs, output) -> None:
    del output  # PyTorch names it
    ctx.save_for_backward(*inputs[1:])


def _differentiate_twice(ctx, ddx):
    """The gradient is linear in dy: its own gradient rotates forward again."""
    return ROTATION(ddx, *ctx.saved_tensors), None, None


ROTATION.backward_op.register_autograd(_differentiate_twice, setup_context=_keep_angles)
