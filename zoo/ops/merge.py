"""Merges partial attention results over disjoint keys exactly, in any order.

    lse = log sum_p exp(lse_p)          o = sum_p exp(lse_p - lse) o_p

with `o_p` the output over the keys of part p and `lse_p` the logarithm of its denominator (Dao
2022, FlashAttention, section 3.1; Liu 2023, Ring Attention, section 3). The gradient flows through
both. Backends: `torch` is the formula, `native` is kernels/merge (CPU), two parts at a time.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.dispatch import select_backend
from zoo.ops.runtime.native_op import NativeOp

KERNEL = CpuKernel(
    "merge/merge.c",
    sizes="batch tokens heads width",
    rows={
        "o1 o2 out dout do1 do2": "batch tokens heads*width",
        "lse1 lse2 lse dlse dlse1 dlse2": "batch tokens heads",
    },
    pointers={},
    outputs="out lse do1 do2 dlse1 dlse2",
)

SHAPES = {"out": "* h e", "lse": "* h", "another out": "* h e", "another lse": "* h"}
Partial = tuple[Float[Tensor, "b *t h e"], Float[Tensor, "b *t h"]]  # (out, lse)


def merge(results: Sequence[Partial], backend: str = "auto") -> Partial:
    """Return attention over the keys of all parts; a part that sees none has lse -inf.

    Raises `ValueError` on shapes that do not fit, `UserError` where the backend is not available.
    """
    if not results:
        raise ValueError("merge: no parts")
    out, lse = results[0]
    if len(results) == 1:
        return out, lse
    for another in results:
        check("merge", SHAPES, out, lse, *another)
    if out.dim() != 4:  # queries in blocks, say
        flat = [(o.flatten(1, -3), x.flatten(1, -2)) for o, x in results]
        return tuple(x.unflatten(1, out.shape[1:-2]) for x in merge(flat, backend))  # type: ignore
    tensors = sum(results, ())
    if (
        select_backend("merge", backend, {"native": KERNEL.accepts(*tensors), "torch": True})
        == "torch"
    ):
        return _formula(results)
    return reduce(lambda a, b: tuple(MERGE(*a, *b)), results[1:], (out, lse))


def _formula(results: Sequence[Partial]) -> Partial:
    lses = torch.stack([lse for _, lse in results])
    top = lses.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)  # no part sees a key: all weights become 0
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    visible = total != 0
    total = total.masked_fill(~visible, 1.0)
    (first, *others), share = results, (weights / total).unsqueeze(-1)
    out = share[0] * first[0]
    for weight, (o, _) in zip(share[1:], others, strict=True):
        out = torch.addcmul(out, weight, o.to(out.dtype))
    lse = (top + torch.log(total)).masked_fill(~visible, -torch.inf)
    return out.to(results[0][0].dtype), lse


def _forward(o1, lse1, o2, lse2) -> list[Tensor]:
    arrays = {"o1": o1.flatten(2), "lse1": lse1, "o2": o2.flatten(2), "lse2": lse2}
    out, lse = KERNEL.run("forward", (*o1.shape,), ["out", "lse"], **arrays)
    return [out.view(o1.shape), lse]


def _backward(dout, dlse, o1, lse1, o2, lse2) -> list[Tensor]:
    arrays = {"dout": dout.flatten(2), "dlse": dlse, "lse1": lse1, "lse2": lse2}
    arrays |= {"o1": o1.flatten(2), "o2": o2.flatten(2)}
    do1, dlse1, do2, dlse2 = KERNEL.run(
        "backward", (*o1.shape,), ["do1", "dlse1", "do2", "dlse2"], **arrays
    )
    return [do1.view(o1.shape), dlse1, do2.view(o2.shape), dlse2]


MERGE = NativeOp(
    "merge",
    forward="o1 lse1 o2 lse2 -> out lse",
    backward="dout dlse? o1 lse1 o2 lse2 -> do1 dlse1 do2 dlse2",
    cpu=(_forward, _backward),
    kernels=(KERNEL, None),
)
