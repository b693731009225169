"""Local attention with a bias for each of the nearest keys, without a (t, window) bias matrix.

    attend_per_key      attention over a few keys that every query has of its own
    shifted_views       the tokens at given distances before each query
    relative_window     a window with a learned vector a_l added to the keys with label l = the
                        clipped distance (Shaw 2018, section 3.1): q . (k + a_l)
    relative_window_around      the same to both sides of the query

Beyond the largest label the added score q . a_l is the same for all keys, so it only shifts the lse
of the plain window over those keys. Keys within the largest label are scored one by one.

Source: Shaw 2018, "Self-Attention with Relative Position Representations" (arXiv 1803.02155).
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from zoo.attention.window import window
from zoo.ops.dtypes import wide_dtype
from zoo.ops.merge import Partial, merge


def attend_per_key(
    q: Float[Tensor, "b t h d"],
    keys: Sequence[Float[Tensor, "b #t h d"]],
    values: Sequence[Float[Tensor, "b #t h e"]],
    *,
    bias: Float[Tensor, "b t h n"] | None = None,
    visible: Bool[Tensor, "t n"] | None = None,
) -> Partial:
    """Attend from each query to n keys of its own: keys[i] holds the i-th key of every query.

    `bias` is added to the scaled scores. A query without a visible key gets output 0, lse -inf.
    """
    wide = wide_dtype(q)
    scaled = q.to(wide) * q.shape[-1] ** -0.5
    scores = torch.stack([(scaled * k).sum(-1) for k in keys], -1)
    if bias is not None:
        scores = scores + bias
    blind = None
    if visible is None:
        lse = scores.logsumexp(-1)
    else:
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        blind = ~visible.any(-1)[:, None]
        lse = scores.masked_fill(blind[..., None], 0.0).logsumexp(-1)  # keeps gradients finite
    weights = torch.exp(scores - lse[..., None]).unbind(-1)
    out = reduce(torch.add, (w[..., None] * v for w, v in zip(weights, values, strict=True)))
    if blind is not None:
        lse = lse.masked_fill(blind, -torch.inf)
    return out.to(values[0].dtype), lse


def shifted_views(
    x: Float[Tensor, "b n h d"], tokens: int, distances: range
) -> tuple[list[Float[Tensor, "b t h d"]], Bool[Tensor, "t l"] | None]:
    """Shift a sequence by each distance: entry i holds the token `distances[i]` before each one.

    For the last `tokens` tokens. Also returns which of these exist, None where all do.
    """
    most, past = distances[-1], x.shape[1] - tokens
    x = F.pad(x, (0, 0, 0, 0, max(0, most - past), 0))
    views = [x[:, x.shape[1] - tokens - n : x.shape[1] - n] for n in distances]
    if past >= most:
        return views, None
    at = torch.arange(past, past + tokens, device=x.device)
    return views, at[:, None] >= at.new_tensor(list(distances))


def relative_window(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h e"],
    labels: Float[Tensor, "l h d"],
    size: int,
    *,
    first: int = 0,
    backend: str = "auto",
) -> Partial:
    """Attend from each query to the keys at distances first .. size - 1 before it.

    The queries are the last t tokens of the n keys. `labels` has the vectors of the distances
    first, first + 1, ..; the last one serves all farther keys too.
    """
    wide, last = wide_dtype(q), first + len(labels) - 1
    bias = torch.einsum("bthd,lhd->bthl", q, labels.to(q.dtype)).to(wide) * q.shape[-1] ** -0.5
    near, beyond = bias[..., :-1], bias[..., -1]
    keys, visible = shifted_views(k, q.shape[1], range(first, last))
    values, _ = shifted_views(v, q.shape[1], range(first, last))
    out, lse = window(q, k, v, size - last, gap=last, backend=backend)
    labelled = attend_per_key(q, keys, values, bias=near, visible=visible)
    return merge([labelled, (out, lse + beyond)])


def relative_window_around(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t h d"],
    v: Float[Tensor, "b t h e"],
    labels: Float[Tensor, "l h d"],
    size: int,
    *,
    backend: str = "auto",
) -> Partial:
    """Attend from each query to the keys less than `size` before or after it.

    `labels` has the vectors of 0, 1, .. tokens before, then those of 1, 2, .. after, one fewer.
    """
    behind, ahead = labels.split([len(labels) // 2 + 1, len(labels) // 2])
    before = relative_window(q, k, v, behind, size, backend=backend)
    q, k, v = (x.flip(1) for x in (q, k, v))
    out, lse = relative_window(q, k, v, ahead, size, first=1, backend=backend)
    return merge([before, (out.flip(1), lse.flip(1))])
