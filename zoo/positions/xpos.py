"""xPos: rotary positions with a decay by distance (Sun 2022, sections 3.2, 3.3, arXiv 2212.10554).

    zeta_i      (i / (d/2) + gamma) / (1 + gamma), i = 0 .. d/2 - 1, one per rotated pair
    q'_m        R_m q_m zeta^((m - c) / B),  k'_n = R_n k_n zeta^(-(n - c) / B),  B = `scale_base`

The score then carries zeta^((m-n)/B) for any centre c, and fast pairs decay first. Far from c one
of the factors overflows (0.2857^(-n/512) exceeds float32 at n = 36k). Here c lies between the
queries and the keys of one part of the attention, keys are cached rotated but without decay, and no
exponent depends on the part's place in the text.

The paper extrapolates with blockwise causal attention: blocks of half the training length, each
query over its own block and the one before. `apply_xpos_decay(q, k, 0)` serves the own block,
`apply_xpos_decay(q, k, len(k))` the one before, and both serve all blocks at once.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

MAX_LOG_FACTOR = 40.0  # of products above the diagonal, which a causal mask hides


def zetas(width: int, gamma: float = 0.4) -> tuple[float, ...]:
    """Return zeta_i of each pair. Golden, d=8: 0.2857, 0.4643, 0.6429, 0.8214."""
    if width % 2 or not gamma > 0:
        raise ValueError(f"xPos needs an even head width and gamma > 0: got {width} and {gamma}")
    half = width // 2
    return tuple((i / half + gamma) / (1 + gamma) for i in range(half))


def apply_xpos_decay(
    q: Float[Tensor, "b tq h d"],
    k: Float[Tensor, "b tk h d"],
    origin: int,
    *,
    gamma: float = 0.4,
    scale_base: float = 512.0,
    interleaved: bool = False,
) -> tuple[Float[Tensor, "b tq h d"], Float[Tensor, "b tk h d"]]:
    """Scale rotated q and k so that pair i of q_m.k_n decays as zeta_i^((m-n)/B).

    Args:
        origin: index in `k` of the first query; len(k) or more where all keys precede it.
        interleaved: the layout of pairs, as in `apply_rope`.

    Raises:
        ValueError: keys after the first query grow, and here so many follow it that the masked
            products above the diagonal would overflow float32. Split the queries.
    """
    log_zeta = torch.tensor(zetas(q.shape[-1], gamma), dtype=torch.float64).log() / scale_base
    centre = (origin + k.shape[1] - 1) / 2
    overlap = k.shape[1] - 1 - origin
    if -log_zeta[0] * overlap > MAX_LOG_FACTOR:
        most = math.floor(-MAX_LOG_FACTOR / log_zeta[0].item())
        raise ValueError(f"xPos decays at most {most} queries with their own keys: got {overlap}")

    def factors(first: float, tokens: int, sign: int, like: Tensor) -> Tensor:
        steps = sign * (torch.arange(tokens, dtype=torch.float64) + first)
        scale = (steps[:, None] * log_zeta).exp()
        scale = scale.repeat_interleave(2, -1) if interleaved else scale.repeat(1, 2)
        return scale[:, None].to(like.device, torch.promote_types(like.dtype, torch.float32))

    return (
        (q * factors(origin - centre, q.shape[1], 1, q)).to(q.dtype),
        (k * factors(-centre, k.shape[1], -1, k)).to(k.dtype),
    )
