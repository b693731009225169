"""Computes softmax attention over no more keys than a register has lanes (CPU, forward only).

A backend of `zoo.ops.attention` for the sinks of a stream and the like: kernels/small_kv_attention.
"""

from jaxtyping import Float
from torch import Tensor

from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.dispatch import Available
from zoo.ops.runtime.native_op import can_bypass_dispatcher

KERNEL = CpuKernel(
    "small_kv_attention/small_kv_attention.c",
    sizes="batch tokens keys<=max_keys heads width<=max_width value_width",
    rows={
        "q": "batch tokens heads*width",
        "k": "batch keys heads*width",
        "v": "batch keys heads*value_width",
        "out": "batch tokens heads*value_width",
        "lse": "batch tokens heads",
    },
    pointers={"scale": "1"},
    outputs="out lse",
)
MAX_KEYS = 16  # lanes of the widest register there is


def accepts(q: Tensor, k: Tensor, v: Tensor) -> Available:
    """For `select_backend`: whether the kernel reads these, in `attend`'s shapes."""
    if k.shape[1] > MAX_KEYS or not KERNEL.accepts(q, k, v) or not can_bypass_dispatcher(q, k, v):
        return False
    return lambda: _room(q, k) is True if KERNEL.usable() is True else KERNEL.usable()


def _room(q: Tensor, k: Tensor) -> bool | str:
    return KERNEL.has_room(q.dtype, keys=k.shape[1], width=q.shape[-1])


def small_kv_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h e"],
    scale: float,
) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b t h"]]:
    """Return outputs and the logarithms of their denominators; `scale` multiplies the scores.

    Raises `ValueError` on more keys than lanes, or heads wider than the kernel has room for.
    """
    check("small_kv_attention", {"q": "b t h d", "k": "b n h d", "v": "b n h e"}, q, k, v)
    if _room(q, k) is not True:
        raise ValueError(
            f"small_kv_attention: {k.shape[1]} keys of width {q.shape[-1]} are too many"
        )
    (b, t, h, d), n, e = q.shape, k.shape[1], v.shape[-1]
    arrays = {"q": q.flatten(2), "k": k.flatten(2), "v": v.flatten(2)}
    arrays["scale"] = q.new_tensor([scale])
    out, lse = KERNEL.run("forward", (b, t, n, h, d, e), ["out", "lse"], **arrays)
    return out.view(b, t, h, e), lse
