"""Computes softmax attention of one query per text over many keys (CPU, forward only).

A backend of `zoo.ops.attention` for writing token by token: kernels/decode_attention. Keys are cut
into chunks, whose partial results are merged (Flash-Decoding, Dao 2023; the partial softmax of
Milakov 2018, arXiv 1805.02867): one query keeps all cores busy. Heads of queries that share one of
keys (Ainslie 2023, arXiv 2305.13245) read it together.
"""

from jaxtyping import Float
from torch import Tensor

from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel, number
from zoo.ops.runtime.native_op import can_bypass_dispatcher

KERNEL = CpuKernel(
    "decode_attention/decode_attention.c",
    sizes="batch keys heads<=max_heads kv_heads width value_width",
    rows={
        "q": "batch 1 heads*width",
        "k": "batch keys kv_heads*width",
        "v": "batch keys kv_heads*value_width",
        "out": "batch 1 heads*value_width",
        "lse": "batch 1 heads",
    },
    pointers={"partial": "batch keys/chunk heads value_width+parts", "scale": "1"},
    outputs="out lse partial",
)


MAX_HEADS = 128


def accepts(q: Tensor, k: Tensor, v: Tensor) -> bool | str:
    """Return whether the kernel reads these, in `attend`'s shapes, or why there is no kernel."""
    if q.shape[1] != 1 or not k.shape[1] or not k.shape[2] or q.shape[2] > MAX_HEADS:
        return False
    here = KERNEL.accepts(q, k, v) and can_bypass_dispatcher(q, k, v)
    return KERNEL.usable() if here else False


def decode_attention(
    q: Float[Tensor, "b 1 h d"],
    k: Float[Tensor, "b n g d"],
    v: Float[Tensor, "b n g e"],
    scale: float,
) -> tuple[Float[Tensor, "b 1 h e"], Float[Tensor, "b 1 h"]]:
    """Return outputs and the logarithms of their denominators; `scale` multiplies the scores.

    g divides h. Raises `ValueError` on shapes that do not fit, no keys, or too many heads.
    """
    shapes = {"q": "b 1 h d", "k": "b n g d", "v": "b n g e"}
    check("decode_attention", shapes, q, k, v)
    (b, _, h, d), (_, n, g, e) = q.shape, v.shape
    if not n or not g or h % g:
        raise ValueError(f"decode_attention: k is {tuple(k.shape)}, must fit q {tuple(q.shape)}")
    arrays = {"q": q.flatten(2), "k": k.flatten(2), "v": v.flatten(2)}
    arrays["scale"] = number(scale, q.dtype)
    wanted = ["out", "lse", "partial"]
    out, lse, _ = KERNEL.run("forward", (b, n, h, g, d, e), wanted, **arrays)
    return out.view(b, 1, h, e), lse
