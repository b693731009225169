"""Computes the delta rule and its generalisations: a matrix state that decays, plus rank one.

    S_t = diag(exp w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T        S (k, v) per head
    y_t = q_t^T S_t

Every token reads the state along a_t, writes what it read along b_t (to erase it), and writes v_t
along k_t. With the state in this orientation:

    DeltaNet         w = 0           a = -k        b = key = beta k       Yang 2024, section 2.2
    Gated DeltaNet   w = log alpha   a = -alpha k  b = key = beta k       Yang 2024b, section 3.1
    RWKV-7           w               a = -kappa    b = a * kappa, key k~  Peng 2025, section 4.1

Gated DeltaNet decays before it reads, hence its alpha k; RWKV-7 reads what there was before.

Backends: `reference` is the recurrence, `torch` the chunks of zoo.ops.delta_rule_chunked, computed
again segment by segment in the backward pass. `fla`, by name only, is that library: the delta rule
with no decay or one per head (CUDA, 16-bit sequences).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.ops.delta_rule_chunked import by_chunks
from zoo.ops.dtypes import wide_dtype
from zoo.ops.runtime import libraries
from zoo.ops.runtime.dispatch import select_backend


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
    one = v.shape[1] == 1  # a chunk of one token is the recurrence itself
    form = _reference if one or name == "reference" else by_chunks
    b = None if b is None else b.to(wide)
    q, k, a, log_decay, state = (x.to(wide) for x in (q, k, a, log_decay, state))
    with torch.autocast(v.device.type, enabled=False):
        y, last = form(q, k, v.to(wide), a, b, log_decay, state)
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
