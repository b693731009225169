"""Partial attention results over disjoint keys, merged exactly, in any order.

    lse = log sum_p exp(lse_p)          o = sum_p exp(lse_p - lse) o_p

with `o_p` the output over the keys of part p and `lse_p` the logarithm of its denominator (Dao
2022, FlashAttention, section 3.1; Liu 2023, Ring Attention, section 3). The gradient flows through
both. Backends: `torch` is the formula, `native` is kernels/merge (CPU), two parts at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.ops.runtime import cpu as native
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.dispatch import select_backend

KERNEL = native.CpuKernel(
    "merge/merge.c",
    sizes="batch tokens heads width",
    rows={
        "o1 o2 out d_out d_o1 d_o2": "batch tokens heads*width",
        "lse1 lse2 lse d_lse d_l1 d_l2": "batch tokens heads",
    },
    pointers={},
    outputs="out lse d_o1 d_o2 d_l1 d_l2",
)

SHAPES = {"out": "* h e", "lse": "* h", "another out": "* h e", "another lse": "* h"}
Partial = tuple[Float[Tensor, "b *t h e"], Float[Tensor, "b *t h"]]  # (out, lse)


def merge(results: Sequence[Partial], backend: str = "auto") -> Partial:
    """Attention over the keys of all parts; a part that sees none has lse -inf.

    Raises `ValueError` on shapes that do not fit, `UserError` where the backend is not there.
    """
    if not results:
        raise ValueError("merge: no parts")
    for another in results:
        check("merge", SHAPES, *results[0], *another)
    out, lse = results[0]
    if len(results) == 1:
        return out, lse
    if out.dim() != 4:  # queries in blocks, say
        flat = [(o.flatten(1, -3), x.flatten(1, -2)) for o, x in results]
        return tuple(x.unflatten(1, out.shape[1:-2]) for x in merge(flat, backend))  # type: ignore
    tensors = sum(results, ())
    if (
        select_backend("merge", backend, {"native": KERNEL.takes(*tensors), "torch": True})
        == "torch"
    ):
        return _formula(results)
    two: Callable[..., Partial] = _both if native.can_bypass_dispatcher(*tensors) else both
    return reduce(lambda a, b: two(*a, *b), results[1:], (out, lse))


def _formula(results: Sequence[Partial]) -> Partial:
    lses = torch.stack([lse for _, lse in results])
    top = lses.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)  # no part sees a key: all weights become 0
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    seen = total != 0
    total = total.masked_fill(~seen, 1.0)
    (first, *others), share = results, (weights / total).unsqueeze(-1)
    out = share[0] * first[0]
    for weight, (o, _) in zip(share[1:], others, strict=True):
        out = torch.addcmul(out, weight, o.to(out.dtype))
    lse = (top + torch.log(total)).masked_fill(~seen, -torch.inf)
    return out.to(results[0][0].dtype), lse


def _both(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = o1.new_empty(o1.shape), lse1.new_empty(lse1.shape)
    tensors = {"o1": o1, "o2": o2, "lse1": lse1, "lse2": lse2}
    _call("forward", o1, tensors | {"out": out, "lse": lse})
    return out, lse


both = torch.library.custom_op("zoo::merge", _both, mutates_args=(), device_types="cpu")


@both.register_fake
def _(o1, lse1, o2, lse2):
    del o2, lse2
    return o1.new_empty(o1.shape), lse1.new_empty(lse1.shape)


def _both_backward(
    d_out: Tensor, d_lse: Tensor | None, o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs."""
    d_o1, d_l1, d_o2, d_l2 = (x.new_empty(x.shape) for x in (o1, lse1, o2, lse2))
    tensors = {"d_out": d_out, "d_lse": d_lse, "o1": o1, "lse1": lse1, "o2": o2, "lse2": lse2}
    grads = {"d_o1": d_o1, "d_l1": d_l1, "d_o2": d_o2, "d_l2": d_l2}
    _call("backward", o1, tensors | grads)
    return d_o1, d_l1, d_o2, d_l2


both_backward = torch.library.custom_op(
    "zoo::merge_backward", _both_backward, mutates_args=(), device_types="cpu"
)


@both_backward.register_fake
def _(d_out, d_lse, o1, lse1, o2, lse2):
    del d_out, d_lse
    return tuple(x.new_empty(x.shape) for x in (o1, lse1, o2, lse2))


def _call(function: str, o1: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
    flat = {name: x.flatten(2) if x is not None else None for name, x in tensors.items()}
    KERNEL.call(function, tuple(o1.shape), **flat)


def _save(ctx, inputs, output) -> None:
    del output
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, d_lse):
    saved = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(saved[0])
    tensors = (d_out, d_lse, *saved)
    return (_both_backward if native.can_bypass_dispatcher(*tensors) else both_backward)(*tensors)


both.register_autograd(_backward, setup_context=_save)
