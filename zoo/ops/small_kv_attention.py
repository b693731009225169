"""Softmax attention over no more keys than a register has lanes (kernels/small_kv_attention, CPU).

A backend of `zoo.ops.attention` for the sinks of a stream and the like. Forward only.
"""

from jaxtyping import Float
from torch import Tensor

from zoo.ops.runtime import cpu as native
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.dispatch import Available

KERNEL = native.CpuKernel(
    "small_kv_attention/small_kv_attention.c",
    sizes="batch tokens keys<=most heads width<=widest value_width",
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
MAX_KEYS = 16  # keys: lanes of the widest register there is


def takes(q: Tensor, k: Tensor, v: Tensor) -> Available:
    """Whether the kernel takes these (`attend`'s argument shapes), for `select_backend`."""
    if (
        k.shape[1] > MAX_KEYS
        or not KERNEL.takes(q, k, v)
        or not native.can_bypass_dispatcher(q, k, v)
    ):
        return False
    return lambda: _room(q, k) is True if KERNEL.missing() is True else KERNEL.missing()


def _room(q: Tensor, k: Tensor) -> bool | str:
    return KERNEL.has_room(q.dtype, keys=k.shape[1], width=q.shape[-1])


def small_kv_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h e"],
    scale: float,
) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b t h"]]:
    """Outputs and the logarithms of their denominators.

    Raises `ValueError` on more keys than lanes, or heads wider than the kernel has room for.
    """
    check("small_kv_attention", {"q": "b t h d", "k": "b n h d", "v": "b n h e"}, q, k, v)
    if _room(q, k) is not True:
        raise ValueError(
            f"small_kv_attention: {k.shape[1]} keys of width {q.shape[-1]} are too many"
        )
    (b, t, h, d), n, e = q.shape, k.shape[1], v.shape[-1]
    out, lse = q.new_empty((b, t, h, e)), q.new_empty((b, t, h))
    rows = {"q": q, "k": k, "v": v, "out": out}
    flat = {name: x.flatten(2) for name, x in rows.items()}
    KERNEL.call("forward", (b, t, n, h, d, e), **flat, lse=lse, scale=q.new_tensor([scale]))
    return out, lse
