"""Causal attention under T5's relative bias (Raffel 2020, section 2.1), in linear memory.

From `max_distance` on all keys share a bucket, whose bias is one number per head: it moves the lse
of plain attention over those keys. A bias is formed for the keys nearer than that alone, one tile
of queries at a time, and formed again in the backward pass.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.ops.attention import Part, attend
from zoo.ops.merge import merge
from zoo.positions.t5 import RelativeBias

TILE = 512  # queries


def t5_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h e"],
    bias: RelativeBias,
    *,
    backend: str = "auto",
) -> Float[Tensor, "b t h e"]:
    """Each query over the keys up to its own; the queries are the last t of the n keys."""
    first, outs = k.shape[1] - q.shape[1], []
    for rows in q.split(TILE, 1):
        last = first + rows.shape[1]
        near = max(first - bias.max_distance + 1, 0)  # keys before it share the last bucket
        at = torch.arange(near, last, device=q.device)
        stand = at[first - near :]
        args = (rows, k[:, near:last], v[:, near:last], bias(stand, at), stand[:, None] >= at)
        results = [checkpoint(_formula, *args, use_reentrant=False)]
        if near:
            out, lse = attend([Part(rows, k[:, :near], v[:, :near])], backend=backend)
            results.append((out, lse + bias.weight[-1]))
        outs.append(merge(results)[0])
        first = last
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def _formula(
    q: Tensor, k: Tensor, v: Tensor, bias: Float[Tensor, "h t n"], mask: Bool[Tensor, "t n"]
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d) + bias) v over visible keys, of which every query has one."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).to(wide) * q.shape[-1] ** -0.5 + bias
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).to(v.dtype)
    return torch.einsum("bhij,bjhe->bihe", weights, v), lse.transpose(1, 2)
