"""xPos: rotary positions whose scores fade with the distance (Sun 2022, sections 3.2, 3.3).

    zeta_i      (i / (d/2) + gamma) / (1 + gamma), i = 0 .. d/2 - 1, one per rotated pair
    q'_m        R_m q_m zeta^((m - c) / B),  k'_n = R_n k_n zeta^(-(n - c) / B),  B = `scale_base`

so that the score carries zeta^((m-n)/B) whatever the centre c, the fast pairs fading first. Far
from c one side overflows (0.2857^(-n/512) leaves float32 at n = 36k). Here c lies between the
queries and the keys of one part of the attention, keys are kept turned but not faded, and no
exponent depends on where in the text the part stands.

The paper's extrapolation needs blockwise causal attention beside it: blocks of half the training
length, each query over its own block and the one before. `fade(q, k, 0)` serves the former,
`fade(q, k, len(k))` the latter, and both serve all blocks at once.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = 40.0  # ln of the largest factor on a product that a causal mask hides


def zetas(width: int, gamma: float = 0.4) -> tuple[float, ...]:
    """zeta_i of each pair. Golden, d=8: 0.2857, 0.4643, 0.6429, 0.8214."""
    if width % 2 or not gamma > 0:
        raise ValueError(f"xPos needs an even head width and gamma > 0: got {width} and {gamma}")
    half = width // 2
    return tuple((i / half + gamma) / (1 + gamma) for i in range(half))


def fade(
    q: Float[Tensor, "b tq h d"],
    k: Float[Tensor, "b tk h d"],
    origin: int,
    *,
    gamma: float = 0.4,
    scale_base: float = 512.0,
    interleaved: bool = False,
) -> tuple[Float[Tensor, "b tq h d"], Float[Tensor, "b tk h d"]]:
    """Turned q and k with the factors that make pair i of q_m.k_n fade as zeta_i^((m-n)/B).

    `origin` is the index in `k` of the first query, len(k) or more where all keys come before
    it. Only keys after the first query can grow; ValueError where so many do that the products
    above the diagonal would leave float32: split the queries then.
    """
    log_zeta = torch.tensor(zetas(q.shape[-1], gamma), dtype=torch.float64).log() / scale_base
    centre = (origin + k.shape[1] - 1) / 2
    overlap = k.shape[1] - 1 - origin
    if -log_zeta[0] * overlap > LARGEST:
        most = math.floor(-LARGEST / log_zeta[0].item())
        raise ValueError(f"xPos fades at most {most} queries with their own keys: got {overlap}")

    def factors(first: float, tokens: int, sign: int, like: Tensor) -> Tensor:
        steps = sign * (torch.arange(tokens, dtype=torch.float64) + first)
        scale = (steps[:, None] * log_zeta).exp()
        scale = scale.repeat_interleave(2, -1) if interleaved else scale.repeat(1, 2)
        return scale[:, None].to(like.device, torch.promote_types(like.dtype, torch.float32))

    return (
        (q * factors(origin - centre, q.shape[1], 1, q)).to(q.dtype),
        (k * factors(-centre, k.shape[1], -1, k)).to(k.dtype),
    )
