"""Computes softmax attention over parts of the keys.

Attention over any set of keys gives a partial result: the output `o` and the logarithm of its
denominator `lse`. Partial results over disjoint sets of keys merge exactly (`zoo.ops.merge`), and
the gradient flows through both. Every softmax mixer is a list of `Part`s.

Backends of one part: `reference` (the formula, literally), `torch` (the formula in tiles of
queries, recomputed in the backward pass: any device, any mask, memory linear in the tokens),
`flash` (PyTorch's fused CPU kernel under a gradient that accepts d lse), `native` (CPU kernels for
one query and for a handful of keys, where no gradient is wanted) and, by name only, `xformers`
(that library's CUDA kernels under flash's gradient).
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import log
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from zoo.ops import decode_attention, joint_attention, small_kv_attention
from zoo.ops.dtypes import wide_dtype
from zoo.ops.merge import merge
from zoo.ops.runtime import libraries
from zoo.ops.runtime.dispatch import Available, record, select_backend

NO_CAP = "it has no cap on the scores"
TILE = 512  # queries per tile of the `torch` backend


class Part(NamedTuple):
    """Holds a set of keys for a set of queries, and which of them each query sees."""

    q: Float[Tensor, "b tq h d"]
    k: Float[Tensor, "b tk g d"]  # g divides h: h / g heads of queries share one of keys
    v: Float[Tensor, "b tk g e"]
    causal: bool = False  # query i sees keys 0..i; as many keys as queries
    mask: Bool[Tensor, "#b #h tq tk"] | None = None  # True where the query sees the key
    times: float = 1.0  # that each key counts in the softmax over all parts


def own_and_past(q: Tensor, k: Tensor, v: Tensor) -> list[Part]:
    """Return the parts of causal attention of the last t of n tokens: their own keys and those
    before, if any."""
    past = k.shape[1] - q.shape[1]
    if not past:
        return [Part(q, k, v, causal=True)]
    cut = past, q.shape[1]  # one split has one gradient, where two slices each have one of all keys
    (past_k, own_k), (past_v, own_v) = k.split(cut, 1), v.split(cut, 1)
    return [Part(q, own_k, own_v, causal=True), Part(q, past_k, past_v)]


def attend(
    parts: Sequence[Part],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b tq h e"], Float[Tensor, "b tq h"]]:
    """Compute softmax attention of the same queries over the union of the parts' (disjoint) keys.

    `scale` multiplies the scores; 1/sqrt(d) unless given. With `softcap` c a scaled score s counts
    as c tanh(s / c) (Gemma 2, section 2, arXiv 2408.00118), which no fused kernel computes. A query
    that sees no key gets output 0 and lse -inf. Returns the output in v's dtype and the lse in
    float32 or better.
    """
    return merge([_partial(part, scale, softcap, backend) for part in parts])


def attention(
    parts: Sequence[Part],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b tq h e"]:
    """Return `attend`'s output alone, so that one part on an accelerator can use PyTorch's SDPA."""
    part = parts[0]
    if len(parts) == 1 and softcap is None and (found := _decoded(part, scale, backend)):
        return found[0]
    on_cpu = part.q.is_cpu
    if len(parts) == 1 and not on_cpu and backend == "auto" and softcap is None:
        return _sdpa(part, scale)
    if on_cpu and softcap is None and joint_attention.accepts(parts, backend):
        factor = part.q.shape[-1] ** -0.5 if scale is None else scale
        return joint_attention.joint_attention(_CPU, _heads_repeated(parts), factor)
    return attend(parts, scale=scale, softcap=softcap, backend=backend)[0]


def _heads_repeated(parts: Sequence[Part]) -> list[Part]:
    heads = parts[0].q.shape[2]
    return [
        part._replace(k=repeat_heads(part.k, heads), v=repeat_heads(part.v, heads))
        for part in parts
    ]


def _sdpa(part: Part, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in part[:3])
    mask, causal, grouped = part.mask, part.causal, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    ).transpose(1, 2)


def _partial(
    part: Part, scale: float | None, softcap: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    q, k, v, causal, mask, times = part
    if causal and (mask is not None or q.shape[1] != k.shape[1]):
        raise ValueError("a causal part has as many keys as queries and no mask of its own")
    if softcap is None and (found := _decoded(part, scale, backend)):
        return found
    if q.shape[2] != k.shape[2]:
        return _grouped(part, scale, softcap, backend)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    native: Available = False
    if mask is None and not causal and softcap is None and backend in ("auto", "native"):
        native = decode_attention.accepts(q, k, v) or small_kv_attention.accepts(q, k, v)
    theirs = libraries.usable(
        "xformers",
        q,
        (q.dtype not in libraries.DTYPES, "it has no float64"),
        (
            any(x.shape[-1] % libraries.ALIGNED for x in (q, v)),
            "it needs heads a multiple of 8 wide",
        ),
        (softcap is not None, NO_CAP),
    )
    available = {
        "native": native,
        # without a key PyTorch's kernel divides by zero, which ends the process
        "flash": q.device.type == "cpu" and k.shape[1] > 0 and (softcap is None or NO_CAP),
        "torch": True,
        "xformers": theirs,
    }
    chosen = select_backend("attend", backend, available | {"reference": True})
    if chosen == "native":
        out, lse = small_kv_attention.small_kv_attention(q, k, v, factor)
        return out, lse + log(times)
    form = _FORMS[chosen] if softcap is None else partial(_FORMS[chosen], softcap=softcap)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if causal and chosen == "reference":
        mask = _causal_mask(q, k)
    out, lse = form(q, k, v, mask, causal, factor)
    return out.transpose(1, 2), lse.transpose(1, 2) + log(times)


def _decoded(part: Part, scale: float | None, backend: str) -> tuple[Tensor, Tensor] | None:
    """One token's attention by its kernel, where that reads the part: no gradient, the CPU."""
    q, k, v, causal, mask, times = part
    if q.shape[1] != 1 or causal or mask is not None or backend not in ("auto", "native"):
        return None
    if decode_attention.accepts(q, k, v) is not True:
        return None
    record("attend", "native")
    factor = scale if scale is not None else q.shape[-1] ** -0.5
    out, lse = decode_attention.decode_attention(q, k, v, factor)
    return out, lse if times == 1 else lse + log(times)


def _grouped(
    part: Part, scale: float | None, softcap: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Attend where several heads of queries share one of keys (Ainslie 2023, arXiv 2305.13245)."""
    q, k, v = part.q, part.k, part.v
    if q.shape[1] > 1 or part.mask is not None:
        k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))
        return _partial(part._replace(k=k, v=v), scale, softcap, backend)
    # One token's queries of a group are rows side by side: its keys need not be repeated.
    rows = q[:, 0].unflatten(1, (k.shape[2], -1)).transpose(1, 2)
    results = _partial(Part(rows, k, v, times=part.times), scale, softcap, backend)
    out, lse = (x.transpose(1, 2).flatten(1, 2).unsqueeze(1) for x in results)
    return out, lse


def repeat_heads(x: Float[Tensor, "b t g d"], heads: int) -> Float[Tensor, "b t h d"]:
    """Repeat each head of keys or values for the heads of queries that share it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _causal_mask(q: Tensor, k: Tensor, row: int = 0) -> Tensor:
    rows = torch.arange(row, row + q.shape[-2], device=q.device)
    return rows[:, None] >= torch.arange(k.shape[-2], device=q.device)


def _formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale q k^T) v over the visible keys; the scores in float32 or better."""
    del causal  # already in the mask
    wide = wide_dtype(q)
    scores = (q @ k.mT).to(wide) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    blind = None if mask is None else ~mask.any(-1, keepdim=True)
    if mask is not None and blind is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
        scores = scores.masked_fill(blind, 0.0)  # keeps softmax and its gradient finite
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.unsqueeze(-1))
    if blind is not None:
        p = p.masked_fill(blind, 0.0)
        lse = lse.masked_fill(blind.squeeze(-1), -torch.inf)
    return (p.to(v.dtype) @ v), lse


def _tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the formula by tiles of queries, whose scores are recomputed in the backward."""
    results, row = [], 0
    masks = mask.split(TILE, -2) if mask is not None else None
    for index, tile in enumerate(q.split(TILE, -2)):
        end = row + tile.shape[-2]
        keys, values = (k[..., :end, :], v[..., :end, :]) if causal else (k, v)
        visible = _causal_mask(tile, keys, row) if causal else masks[index] if masks else None
        args = (tile, keys, values, visible, causal, scale, softcap)
        results.append(checkpoint(_formula, *args, use_reentrant=False))
        row = end
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, -2), torch.cat(lses, -1)


class Fused(NamedTuple):
    """Holds a fused kernel over (b h t d) that returns its lse, and its backward of d out."""

    forward: Callable[..., tuple[Tensor, Tensor]]  # q, k, v, bias, causal, scale -> out, lse
    backward: Callable[..., Sequence[Tensor]]  # d out, q, k, v, out, lse, bias, causal, scale
    more: int  # channels that one more takes, for the kernel's alignment


def _fused(
    kernel: Fused,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run a kernel that needs one width for queries, keys and values."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, padded = (_widen(x, width) for x in (q, k, v))
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    out, lse = _FusedGradient.apply(kernel, q, k, padded, bias, causal, scale)
    if mask is not None:  # kernels differ in the lse of a query that sees nothing
        lse = lse.masked_fill(~mask.any(-1), -torch.inf)
    return out[..., : v.shape[-1]], lse


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


class _FusedGradient(torch.autograd.Function):
    """Adds d lse to a kernel whose backward knows only d out, as one more value channel.

    The kernel forms dS = P * (dO v^T - D) with D = rowsum(dO * O), and the lse adds P * d lse.
    Appending the channel v = 1, O = 0, dO = d lse adds exactly that and leaves D as it is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernel: "Fused",
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        out, lse = kernel.forward(q, k, v, bias, causal, scale)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.kernel, ctx.causal, ctx.scale = kernel, causal, scale
        ctx.set_materialize_grads(False)
        return out, lse[..., : q.shape[-2]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, d_lse = grads
        q, k, v, bias, out, lse = ctx.saved_tensors
        width, kernel = q.shape[-1], ctx.kernel
        if d_out is None:
            d_out = torch.zeros_like(out)
        if d_lse is not None:
            q, k, out = (F.pad(x, (0, kernel.more)) for x in (q, k, out))
            v = F.pad(v, (0, kernel.more), value=1.0)
            d_out = F.pad(d_out, (0, kernel.more))
            d_out[..., width] = d_lse
        dqkv = kernel.backward(d_out, q, k, v, out, lse, bias, ctx.causal, ctx.scale)
        return None, *(grad[..., :width] for grad in dqkv), None, None, None


def _cpu_forward(q, k, v, bias, causal, scale) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )


def _cpu_backward(d_out, q, k, v, out, lse, bias, causal, scale) -> Sequence[Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


_CPU = Fused(_cpu_forward, _cpu_backward, 1)
_XFORMERS = Fused(libraries.attention, libraries.attention_backward, libraries.ALIGNED)
_FORMS = {
    "flash": partial(_fused, _CPU),
    "torch": _tiled,
    "xformers": partial(_fused, _XFORMERS),
    "reference": _formula,
}


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _flash_flops(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    dropout: float = 0.0,
    causal: bool = False,
    **_: Any,
) -> int:
    """Count two products per score, over half of the scores where causal."""
    del dropout
    b, h, tq, d = q
    return 2 * b * h * tq * k[-2] * (d + v[-1]) // (2 if causal else 1)
