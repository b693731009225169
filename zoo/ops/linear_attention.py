"""Computes linear attention with decay (Katharopoulos 2020; RetNet, Sun 2023; GLA, Yang 2023).

    S_t = diag(exp w_t) S_{t-1} + k_t v_t^T      S in R^{k x v}, w_t <= 0 the log decay
    y_t = q_t^T S_t

With `bonus` u a token is read before it is written, its own weight set apart (Peng 2024, RWKV-6):
y_t = q_t^T (S_{t-1} + diag(u) k_t v_t^T). With `normalise` y_t is divided by q_t^T z_t, where z is
the same sum with v = 1; z is then one more column of S.

`torch` works in chunks of c tokens. With G(t, s) = exp(w_{s+1} + ... + w_t) and S the state before
the chunk, all of them matrix products:

    y_t   = (q_t G(t, 0))^T S + sum_{s <= t} (q_t^T G(t, s) k_s) v_s
    S_end = G(c, 0) S + sum_s (G(c, s) k_s) v_s^T

Where every channel decays at its own rate, blocks of tokens double from one to the chunk: for t in
the later and s in the earlier half, with m between them, the scores are

    q_t^T G(t, s) k_s = (q_t G(t, m))^T (G(m, s) k_s)

of which the later half has the one factor, queries decayed since its start, and the earlier half
the other, keys decayed to its end. The two halves' factors give those of the doubled block.
Decays are only multiplied, never divided, and no exponent is positive or a difference of sums: any
decay is exact, from none to one that forgets everything.

`fla`, by name only, is that library (CUDA, 16-bit sequences, no normaliser).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear_recurrence import linear_scan
from zoo.ops.runtime import libraries
from zoo.ops.runtime.dispatch import select_backend

CHUNK_TOKENS = 64  # tokens whose scores are a matrix
SEGMENT_TOKENS = 4096  # tokens whose scores exist at one time; recomputed in the backward
MIN_NORMALISER = 1e-6  # a normaliser below it divides as if it were this


class LinearState(NamedTuple):
    S: Float[Tensor, "b h k v"]
    z: Float[Tensor, "b h k"]


def linear_attention(
    q: Float[Tensor, "b t #h k"],
    k: Float[Tensor, "b t #h k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Tensor | None = None,
    *,
    bonus: Float[Tensor, "h k"] | None = None,
    normalise: bool = False,
    state: Tensor | LinearState | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t h v"], Any]:
    """Return y in v's dtype, and the state: S (b, h, k, v), or LinearState(S, z) with `normalise`.

    `log_decay` is None, or (h,), (b, t, h) or (b, t, h, k), finite and at most 0. One head of q or
    k serves all heads of v. Arithmetic and state are float32, or float64 where v is. Raises
    ValueError on shapes that do not fit.
    """
    w = _decay(q, k, v, log_decay)
    theirs = libraries.usable(
        "fla",
        v,
        (normalise, "it is used without a normaliser"),
        (v.dtype not in (torch.bfloat16, torch.float16), "it is used with bfloat16 or float16"),
    )
    name = select_backend(
        "linear_attention", backend, {"torch": True, "fla": theirs, "reference": True}
    )
    if name == "fla":
        assert state is None or isinstance(state, Tensor)  # no normaliser
        return libraries.linear_attention(
            q, k, v, w, bonus, None if state is None else state.float()
        )
    wide = wide_dtype(v)
    dtype, (b, _, h, width) = v.dtype, v.shape
    q, k, v = (a.to(wide) for a in (q, k, v))
    w, bonus = (a if a is None else a.to(wide) for a in (w, bonus))
    if normalise:
        v = F.pad(v, (0, 1), value=1.0)
    if state is None:
        S = v.new_zeros((b, h, k.shape[-1], v.shape[-1]))
    else:
        S = (
            torch.cat([state.S, state.z[..., None]], -1)
            if isinstance(state, LinearState)
            else state
        )
    with torch.autocast(v.device.type, enabled=False):
        y, S = (_torch if name == "torch" else _reference)(q, k, v, w, bonus, S.to(wide))
    if not normalise:
        return y.to(dtype), S
    total = y[..., -1:].clamp(min=MIN_NORMALISER)
    return (y[..., :width] / total).to(dtype), LinearState(S[..., :width], S[..., width])


def _decay(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor | None:
    """Return the log decay as (b, t, h, 1) or (b, t, h, k). ValueError where shapes do not fit."""
    b, t, h, _ = v.shape
    if t == 0:
        raise ValueError("linear_attention: no tokens")
    for name, x in (("q", q), ("k", k)):
        if x.shape[:2] != (b, t) or x.shape[2] not in (1, h) or x.shape[3] != k.shape[3]:
            raise ValueError(f"linear_attention: {name} is {tuple(x.shape)}, v {tuple(v.shape)}")
    if log_decay is None:
        return None
    shapes = {(h,): (1, 1, h, 1), (b, t, h): (b, t, h, 1), (b, t, h, k.shape[3]): log_decay.shape}
    if tuple(log_decay.shape) not in shapes:
        raise ValueError(
            f"linear_attention: log_decay is {tuple(log_decay.shape)}, must be one of {[*shapes]}"
        )
    w = log_decay.reshape(shapes[tuple(log_decay.shape)])
    return w.expand(b, t, h, -1)


def _reference(q, k, v, w, bonus, S) -> tuple[Tensor, Tensor]:
    """Compute the definition, token by token."""
    h, ys = v.shape[2], []
    decays = torch.ones_like(v[..., :1]) if w is None else torch.exp(w)
    tokens = (a.unbind(1) for a in (q, k, v, decays))
    for q_t, k_t, v_t, decay_t in zip(*tokens, strict=True):
        write = k_t.expand(-1, h, -1)[..., None] * v_t[..., None, :]
        before, S = S, decay_t[..., None] * S + write
        read = S if bonus is None else before + bonus[..., None] * write
        ys.append((q_t[..., None] * read).sum(-2))
    return torch.stack(ys, 1), S


def _torch(q, k, v, w, bonus, S) -> tuple[Tensor, Tensor]:
    """Go by segments; the backward recomputes a segment from the state before it."""
    if v.shape[1] <= SEGMENT_TOKENS:
        return _segment(q, k, v, w, bonus, S)
    pieces = [a.split(SEGMENT_TOKENS, 1) for a in (q, k, v)]
    decays = [None] * len(pieces[0]) if w is None else w.split(SEGMENT_TOKENS, 1)
    ys = []
    for q_p, k_p, v_p, w_p in zip(*pieces, decays, strict=True):
        y, S = checkpoint(
            _segment, q_p, k_p, v_p, w_p, bonus, S, use_reentrant=False, preserve_rng_state=False
        )
        ys.append(y)
    return torch.cat(ys, 1), S


def _segment(q, k, v, w, bonus, S) -> tuple[Tensor, Tensor]:
    t = v.shape[1]
    size = min(CHUNK_TOKENS, 1 << (t - 1).bit_length())
    q, k, v = (_chunked(a, size) for a in (q, k, v))  # (b, h, n, c, .)
    w = None if w is None else _chunked(w, size)
    if w is None:
        scores, reads, writes, carried = _without_decay(q, k, v, bonus)
    elif w.shape[-1] == 1:
        scores, reads, writes, carried = _decay_by_head(q, k, w, bonus)
    else:
        scores, reads, writes, carried = _decay_by_channel(q, k, w, bonus)
    added = (writes.mT @ v).transpose(1, 2)  # (b, n, h, k, v), what each chunk writes
    after = linear_scan(carried.transpose(1, 2)[..., None].expand_as(added[..., :1]), added, S)
    before = torch.cat([S[:, None], after[:, :-1]], 1).transpose(1, 2)
    y = scores @ v + reads @ before
    return y.transpose(1, 2).transpose(2, 3).flatten(1, 2)[:, :t], after[:, -1]


def _chunked(x: Tensor, size: int) -> Tensor:
    """Cut (b, t, h, .) into (b, h, n, size, .), the last chunk filled up with zeros."""
    short = -x.shape[1] % size
    x = F.pad(x, (0, 0, 0, 0, 0, short)) if short else x
    return x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def _without_decay(q, k, v, bonus):
    scores = q @ k.mT
    if bonus is None:
        scores = scores.tril()
    else:
        scores = scores.tril(-1) + torch.diag_embed(_own(q, k, bonus))
    return scores, q, k, v.new_ones((*v.shape[:3], 1))


def _decay_by_head(q, k, w, bonus):
    """Decay by one rate per head: G(t, s) is one matrix, of sums over s+1 .. t for each s."""
    size, inclusive = w.shape[-2], bonus is None
    later = torch.ones(size, size, dtype=torch.bool, device=w.device).tril(-1)  # t after s
    sums = (w * later).cumsum(-2)
    if not inclusive:  # up to t - 1
        sums = sums.roll(1, -2)
    past = later | torch.eye(size, dtype=torch.bool, device=w.device) if inclusive else later
    scores = (q @ k.mT) * sums.masked_fill(~past, -torch.inf).exp()
    if not inclusive:
        scores = scores + torch.diag_embed(_own(q, k, bonus))
    reads, writes = _since(w, inclusive).exp(), _until(w).exp()
    return scores, q * reads, k * writes, w.sum(-2).exp()


def _decay_by_channel(q, k, w, bonus):
    """Decay by a rate per channel: scores of ever longer blocks, (b, h, n, blocks, size, size)."""
    decay = w.exp()
    reads = q * decay if bonus is None else q.expand_as(w)
    own = _own(q, k, bonus).expand(w.shape[:-1])[..., None]
    blocks = [a.unsqueeze(-2) for a in (own, reads, k.expand_as(w), decay)]  # of one token
    while blocks[0].shape[-3] > 1:
        pairs = [a.unflatten(-3, (-1, 2)).unbind(-3) for a in blocks]
        (s0, s1), (reads0, reads1), (writes0, writes1), (decay0, decay1) = pairs
        first = torch.cat([s0, torch.zeros_like(s0)], -1)
        later = torch.cat([reads1 @ writes0.mT, s1], -1)
        reads = torch.cat([reads0, decay0 * reads1], -2)
        writes = torch.cat([decay1 * writes0, writes1], -2)
        blocks = [torch.cat([first, later], -2), reads, writes, decay0 * decay1]
    scores, reads, writes, decay = (a.squeeze(-3) for a in blocks)
    return scores, reads, writes, decay.squeeze(-2)


def _own(q: Tensor, k: Tensor, bonus: Tensor | None) -> Tensor:
    """Return each token's score for its own key, (b, h, n, c)."""
    return (q * k if bonus is None else q * bonus[:, None, None] * k).sum(-1)


def _since(w: Tensor, inclusive: bool) -> Tensor:
    """Sum the log decays from the block's start up to each token, its own included or not."""
    return w.cumsum(-2) if inclusive else w.cumsum(-2).roll(1, -2) * _after_first(w)


def _until(w: Tensor) -> Tensor:
    """Sum the log decays after each token up to the block's end."""
    return (w.flip(-2).cumsum(-2).roll(1, -2) * _after_first(w)).flip(-2)


def _after_first(w: Tensor) -> Tensor:
    """Return 0 for a block's first token, 1 for the others."""
    return (torch.arange(w.shape[-2], device=w.device) > 0).to(w.dtype)[:, None]
