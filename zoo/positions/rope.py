"""Rotary position embedding (Su 2021, RoFormer, section 3.4).

    inv_freq        theta_i = base^(-2i/d), i = 0 .. d/2 - 1
    rotate(x, m)    R_m x: each pair (x1, x2) turned by the angle m theta_i,
                    so that (R_m q).(R_n k) depends on m - n alone

Angles are products of positions up to millions with theta up to 1, where float32 has lost the
turn: they are formed in float64 and only their cosine and sine are rounded.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

Frequencies = Sequence[float] | Tensor | Callable[[Tensor], Tensor]


def inverse_frequencies(width: int, base: float = 10000.0) -> tuple[float, ...]:
    """theta_i = base^(-2i/width), i = 0 .. width/2 - 1, in float64."""
    if width % 2:
        raise ValueError(f"rotary positions turn pairs of channels: head width {width} is odd")
    if not base > 1:
        raise ValueError(f"rotary base={base}: frequencies fall from 1 only with a base above 1")
    return tuple(base ** (-2 * i / width) for i in range(width // 2))


@lru_cache(maxsize=8)  # the layers of a model ask for the same table one after another
def turn_table(
    inv_freq: tuple[float, ...],
    start: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    attention_factor: float = 1.0,
) -> tuple[Float[Tensor, "t 1 half"], Float[Tensor, "t 1 half"]]:
    """Cosine and sine of every position start .. start+tokens-1."""
    with torch.inference_mode(False), torch.no_grad():
        positions = torch.arange(start, start + tokens, dtype=torch.float64)
        cos, sin = turns_at(torch.tensor(inv_freq, dtype=torch.float64), positions)
        return (
            (attention_factor * cos).to(device, dtype),
            (attention_factor * sin).to(device, dtype),
        )


def turns_at(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, the same for every head."""
    angles = positions.to(inv_freq.device, torch.float64)[..., None] * inv_freq
    return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


def rotate(
    x: Float[Tensor, "b t h d"],
    inv_freq: Sequence[float] | Float[Tensor, "*t half"],
    start: int = 0,
    *,
    positions: Tensor | None = None,
    attention_factor: float = 1.0,
    interleaved: bool = False,
) -> Float[Tensor, "b t h d"]:
    """Rotate the tokens x, which stand at positions start, start+1, ...

    Pairs are (i, i + d/2), Llama's layout, or (2i, 2i + 1), RoFormer's, when `interleaved`.
    Frequencies for fewer than d channels turn the first ones and leave the rest as they are.
    `positions`, (t,) or (b, t), whole or not, are where the tokens stand instead. A tensor of
    frequencies gets its gradient, and may have a row for each token. `attention_factor`
    multiplies the turned channels of q and of k, and so their scores by its square.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if positions is None and not isinstance(inv_freq, Tensor):
        cos, sin = turn_table(
            tuple(inv_freq), start, x.shape[1], x.device, wide.dtype, attention_factor
        )
    else:
        if positions is None:
            positions = torch.arange(start, start + x.shape[1])
        turns = turns_at(torch.as_tensor(inv_freq, dtype=torch.float64), positions)
        cos, sin = ((attention_factor * f).to(x.device, wide.dtype) for f in turns)
    width = 2 * cos.shape[-1]
    if width > x.shape[-1]:
        raise ValueError(f"rotary width {width} is more than the head width {x.shape[-1]}")
    wide, rest = wide[..., :width], x[..., width:]
    if interleaved:
        out = torch.stack(_turned_pairs(wide[..., 0::2], wide[..., 1::2], cos, sin), -1).flatten(-2)
    elif cos.requires_grad:
        x1, x2 = wide.chunk(2, -1)
        out = torch.cat(_turned_pairs(x1, x2, cos, sin), -1)
    else:
        out = _Turn.apply(wide, cos, sin)
    return torch.cat([out.to(x.dtype), rest], -1) if rest.shape[-1] else out.to(x.dtype)


def _turned_pairs(x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return x1 * cos - x2 * sin, x1 * sin + x2 * cos


class _Turn(torch.autograd.Function):
    """Llama's layout by turns that are fixed, written in place: a training step feels the copies.

    The gradient of a turn is the turn back.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        out = x.new_empty(x.shape)
        (x1, x2), (y1, y2) = x.chunk(2, -1), out.chunk(2, -1)
        torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
        torch.mul(x1, sin, out=y2).addcmul_(x2, cos)
        return out

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Turn.apply(grad, cos, -sin), None, None


def turned(
    x: Float[Tensor, "b n h d"],
    inv_freq: Frequencies,
    positions: Tensor,
    factor: float = 1.0,
) -> Float[Tensor, "b n h d"]:
    """Each token turned to its place in `positions`, (n,) or (b, n), whole or not, times `factor`.

    Frequencies may be a function of the positions.
    """
    inv_freq = inv_freq(positions) if isinstance(inv_freq, Callable) else inv_freq
    return rotate(x, inv_freq, positions=positions, attention_factor=factor)
