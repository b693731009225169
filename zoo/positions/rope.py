"""Rotary position embedding (Su 2021, RoFormer, section 3.4, arXiv 2104.09864).

    inv_freq        theta_i = base^(-2i/d), i = 0 .. d/2 - 1
    apply_rope      R_m x: the pair (x_i, x_(i+d/2)) of the token at position m is rotated by the
                    angle m theta_i, so that (R_m q).(R_n k) depends on m - n alone

Positions reach millions and theta_0 is 1: such angles have lost their fraction in float32. They are
formed in float64 and only their cosine and sine are rounded.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.config.domains import Range, RopeBase
from zoo.errors import refuse
from zoo.ops.dtypes import wide_dtype
from zoo.ops.rotary import apply_rotary, apply_rotary_to_both, rotate_pairs
from zoo.ops.runtime.dispatch import is_transformed, without_values
from zoo.positions.base import CrossLayer, Positions, placed_positions

Frequencies = Sequence[float] | Tensor | Callable[[Tensor], Tensor]


def inverse_frequencies(width: int, base: float = 10000.0) -> tuple[float, ...]:
    """Return theta_i = base^(-2i/width), i = 0 .. width/2 - 1, in float64."""
    if width % 2:
        raise ValueError(
            f"head_width={width}: must be even, as rotary positions rotate pairs of channels."
        )
    if not base > 1:
        raise ValueError(f"rope_base={base}: must be > 1 (its powers are the wavelengths).")
    return tuple(base ** (-2 * i / width) for i in range(width // 2))


MAX_BYTES = 512 << 20  # of cached tables; the least recently used go first
MAX_GROWN = MAX_BYTES // 4  # of the table of one set of frequencies, from position 0 on
MIN_GROWN = 256  # positions
Table = tuple[Float[Tensor, "*t 1 half"], Float[Tensor, "*t 1 half"]]
_tables: OrderedDict[tuple, Table] = OrderedDict()
_last: tuple[tuple, Table] | None = None  # the last call for one position, and what it returned
_guard = threading.Lock()  # recomputation in the backward pass runs in threads of its own


def rotary_tables(
    inv_freq: Sequence[float],
    positions: range | Tensor,
    device: torch.device,
    dtype: torch.dtype,
    attention_factor: float = 1.0,
) -> Table:
    """Return cosine and sine of every position, times `attention_factor`, cached for all layers.

    Consecutive positions are rows of one table for these frequencies, which doubles where a text
    grows beyond it; others, and those of tables above `MAX_GROWN` bytes, are cached as they are.
    """
    global _last
    if is_transformed() or without_values():  # whose tensors are not to outlive it
        at = positions
        if isinstance(at, range):
            at = torch.arange(at.start, at.stop)
        frequencies = torch.tensor(inv_freq, dtype=torch.float64, device=at.device)
        cos, sin = (attention_factor * f for f in rotary_angles(frequencies, at))
        return cos.to(device, dtype), sin.to(device, dtype)
    call = positions, attention_factor, device, dtype, inv_freq
    if isinstance(positions, range) and _last is not None and _last[0] == call:
        return _last[1]  # the other layers' and the keys', for one token after another
    kind = tuple(inv_freq), attention_factor, device, dtype
    rows = positions if isinstance(positions, range) else _consecutive(positions)
    if rows is not None and rows.start >= 0:
        size = MIN_GROWN
        while size < rows.stop:
            size *= 2
        if 2 * size * len(inv_freq) * dtype.itemsize <= MAX_GROWN:
            cos, sin = _cached(kind, size, lambda: torch.arange(size))
            found = cos[rows.start : rows.stop], sin[rows.start : rows.stop]
            if isinstance(positions, range) and len(rows) == 1 and not torch.is_inference(cos):
                _last = call, found
            return found
    if isinstance(positions, range):
        positions = torch.arange(positions.start, positions.stop)
    at = positions.double().cpu()
    return _cached((*kind, at.numpy().tobytes(), tuple(at.shape)), at.numel(), lambda: at)


def _consecutive(positions: Tensor) -> range | None:
    """Return the range that positions (t,) count through; None where they do not."""
    if positions.dim() != 1 or not len(positions) or positions.is_floating_point():
        return None
    first, count = int(positions[0]), len(positions)
    if int(positions[-1]) - first != count - 1:
        return None
    every = torch.arange(first, first + count, dtype=positions.dtype, device=positions.device)
    return range(first, first + count) if torch.equal(positions, every) else None


def _cached(key: tuple, size: int, positions: Callable[[], Tensor]) -> Table:
    """Return the table under the key (frequencies, factor, device, dtype, ...) if it has at least
    `size` rows, else compute and keep it."""
    with _guard:
        if key in _tables and len(_tables[key][0].flatten(0, -3)) >= size:
            _tables.move_to_end(key)
            return _tables[key]
    inv_freq, attention_factor, device, dtype = key[:4]
    with torch.inference_mode(False), torch.no_grad():
        at = positions()
        on = device if device.type == "cuda" else at.device  # not every device has float64
        turns = rotary_angles(torch.tensor(inv_freq, dtype=torch.float64, device=on), at)
        cos, sin = ((attention_factor * f).to(device, dtype) for f in turns)
    with _guard:
        _tables[key] = cos, sin
        _tables.move_to_end(key)
        while len(_tables) > 1 and sum(2 * c.nbytes for c, _ in _tables.values()) > MAX_BYTES:
            _tables.popitem(last=False)
    return cos, sin


def rotary_angles(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position times frequency, (*t, 1, half), alike for every head."""
    angles = positions.to(inv_freq.device, torch.float64)[..., None] * inv_freq
    return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


def apply_rope(
    x: Float[Tensor, "b t h d"],
    inv_freq: Frequencies,
    positions: int | range | Tensor = 0,
    attention_factor: Any = 1.0,
    *,
    interleaved: bool = False,
) -> Float[Tensor, "b t h d"]:
    """Rotate each pair of channels of x by its token's position times the pair's frequency.

    Args:
        inv_freq: one frequency per pair, (half,); a tensor of them, which gets its gradient and may
            have a row per token, (*t, half); or a function of the positions that returns either.
            With fewer than d/2 pairs the first channels are rotated, the rest pass.
        positions: the position of the first token, the others following it; or a tensor (t,),
            (b, t) or (1,) with the position of each, whole or not.
        attention_factor: multiplies the rotated channels, so scores grow by its square.
        interleaved: pairs are (2i, 2i + 1), RoFormer's layout, instead of (i, i + d/2), Llama's.
    """
    if isinstance(inv_freq, tuple) and not inv_freq:
        return x
    wide = x.to(wide_dtype(x))
    if isinstance(positions, int):
        positions = range(positions, positions + x.shape[1])
    if isinstance(inv_freq, Callable | Tensor):
        if isinstance(positions, range):
            positions = torch.arange(positions.start, positions.stop)
        if isinstance(inv_freq, Callable):
            inv_freq = inv_freq(positions)
    if isinstance(inv_freq, Tensor):
        assert isinstance(positions, Tensor)
        angles = rotary_angles(inv_freq.double(), positions)
        cos, sin = ((attention_factor * f).to(x.device, wide.dtype) for f in angles)
    else:
        cos, sin = rotary_tables(inv_freq, positions, x.device, wide.dtype, attention_factor)
    if not interleaved:
        return apply_rotary(wide, cos, sin).to(x.dtype)
    width = 2 * cos.shape[-1]
    pairs = rotate_pairs(wide[..., 0:width:2], wide[..., 1:width:2], cos, sin)
    rotated = torch.stack(pairs, -1).flatten(-2).to(x.dtype)
    return torch.cat([rotated, x[..., width:]], -1) if width < x.shape[-1] else rotated


def rotate_both(
    q: Float[Tensor, "b t h d"], k: Float[Tensor, "b t g d"], inv_freq: Sequence[float], start: int
) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b t g d"]]:
    """`apply_rope` of the queries and keys of tokens `start`, `start` + 1, ... of a text."""
    dtype = wide_dtype(q)
    if not inv_freq or q.dtype != dtype or k.dtype != dtype:
        return apply_rope(q, inv_freq, start), apply_rope(k, inv_freq, start)
    tokens = range(start, start + q.shape[1])
    return apply_rotary_to_both(q, k, *rotary_tables(inv_freq, tokens, q.device, dtype))


def by_row(
    scaling: Callable[[int], tuple[Any, float]], row_lengths: Int[Tensor, " b"]
) -> tuple[Any, Any]:
    """Return each row's frequencies and attention factor, for a text of its length.

    `scaling` maps a length in tokens to both. Rows of one length share what it returns; otherwise
    the results are tensors with a row for each, (b, 1, half) and (b, 1, 1, 1), so that no row
    depends on the rows beside it; where frequencies depend on the position, a function of those.
    """
    lengths = row_lengths.tolist()
    found = {length: scaling(int(length)) for length in dict.fromkeys(lengths)}
    if len(found) == 1:
        return found[lengths[0]]
    factors = torch.tensor([found[n][1] for n in lengths], dtype=torch.float64)[:, None, None, None]
    if any(callable(f) for f, _ in found.values()):

        def by_position(positions: Int[Tensor, "b t"]) -> Float[Tensor, "b t half"]:
            rows = zip(positions.split(1), lengths, strict=True)
            return torch.cat([_at(found[n][0], row) for row, n in rows])

        return by_position, factors
    inv_freq = {n: torch.as_tensor(f, dtype=torch.float64) for n, (f, _) in found.items()}
    return torch.stack([inv_freq[n] for n in lengths])[:, None], factors


def _at(inv_freq: Any, positions: Int[Tensor, "1 t"]) -> Float[Tensor, "1 t half"]:
    """Return the frequencies at each position, where they may depend on it."""
    if isinstance(inv_freq, Callable):
        return inv_freq(positions)
    return torch.as_tensor(inv_freq, dtype=torch.float64).expand(*positions.shape, -1)


class Rope(Positions):
    """Rotary positions; a `pattern` rotates queries and keys itself, and caches keys unrotated.

    Args:
        rope_base: b of theta_i = b^(-2i/d); larger ones give longer wavelengths.
        partial_rotary_factor: share of a head's channels, the first ones, that are rotated
            (GPT-NeoX: 0.25).
    """

    takes_pattern: ClassVar[bool] = True
    placeable: ClassVar[bool] = True
    scaled_by: ClassVar[tuple[str, ...]] = ("zoo.positions.scaling", "zoo.positions.clex")

    def __init__(
        self,
        heads: int,
        head_width: int,
        /,
        *,
        rope_base: RopeBase = 10000.0,
        partial_rotary_factor: Annotated[float, Range(above=0, most=1)] = 1.0,
    ) -> None:
        super().__init__(heads, head_width)
        self.rope_base = rope_base
        self.rotary_width = int(head_width * partial_rotary_factor)
        if partial_rotary_factor < 1 and (self.rotary_width % 2 or not self.rotary_width):
            rule = f"must make an even number of the {head_width} channels of a head, from 2 on"
            refuse("partial_rotary_factor", partial_rotary_factor, rule)
        self.inv_freq = inverse_frequencies(self.rotary_width, rope_base)

    def rotate(self, x: Float[Tensor, "b t h d"], at: int | Tensor) -> Float[Tensor, "b t h d"]:
        return apply_rope(x, self.inv_freq, at)

    def prepare(
        self, q: Tensor, k: Tensor, start: int, cross_layer: CrossLayer | None = None
    ) -> tuple[Tensor, Tensor]:
        at = placed_positions(self, cross_layer)
        if at is not None:
            inv_freq, factor = self._frequencies(cross_layer or {})
            return apply_rope(q, inv_freq, at, factor), apply_rope(k, inv_freq, at, factor)
        return (q, k) if self.pattern else rotate_both(q, k, self.inv_freq, start)

    def rotation_of_a_token(
        self, position: int, like: Tensor, cross_layer: CrossLayer | None
    ) -> Table | None:
        placed = placed_positions(self, cross_layer) is not None
        if placed or self.pattern or self.softcap is not None or not self.inv_freq:
            return None
        tokens = range(position, position + 1)
        return rotary_tables(self.inv_freq, tokens, like.device, wide_dtype(like))

    def _frequencies(self, cross_layer: CrossLayer) -> tuple[Frequencies, Any]:
        """Return those of a training window's length, and their attention factor."""
        if "inv_freq" in cross_layer:  # trained ones, the same for all layers
            return cross_layer["inv_freq"], 1.0
        if self.pattern is None:
            return self.inv_freq, 1.0
        scaling = self.pattern.scaling
        return by_row(scaling, cross_layer["lengths"]) if self.pattern.bucket else scaling(0)
