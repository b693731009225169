"""Sliding windows: each query attends to the `size` keys up to its own.

    window              the keys at distances 0, r, 2r, .., (size - 1) r, where r is the dilation
    two_sided_window    the query's own key and `side` more before and after it, r apart
    in_window           the mask of a window, to leave its keys out of other attention
    by_dilation         heads that differ in their dilation, one call for each dilation

Queries are cut into blocks of an eighth of the window, which are folded into the batch. The keys of
a block are its own tokens and the size - 1 before them, unfolded from the sequence; a ninth of the
scores is masked. Time is O(t size), memory O(t). A dilated window is a plain one on each of the r
interleaved subsequences.

Results are partial, (out, lse), to be merged with those over other keys (`zoo.ops.merge`). The
queries are the last tokens of the keys.

Source: Beltagy 2020, "Longformer", section 3.1 (arXiv 2004.05150).
"""

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.ops.attention import Part, attend
from zoo.ops.dtypes import wide_dtype
from zoo.ops.merge import Partial, merge
from zoo.ops.runtime.sizes import ceil_div

CHUNK_QUERIES = 4096  # queries whose keys are unfolded at a time
BLOCK_MULTIPLE = 16  # of block sizes: others cost matrix kernels half as much again


def window(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b n g d"],
    v: Float[Tensor, "b n g e"],
    size: int,
    *,
    dilation: int = 1,
    gap: int = 0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Partial:
    """Attend from each query to `size` keys, the nearest of them `gap` tokens before its own.

    The queries are the last t tokens of the n keys. Keys out of all windows may be missing. A query
    without any key gets output 0 and lse -inf.
    """
    tokens, options = q.shape[1], Options(softcap=softcap, backend=backend)
    if gap:
        return _with_gap(q, k, v, size, dilation, gap, options)
    k, v = (last_tokens(x, tokens + (size - 1) * dilation) for x in (k, v))
    past = k.shape[1] - tokens
    if dilation > 1:
        return _dilated(q, k, v, size, dilation, options)
    whole = min(max(size - 1 - past, 0), tokens)  # queries that see every key up to their own
    pieces = []
    if whole:
        parts = [Part(q[:, :whole], *(x[:, past : past + whole] for x in (k, v)), causal=True)]
        if past:
            parts.append(Part(q[:, :whole], k[:, :past], v[:, :past]))
        pieces.append(attend(parts, **options))
    if whole < tokens:
        first = past + whole - (size - 1)
        pieces += _band(q[:, whole:], k[:, first:], v[:, first:], size, options)
    if len(pieces) == 1:
        return pieces[0]
    out, lse = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    return out, lse


class Options(TypedDict):
    """Those of `attend` that all keys of a window have in common."""

    softcap: float | None
    backend: str


def _band(
    q: Tensor, k: Tensor, v: Tensor, size: int, options: Options
) -> list[tuple[Tensor, Tensor]]:
    """Attend where every window is whole: t queries, t + size - 1 keys.

    It goes by chunks of queries, because unfolded keys take more memory than the keys.
    """
    tokens, before = q.shape[1], ceil_div(size - 1, BLOCK_MULTIPLE) * BLOCK_MULTIPLE
    block = min(tokens, max(2, ceil_div(before, 8 * BLOCK_MULTIPLE)) * BLOCK_MULTIPLE)
    keys, more, step = before + block, before - (size - 1), max(CHUNK_QUERIES // block, 1) * block
    at = torch.arange(keys, device=q.device)
    mask, results = in_window(at[before:], at, size)[None, None], []
    for first in range(0, tokens, step):
        queries = _blocks(q[:, first : first + step], block)
        n, missing = queries.shape[1], max(more - first, 0)
        read = slice(first - more + missing, first + n * block + size - 1)
        padding = (missing, max(first + n * block - tokens, 0))
        spans = (_padded(x[:, read], *padding).unfold(1, keys, block) for x in (k, v))
        spans_k, spans_v = (x.permute(0, 1, 4, 2, 3).flatten(0, 1) for x in spans)
        part = Part(queries.flatten(0, 1), spans_k, spans_v, mask=mask)
        partial = attend([part], **options)
        out, lse = (x.unflatten(0, (-1, n)).flatten(1, 2)[:, : tokens - first] for x in partial)
        results.append((out, lse))
    return results


def _blocks(x: Tensor, block: int) -> Float[Tensor, "b blocks block h d"]:
    """Cut tokens into blocks, the last padded with zeros, which are later than every query."""
    return _padded(x, 0, -x.shape[1] % block).unflatten(1, (-1, block))


def _padded(x: Tensor, before: int, behind: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, before, behind)) if before or behind else x


def _dilated(q: Tensor, k: Tensor, v: Tensor, size: int, r: int, options: Options) -> Partial:
    """Attend within each of the r interleaved subsequences, which begin with the first r keys."""
    tokens, past = q.shape[1], k.shape[1] - q.shape[1]
    q = F.pad(q, (0, 0, 0, 0, past % r, 0))
    q, k, v = (_blocks(x, r).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    results = window(q, k, v, size, **options)
    woven = (x.unflatten(0, (-1, r)).transpose(1, 2).flatten(1, 2) for x in results)
    out, lse = (x[:, past % r : past % r + tokens] for x in woven)
    return out, lse


def _with_gap(
    q: Tensor, k: Tensor, v: Tensor, size: int, dilation: int, gap: int, options: Options
) -> Partial:
    """Attend to the keys that are `gap` or more before the query; the first ones may have none."""
    blind = min(max(0, gap - (k.shape[1] - q.shape[1])), q.shape[1])
    out = q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=v.dtype)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide_dtype(q))
    if blind == q.shape[1]:
        return out, lse
    k, v = (x[:, : x.shape[1] - gap] for x in (k, v))
    seeing = window(q[:, blind:], k, v, size, dilation=dilation, **options)
    out, lse = (torch.cat([x[:, :blind], y], 1) for x, y in zip((out, lse), seeing, strict=True))
    return out, lse


def two_sided_window(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t h d"],
    v: Float[Tensor, "b t h e"],
    side: int,
    *,
    dilation: int = 1,
    backend: str = "auto",
) -> Partial:
    """Attend from each query to its own key and `side` before and after it, `dilation` apart."""
    before = window(q, k, v, side + 1, dilation=dilation, backend=backend)
    q, k, v = (x.flip(1) for x in (q, k, v))
    out, lse = window(q, k, v, side, dilation=dilation, gap=dilation, backend=backend)
    return merge([before, (out.flip(1), lse.flip(1))])


def by_dilation(
    windowed: Callable[..., Partial], q: Tensor, k: Tensor, v: Tensor, dilations: Sequence[int]
) -> Partial:
    """Call `windowed(q, k, v, dilation=...)` for the heads of each dilation, in their order.

    `dilations` has one for each head.
    """
    kinds = sorted(set(dilations))
    if len(kinds) == 1:
        return windowed(q, k, v, dilation=kinds[0])
    groups = [[head for head, r in enumerate(dilations) if r == kind] for kind in kinds]
    results = [
        windowed(q[:, :, heads], k[:, :, heads], v[:, :, heads], dilation=kind)
        for kind, heads in zip(kinds, groups, strict=True)
    ]
    order = torch.tensor([h for group in groups for h in group], device=q.device).argsort()
    out, lse = (torch.cat(parts, 2)[:, :, order] for parts in zip(*results, strict=True))
    return out, lse


def in_window(
    queries: Int[Tensor, " t"], keys: Int[Tensor, " n"], size: int, dilation: int = 1
) -> Bool[Tensor, "t n"]:
    """Whether each key is in each query's window, by their positions in the text."""
    distance = queries[:, None] - keys
    inside = (distance >= 0) & (distance < size * dilation)
    return inside if dilation == 1 else inside & (distance % dilation == 0)


def last_tokens(x: Float[Tensor, "b n h d"], most: int) -> Float[Tensor, "b m h d"]:
    """Cut a sequence to its last `most` tokens, or fewer where it has fewer."""
    return x[:, max(0, x.shape[1] - most) :]
