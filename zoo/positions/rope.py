"""Rotary position embedding (Su 2021, RoFormer, section 3.4).

    inv_freq        theta_i = base^(-2i/d), i = 0 .. d/2 - 1
    rotate(x, m)    R_m x: each pair (x1, x2) turned by the angle m theta_i,
                    so that (R_m q).(R_n k) depends on m - n alone

Angles are products of positions up to millions with theta up to 1, where float32 has lost the
turn: they are formed in float64 and only their cosine and sine are rounded.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.ops.rotary import rotary, turned_pairs

Frequencies = Sequence[float] | Tensor | Callable[[Tensor], Tensor]


def inverse_frequencies(width: int, base: float = 10000.0) -> tuple[float, ...]:
    """theta_i = base^(-2i/width), i = 0 .. width/2 - 1, in float64."""
    if width % 2:
        raise ValueError(f"rotary positions turn pairs of channels: head width {width} is odd")
    if not base > 1:
        raise ValueError(f"rope_base={base} must be above 1: frequencies fall from 1 by its powers")
    return tuple(base ** (-2 * i / width) for i in range(width // 2))


MAX_BYTES = 512 << 20  # of tables that are kept, those used last
_tables: OrderedDict[tuple, tuple[Tensor, Tensor]] = OrderedDict()
_guard = threading.Lock()  # a backward pass that computes again has threads of its own


def turn_table(
    inv_freq: Sequence[float],
    positions: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    attention_factor: float = 1.0,
) -> tuple[Float[Tensor, "*t 1 half"], Float[Tensor, "*t 1 half"]]:
    """Cosine and sine of every position, times `attention_factor`; kept for the next layer."""
    at = positions.double().cpu()
    place = at.numpy().tobytes(), tuple(at.shape), device, dtype
    key = (tuple(inv_freq), attention_factor, *place)
    with _guard:
        if key in _tables:
            _tables.move_to_end(key)
            return _tables[key]
    with torch.inference_mode(False), torch.no_grad():
        where = device if device.type == "cuda" else at.device  # not every device has float64
        turns = turns_at(torch.tensor(inv_freq, dtype=torch.float64, device=where), at)
        cos, sin = ((attention_factor * f).to(device, dtype) for f in turns)
    with _guard:
        _tables[key] = cos, sin
        while len(_tables) > 1 and sum(2 * c.nbytes for c, _ in _tables.values()) > MAX_BYTES:
            _tables.popitem(last=False)
    return cos, sin


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
    `positions`, (t,), (b, t) or (1,), whole or not, are where they stand instead. A tensor of
    frequencies gets its gradient, and may have a row for each token. `attention_factor`
    multiplies the turned channels of q and of k, and so their scores by its square.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if positions is None:
        positions = torch.arange(start, start + x.shape[1])
    if isinstance(inv_freq, Tensor):
        turns = turns_at(inv_freq.double(), positions)
        cos, sin = ((attention_factor * f).to(x.device, wide.dtype) for f in turns)
    else:
        cos, sin = turn_table(inv_freq, positions, x.device, wide.dtype, attention_factor)
    if not interleaved:
        return rotary(wide, cos, sin).to(x.dtype)
    width = 2 * cos.shape[-1]
    pairs = turned_pairs(wide[..., 0:width:2], wide[..., 1:width:2], cos, sin)
    turned = torch.stack(pairs, -1).flatten(-2).to(x.dtype)
    return torch.cat([turned, x[..., width:]], -1) if width < x.shape[-1] else turned


def by_row(
    scaling: Callable[[int], tuple[Any, float]], positions: Int[Tensor, "b t"]
) -> tuple[Any, Any]:
    """The frequencies and the attention factor of texts that reach as far as each row of positions.

    `scaling` gives them for a length. Where rows reach equally far they are what it gives;
    otherwise tensors with a row for each, (b, 1, half) and (b, 1, 1, 1): what a row reads never
    depends on the rows beside it.
    """
    lengths = (positions.amax(1) + 1).tolist()
    found = {length: scaling(int(length)) for length in dict.fromkeys(lengths)}
    if len(found) == 1:
        return found[lengths[0]]
    inv_freq = {n: torch.as_tensor(f, dtype=torch.float64) for n, (f, _) in found.items()}
    factors = torch.tensor([found[n][1] for n in lengths], dtype=torch.float64)
    return torch.stack([inv_freq[n] for n in lengths])[:, None], factors[:, None, None, None]


def turned(
    x: Float[Tensor, "b n h d"],
    inv_freq: Frequencies,
    positions: Tensor,
    factor: float = 1.0,
) -> Float[Tensor, "b n h d"]:
    """Each token turned to its place in `positions`, as `rotate` takes them, times `factor`.

    Frequencies may be a function of the positions.
    """
    inv_freq = inv_freq(positions) if isinstance(inv_freq, Callable) else inv_freq
    return rotate(x, inv_freq, positions=positions, attention_factor=factor)
