"""The chunked form of zoo.ops.delta_rule: triangular systems, and a product from chunk to chunk.

Chunks. Number a chunk's tokens 1 .. c, let S_0 be the state before it, u_t^T = a_t^T S_{t-1} what
token t reads, and G(t, s) = diag(exp(w_{s+1} + .. + w_t)) the decay from after s to after t. Then

    S_t = G(t, 0) S_0 + sum_{s <= t} G(t, s) (b_s u_s^T + k_s v_s^T)
    u_t = (G(t-1, 0) a_t)^T S_0 + sum_{s < t} (a_t^T G(t-1, s) b_s) u_s + (a_t^T G(t-1, s) k_s) v_s

which is a triangular system for the rows u_t of U (Yang 2024, section 3, there without decay).
With A_ab the strictly lower matrix of a_t^T G(t-1, s) b_s, A_ak likewise, and a' the rows
G(t-1, 0) a_t:

    U = W S_0 + X,   W = (I - A_ab)^-1 a',   X = (I - A_ab)^-1 A_ak V   (WY form by UT transform)
    S_c = (G(c, 0) + B^T W) S_0 + (B^T X + K^T V)                    b, k decayed to the chunk's end
    y_t = (G(t, 0) q_t)^T S_0 + sum_{s <= t} (q_t^T G(t, s) b_s) u_s + (q_t^T G(t, s) k_s) v_s

Where b = k (the delta rule) only u + v matters: k_s (u_s + v_s)^T is written, and U + V solves the
same system with V for A_ak V. Setting a token's own write apart,

    y_t = (exp(w_t) q_t)^T S_{t-1} + (q_t^T b_t) u_t + (q_t^T k_t) v_t

lets q share the decays G(t-1, s) of a. Every chunk is thus an affine map of its state: all of them
are found at once, the states between them one after the other by a product each, then all outputs
at once.

Exponents. G is only ever formed from sums of log decays over spans of tokens, never as a ratio of
cumulative decays. One decay per head: all pairs of a chunk. One per channel: a pair of neighbouring
spans meets at their boundary, exp(sum from there to t-1) on the left and exp(sum from after s to
there) on the right, both at most 1; spans double from blocks to the chunk. Within a block the right
factor is the exponential of a positive number, so blocks are the longest in which that stays below
`MAX_EXPONENT`: all 32 tokens of a chunk for RWKV-7, whose w > -exp(-1/2), and one token where
decays are stronger than any bound. No decay is clamped, and exp(-inf) = 0 is a decay too.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.runtime.dispatch import without_values

CHUNK_TOKENS = 32  # tokens solved as one triangular system; a power of two
SEGMENT_TOKENS = (
    2048  # tokens whose chunks are held at once, in the forward and in the backward pass
)
MAX_EXPONENT = 20.0  # exponents within a block of per-channel decays; float32 ends at 88


def by_chunks(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor | None, log_decay: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the outputs and the last state of at least two tokens, segment by segment.

    All of one dtype; `log_decay` is (b, t, h, 1) or (b, t, h, k). The backward pass recomputes a
    segment from the state before it.
    """
    t = v.shape[1]
    chunk = min(CHUNK_TOKENS, 1 << (t - 1).bit_length())
    block = _block(log_decay, chunk)
    sequences = [x.split(SEGMENT_TOKENS, 1) for x in (q, k, v, a, log_decay)]
    erase = [None] * len(sequences[0]) if b is None else b.split(SEGMENT_TOKENS, 1)
    ys = []
    for *parts, b_ in zip(*sequences, erase, strict=True):
        y, S = checkpoint(
            _segment, *parts, b_, S, chunk, block, use_reentrant=False, preserve_rng_state=False
        )
        ys.append(y)
    return torch.cat(ys, 1), S


def _block(log_decay: Tensor, chunk: int) -> int:
    """Return the longest block, up to a chunk, in which no decay is below exp(-MAX_EXPONENT).

    A whole chunk where decays have no values, as where operations are counted.
    """
    if log_decay.shape[-1] == 1 or without_values():
        return chunk
    steepest = -float(log_decay.detach().amin())
    block = chunk
    while block > 1 and block * steepest > MAX_EXPONENT:
        block //= 2
    return block


def _segment(q, k, v, a, log_decay, b, S, chunk: int, block: int) -> tuple[Tensor, Tensor]:
    t = v.shape[1]

    def chunks(x: Tensor) -> Tensor:
        """(b, t, h, d) -> (chunks, b h, c, d); what is added decays nothing and writes nothing."""
        x = F.pad(x, (0, 0, 0, 0, 0, -t % chunk))
        return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    q, k, v, a, w = (chunks(x) for x in (q, k, v, a, log_decay))
    readers = torch.stack([q * w.exp(), a], -2)  # (chunks, b h, c, 2, k)
    writers = k[..., None, :] if b is None else torch.stack([chunks(b), k], -2)
    scores = _scores(readers, writers, w, block)
    of_q, of_a = scores.unflatten(-2, (chunk, 2)).unbind(-2)
    own = (q[..., None, :] * writers).sum(-1)  # what q reads of its own token's writes
    of_q = of_q + _on_diagonal(own)

    readers = readers * _until(w).exp()[..., None, :]  # from the chunk's start
    writers = writers * _after(w).exp()[..., None, :]  # to its end
    before_q, before_a = readers.unbind(-2)
    if b is None:
        system, right = of_a, v
    else:
        system, of_k = of_a.unflatten(-1, (chunk, 2)).unbind(-1)
        right = of_k @ v
    solved = torch.linalg.solve_triangular(
        -system, torch.cat([before_a, right], -1), upper=False, unitriangular=True
    )
    W, X = solved.split([k.shape[-1], v.shape[-1]], -1)
    end = writers.flatten(-3, -2).mT
    transition, written = end[..., :: writers.shape[-2]] @ W, end @ _values(X, v, b)
    transition.diagonal(dim1=-2, dim2=-1).add_(w.sum(-2).exp())
    before, last = _States.apply(transition, written, S.flatten(0, 1))
    y = before_q @ before + of_q @ _values(W @ before + X, v, b)
    y = y.unflatten(1, S.shape[:2]).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return y[:, :t], last.unflatten(0, S.shape[:2])


def _values(u: Tensor, v: Tensor, b: Tensor | None) -> Tensor:
    """Return what is written, (..., c j, v): u + v already (b is k), or u and v in turn."""
    return u if b is None else torch.stack([u, v], -2).flatten(-3, -2)


def _on_diagonal(own: Tensor) -> Tensor:
    """Spread (..., c, j) to (..., c, c j) with row t's values in columns t j .. t j + j - 1."""
    return torch.diag_embed(own.mT).movedim(-3, -1).flatten(-2)


def _until(w: Tensor) -> Tensor:
    """Sum the log decays over the tokens before each, from the first of (..., c, k)."""
    return F.pad(w[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _after(w: Tensor) -> Tensor:
    """Sum the log decays over the tokens after each, to the last."""
    return F.pad(w[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _scores(x: Tensor, z: Tensor, w: Tensor, block: int) -> Tensor:
    """Return x_t^T G(t-1, s) z_s for s < t, else 0.

    Of x (..., c, r, k), r readers per token, and z (..., c, j, k), j writers: (..., c r, c j).
    """
    within = _within_by_head if w.shape[-1] == 1 else _within_by_channel
    x, z = (a.unflatten(-3, (-1, block)) for a in (x, z))
    w = w.unflatten(-2, (-1, block))
    scores = within(x, z, w)
    while x.shape[-4] > 1:
        (x0, x1), (z0, z1) = (a.unflatten(-4, (-1, 2)).unbind(-4) for a in (x, z))
        w0, w1 = w.unflatten(-3, (-1, 2)).unbind(-3)
        s0, s1 = scores.unflatten(-3, (-1, 2)).unbind(-3)
        rows, columns = x1 * _until(w1).exp()[..., None, :], z0 * _after(w0).exp()[..., None, :]
        across = rows.flatten(-3, -2) @ columns.flatten(-3, -2).mT
        upper = torch.cat([s0, torch.zeros_like(s0)], -1)
        scores = torch.cat([upper, torch.cat([across, s1], -1)], -2)
        x, z, w = torch.cat([x0, x1], -3), torch.cat([z0, z1], -3), torch.cat([w0, w1], -2)
    return scores.squeeze(-3)


def _within_by_channel(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Compute scores within blocks, both factors taken from the block's start."""
    c, r, j = *x.shape[-3:-1], z.shape[-2]
    if c == 1:
        return x.new_zeros((*x.shape[:-3], r, j))
    until = _until(w)
    rows, columns = x * until.exp()[..., None, :], z * (-until - w).exp()[..., None, :]
    scores = rows.flatten(-3, -2) @ columns.flatten(-3, -2).mT
    token = torch.arange(c, device=x.device)
    preceding = token.repeat_interleave(r)[:, None] > token.repeat_interleave(j)
    return scores.masked_fill(~preceding, 0.0)


def _within_by_head(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Compute scores within blocks, one decay for all channels: the sums of all spans."""
    c, r, j = *x.shape[-3:-1], z.shape[-2]
    ones = torch.ones((c, c), dtype=torch.bool, device=x.device)
    spans = F.pad(w[..., :-1, :], (0, 0, 1, 0)).expand(*w.shape[:-1], c)  # row t: token t - 1
    spans = spans.masked_fill(ones.triu(-1), 0.0).cumsum(-2)  # w_{s+1} + .. + w_{t-1}
    decay = spans.masked_fill(ones.triu(), -torch.inf).exp()
    scores = (x.flatten(-3, -2) @ z.flatten(-3, -2).mT).unflatten(-2, (c, r))
    return (scores * decay.repeat_interleave(j, -1)[..., None, :]).flatten(-3, -2)


class _States(torch.autograd.Function):
    """Iterates S <- M_i S + N_i: the states before each of n steps, and the last."""

    @staticmethod
    def forward(ctx: Any, M: Tensor, N: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        before = []
        for M_i, N_i in zip(M.unbind(0), N.unbind(0), strict=True):
            before.append(S)
            S = torch.baddbmm(N_i, M_i, S)
        before = torch.stack(before)
        ctx.save_for_backward(M, before)
        return before, S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_before, dS = grads
        M, before = ctx.saved_tensors
        dN = []
        for M_i, d_i in zip(M.mT.unbind(0)[::-1], d_before.unbind(0)[::-1], strict=True):
            dN.append(dS)
            dS = torch.baddbmm(d_i, M_i, dS)
        dN = torch.stack(dN[::-1])
        return dN @ before.mT, dN, dS


@register_flop_formula(torch.ops.aten.linalg_solve_triangular)
def _flops(a: torch.Size, b: torch.Size, **_: Any) -> int:
    """Count a product and a sum per entry of the triangle and column solved for."""
    del a
    return math.prod(b) * b[-2]
