"""Rotary position embedding (Su 2021, RoFormer, section 3.4).

    inv_freq        theta_i = base^(-2i/d), i = 0 .. d/2 - 1
    rotate(x, m)    R_m x: each pair (x1, x2) turned by the angle m theta_i,
                    so that (R_m q).(R_n k) depends on m - n alone

Angles are products of positions up to millions with theta up to 1, where float32 has lost the
turn: they are formed in float64 and only their cosine and sine are rounded.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor


def inverse_frequencies(width: int, base: float = 10000.0) -> tuple[float, ...]:
    """theta_i = base^(-2i/width), i = 0 .. width/2 - 1, in float64."""
    if width % 2:
        raise ValueError(f"rotary positions turn pairs of channels: head width {width} is odd")
    return tuple(base ** (-2 * i / width) for i in range(width // 2))


@lru_cache(maxsize=8)  # the layers of a model ask for the same table one after another
def turn_table(
    inv_freq: tuple[float, ...], start: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "t 1 half"], Float[Tensor, "t 1 half"]]:
    """Cosine and sine of every position start .. start+tokens-1."""
    with torch.inference_mode(False), torch.no_grad():
        positions = torch.arange(start, start + tokens, dtype=torch.float64)
        angles = torch.outer(positions, torch.tensor(inv_freq, dtype=torch.float64))[:, None]
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(
    x: Float[Tensor, "b t h d"],
    inv_freq: tuple[float, ...],
    start: int = 0,
    *,
    interleaved: bool = False,
) -> Float[Tensor, "b t h d"]:
    """Rotate the tokens x, which stand at positions start, start+1, ...

    Pairs are (i, i + d/2), Llama's layout, or (2i, 2i + 1), RoFormer's, when `interleaved`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = turn_table(inv_freq, start, x.shape[1], x.device, wide.dtype)
    if interleaved:
        x1, x2 = wide[..., 0::2], wide[..., 1::2]
    else:
        x1, x2 = wide.chunk(2, -1)
    turned = (x1 * cos - x2 * sin, x1 * sin + x2 * cos)
    out = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return out.to(x.dtype)


def turned(
    x: Float[Tensor, "b n h d"],
    inv_freq: Sequence[float],
    positions: Tensor,
    factor: float = 1.0,
) -> Float[Tensor, "b n h d"]:
    """Each token turned to its place in `positions` (n,), whole or not, times `factor`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    theta = torch.tensor(inv_freq, dtype=torch.float64)
    angles = torch.outer(positions.cpu().double(), theta)[:, None]
    cos, sin = ((factor * f(angles)).to(x.device, wide.dtype) for f in (torch.cos, torch.sin))
    x1, x2 = wide.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).to(x.dtype)
