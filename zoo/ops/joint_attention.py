"""Attention over several parts of the keys with one gradient: of the whole softmax.

With o and lse those of all parts together, the gradient of part p needs no more than its own scores
(Liu 2023, Ring Attention, section 3, arXiv 2310.01889; Dao 2022, FlashAttention, appendix B.2):

    P_p  = exp(scale q k_p^T - lse)          dv_p = P_p^T do
    dS_p = P_p * (do v_p^T - rowsum(do o))   dq += scale dS_p k_p,  dk_p = scale dS_p^T q

A fused kernel's backward computes these from o and lse of any keys, so the partial results are not
kept, and no gradient of their lse is needed: a third of the time of merging them under autograd.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.ops.merge import merge
from zoo.ops.runtime.dispatch import is_transformed, select_backend


def accepts(parts: Sequence[Any], backend: str) -> bool:
    """Whether these parts of one softmax get one gradient: several, whole, of one width."""
    if len(parts) < 2 or backend not in ("auto", "flash") or not torch.is_grad_enabled():
        return False
    if is_transformed() and backend == "auto":
        return False
    tensors = [x for part in parts for x in part[:3]]
    alike = all(x.shape[-1] == tensors[0].shape[-1] for x in tensors)
    plain = all(part.mask is None and part.times == 1 and part.k.shape[1] for part in parts)
    return alike and plain and any(x.requires_grad for x in tensors)


def joint_attention(kernel: Any, parts: Sequence[Any], scale: float) -> Float[Tensor, "b t h d"]:
    """Return softmax attention of the same queries over the union of the parts' keys.

    Args:
        kernel: a `zoo.ops.attention.Fused`.
        parts: as of `zoo.ops.attention.attention`, with as many heads of keys as of queries.
        scale: of the scores.

    Raises:
        ValueError: for a causal part that has not as many keys as queries.
    """
    if any(part.causal and part.q.shape[1] != part.k.shape[1] for part in parts):
        raise ValueError("a causal part has as many keys as queries and no mask of its own")
    select_backend("attend", "flash", {"flash": True})
    heads_first = [x.transpose(1, 2) for part in parts for x in part[:3]]
    return _Joint.apply(kernel, [part.causal for part in parts], scale, *heads_first)


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Any, causal: Sequence[bool], scale: float, *tensors: Tensor
    ) -> Tensor:
        results = []
        for place, one in enumerate(causal):
            q, k, v = tensors[3 * place : 3 * place + 3]
            found, denominator = kernel.forward(q, k, v, None, one, scale)
            denominator = denominator[..., : q.shape[-2]]
            results.append((found.transpose(1, 2), denominator.transpose(1, 2)))
        out, lse = merge(results)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.kernel, ctx.causal, ctx.scale = kernel, causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:  # pyright: ignore
        *tensors, out, lse = ctx.saved_tensors
        d_out, out, lse = (x.transpose(1, 2) for x in (d_out, out, lse))
        found: list[Tensor] = []
        for place, causal in enumerate(ctx.causal):
            q, k, v = tensors[3 * place : 3 * place + 3]
            found += ctx.kernel.backward(d_out, q, k, v, out, lse, None, causal, ctx.scale)
        return None, None, None, *found
