"""Computes the delta rule and its generalisations: a matrix state that decays, plus rank one.

    S_t = diag(exp w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T        S (k, v) per head
    y_t = q_t^T S_t

Every token reads the state along a_t, writes what it read along b_t (to erase it), and writes v_t
along k_t. With the state turned to this orientation:

    DeltaNet         w = 0           a = -k        b = key = beta k       Yang 2024, section 2.2
    Gated DeltaNet   w = log alpha   a = -alpha k  b = key = beta k       Yang 2024b, section 3.1
    RWKV-7           w               a = -kappa    b = a * kappa, key k~  Peng 2025, section 4.1

Gated DeltaNet decays before it reads, hence its alpha k; RWKV-7 reads what there was before.

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

Backends: `reference` is the recurrence, `torch` the chunks, recomputed piece by piece in the
backward pass. `fla`, by name only, is that library: the delta rule with no decay or one per head
(CUDA, 16-bit sequences).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.dtypes import wide_dtype
from zoo.ops.runtime import libraries
from zoo.ops.runtime.dispatch import select_backend

CHUNK_TOKENS = 32  # tokens solved as one triangular system; a power of two
SEGMENT_TOKENS = (
    2048  # tokens whose chunks are held at once, in the forward and in the backward pass
)
MAX_EXPONENT = 20.0  # exponents within a block of per-channel decays; float32 ends at 88


def diagonal_plus_rank_one(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    a: Float[Tensor, "b t h k"],
    b: Float[Tensor, "b t h k"] | None = None,
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    *,
    state: Float[Tensor, "b h k v"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Compute y_t = q_t^T S_t, S_t = diag(e^log_decay) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T.

    `b` None means k, which halves the work; `log_decay` <= 0, None for no decay. Returns y in v's
    dtype and the state; arithmetic and state are float32, or float64 where v is, under autocast
    too. Raises `ValueError` on shapes that do not fit, `UserError` where there is no such backend.
    """
    _check(q, k, v, a=a, b=b, log_decay=log_decay, state=state)
    name = select_backend("delta_rule", backend, {"torch": True, "reference": True})
    wide = wide_dtype(v)
    batch, _, heads, width = k.shape
    if state is None:
        state = v.new_zeros((batch, heads, width, v.shape[-1]))
    if log_decay is None:
        log_decay = v.new_zeros(()).expand(k.shape[:3])
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    form = {"torch": _torch, "reference": _reference}[name]
    arguments = (q, k, v, a, b, log_decay, state)
    with torch.autocast(v.device.type, enabled=False):
        y, last = form(*(None if x is None else x.to(wide) for x in arguments))
    return y.to(v.dtype), last


def delta_rule(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    beta: Float[Tensor, "b t h"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    *,
    state: Float[Tensor, "b h k v"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Compute S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T with S~ = diag(exp log_decay_t) S_{t-1}.

    y_t = q_t^T S_t. Stable where beta |k|^2 is in [0, 2], as with keys of length 1. Dtypes and
    errors as above.
    """
    _check(q, k, v, beta=beta, log_decay=log_decay, state=state)
    theirs = libraries.usable(
        "fla",
        v,
        (log_decay is not None and log_decay.ndim == 4, "it takes one decay per head"),
        (
            k.shape[-1] > libraries.MAX_KEY_WIDTH,
            f"its keys have at most {libraries.MAX_KEY_WIDTH} channels",
        ),
        (v.dtype not in (torch.bfloat16, torch.float16), "it is used with bfloat16 or float16"),
    )
    available = {"torch": True, "fla": theirs, "reference": True}
    if select_backend("delta_rule", backend, available) == "fla":
        state = None if state is None else state.float()
        return libraries.delta_rule(q, k, v, beta, log_decay, state)
    wide = wide_dtype(v)
    k, read = k.to(wide), -k.to(wide)
    if log_decay is not None:
        decay = log_decay.to(wide).exp()
        read = read * (decay[..., None] if decay.ndim == 3 else decay)
    write = beta.to(wide)[..., None] * k
    return diagonal_plus_rank_one(
        q, write, v, read, log_decay=log_decay, state=state, backend=backend
    )


def unit_length(x: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """Scale x to length 1, in float32 or better; zero stays zero, with a finite gradient."""
    return F.normalize(x.to(wide_dtype(x)), dim=-1, eps=1e-6)


def _check(q, k, v, a=None, b=None, beta=None, log_decay=None, state=None) -> None:
    if k.ndim != 4:
        raise ValueError(f"delta_rule: k is {tuple(k.shape)}, must be (b, t, h, k)")
    batch, t, heads, width = k.shape
    tokens = (batch, t, heads)
    by_channel = log_decay is not None and log_decay.ndim == 4
    expected = {
        "q": (q, (*tokens, width)),
        "v": (v, (*tokens, v.shape[-1])),
        "a": (a, (*tokens, width)),
        "b": (b, (*tokens, width)),
        "beta": (beta, tokens),
        "log_decay": (log_decay, (*tokens, width) if by_channel else tokens),
        "state": (state, (batch, heads, width, v.shape[-1])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"delta_rule: {name} is {tuple(tensor.shape)}, must be {shape}")
    if t == 0:
        raise ValueError("delta_rule: no tokens")


def _reference(q, k, v, a, b, log_decay, S) -> tuple[Tensor, Tensor]:
    """Compute the definition, token by token."""
    b = k if b is None else b
    ys = []
    for q_t, k_t, v_t, a_t, b_t, w_t in zip(
        *(x.unbind(1) for x in (q, k, v, a, b, log_decay)), strict=True
    ):
        read = a_t[..., None, :] @ S
        S = w_t.exp()[..., None] * S + b_t[..., None] * read + k_t[..., None] * v_t[..., None, :]
        ys.append((q_t[..., None, :] @ S).squeeze(-2))
    return torch.stack(ys, 1), S


def _torch(q, k, v, a, b, log_decay, S) -> tuple[Tensor, Tensor]:
    """Go by segments; the backward recomputes a segment from the state before it."""
    t = v.shape[1]
    if t == 1:  # a chunk of one token is the recurrence itself
        return _reference(q, k, v, a, b, log_decay, S)
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
    """Return the longest block, up to a chunk, in which no decay is below exp(-MAX_EXPONENT)."""
    if log_decay.shape[-1] == 1:
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
    earlier = token.repeat_interleave(r)[:, None] > token.repeat_interleave(j)
    return scores.masked_fill(~earlier, 0.0)


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
