"""xPos: rotary positions with a decay by distance, and blockwise causal attention (Sun 2022, LeX
Transformer, sections 3.2, 3.3, arXiv 2212.10554).

    zeta_i      (i / (d/2) + gamma) / (1 + gamma), i = 0 .. d/2 - 1, one per rotated pair
    q'_m        R_m q_m zeta^((m - c) / B),  k'_n = R_n k_n zeta^(-(n - c) / B),  B = `scale_base`

The score then carries zeta^((m-n)/B) for any centre c, and fast pairs decay first. Far from c one
of the factors overflows (0.2857^(-n/512) exceeds float32 at n = 36k). Here c lies between the
queries and the keys of one part of the attention, keys are cached without rotation and decay, and
no exponent depends on the part's place in the text.

Text is cut into blocks of half the training length. Each query sees its own block up to itself and
the block before: every key within the training length, and no new distance beyond it. Where a call
has more tokens than a block, all blocks are computed at once, folded into the batch: each over its
own keys, and each over the keys of the one before. (One after the other, the gradient of every
block would fill a tensor as long as the text.)
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.attention.pattern import AttentionPattern, KeyBlock, Scaling, identity
from zoo.config.domains import Positive, RopeBase
from zoo.errors import refuse
from zoo.ops.attention import Part, attend
from zoo.ops.dtypes import wide_dtype
from zoo.ops.merge import Partial, merge
from zoo.positions.base import Positions
from zoo.positions.rope import apply_rope, inverse_frequencies

MAX_BLOCK = 4096  # tokens; larger blocks are read one after the other
MAX_LOG_FACTOR = 40.0  # of products above the diagonal, which a causal mask hides


def zetas(width: int, gamma: float = 0.4) -> tuple[float, ...]:
    """Return zeta_i of each pair. Golden, d=8: 0.2857, 0.4643, 0.6429, 0.8214."""
    if width % 2 or not gamma > 0:
        raise ValueError(f"gamma={gamma}: must be above 0, and the head width, {width}, even.")
    half = width // 2
    return tuple((i / half + gamma) / (1 + gamma) for i in range(half))


def apply_xpos_decay(
    q: Float[Tensor, "b tq h d"],
    k: Float[Tensor, "b tk g d"],
    origin: int,
    *,
    gamma: float = 0.4,
    scale_base: float = 512.0,
    interleaved: bool = False,
) -> tuple[Float[Tensor, "b tq h d"], Float[Tensor, "b tk g d"]]:
    """Scale rotated q and k so that pair i of q_m.k_n decays as zeta_i^((m-n)/B).

    Args:
        origin: index in `k` of the first query; len(k) or more where all keys precede it.
        interleaved: the layout of pairs, as in `apply_rope`.

    Raises:
        ValueError: keys after the first query grow, and here so many follow it that the masked
            products above the diagonal would overflow float32. Split the queries.
    """
    zeta = zetas(q.shape[-1], gamma)
    log_zeta = torch.tensor(zeta, dtype=torch.float64).log() / scale_base
    centre = (origin + k.shape[1] - 1) / 2
    overlap = k.shape[1] - 1 - origin
    steepest = math.log(zeta[0]) / scale_base
    if -steepest * overlap > MAX_LOG_FACTOR:
        most = math.floor(-MAX_LOG_FACTOR / steepest)
        raise ValueError(f"xPos decays at most {most} queries with their own keys: got {overlap}")

    def factors(first: float, tokens: int, sign: int, like: Tensor) -> Tensor:
        steps = sign * (torch.arange(tokens, dtype=torch.float64) + first)
        scale = (steps[:, None] * log_zeta).exp()
        scale = scale.repeat_interleave(2, -1) if interleaved else scale.repeat(1, 2)
        return scale[:, None].to(like.device, wide_dtype(like))

    return (
        (q * factors(origin - centre, q.shape[1], 1, q)).to(q.dtype),
        (k * factors(-centre, k.shape[1], -1, k)).to(k.dtype),
    )


class XPos(Positions):
    """xPos under blockwise causal attention.

    Args:
        window: the training length in tokens; blocks are half of it.
        rope_base: b of theta_i = b^(-2i/d).
    """

    one_sided: ClassVar[bool] = True

    def __init__(
        self,
        heads: int,
        head_width: int,
        /,
        *,
        window: Positive | None = None,
        rope_base: RopeBase = 10000.0,
    ) -> None:
        super().__init__(heads, head_width)
        if window is None or window < 1:
            rule = "must be the training length in tokens, whose half is a block"
            refuse("window", window, rule, "Use model=xpos, which sets it to seq_len.")
        theta = inverse_frequencies(head_width, rope_base)
        self.pattern = BlockwiseXPos(lambda _: (theta, 1.0), block=(window + 1) // 2)


class BlockwiseXPos(AttentionPattern):
    """`block` tokens per block; 2 block - 1 keys are kept, what the next query may see."""

    def __init__(self, scaling: Scaling, *, block: int) -> None:
        super().__init__(scaling)
        if block < 1:
            raise ValueError(f"block={block}: must be at least 1 token.")
        self.block, self.recent = block, 2 * block - 1
        self.steps = [*self.steps, block]

    def views(self, rows: range) -> list[KeyBlock]:
        first = max(rows.start // self.block - 1, 0) * self.block
        views = [KeyBlock(rows, identity, identity, causal=True)]
        if first < rows.start:
            views.append(KeyBlock(range(first, rows.start), identity, identity))
        return views

    def scored(self, q: Tensor, k: Tensor, origin: int) -> tuple[Tensor, Tensor]:
        return apply_xpos_decay(q, k, origin)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: int,
        backend: str = "auto",
        always: Sequence[Part] = (),
        softcap: float | None = None,
    ) -> Tensor:
        tokens, size = q.shape[1], self.block
        ahead = start % size  # tokens of the first block that were read before
        first = int(start < size)  # 1 where the first block has none before it
        end, keys = start + tokens, ahead + tokens + (1 - first) * size
        if tokens <= size or size > MAX_BLOCK or k.shape[1] < keys:
            return super().__call__(q, k, v, start, backend, always, softcap)
        inv_freq, factor = self.scaling(end)
        q = apply_rope(q, inv_freq, torch.arange(start, end), factor)
        k = apply_rope(k[:, -keys:], inv_freq, torch.arange(end - keys, end), factor)
        q = F.pad(q, (0, 0, 0, 0, ahead, 0))
        q, k, v = (_blocks(x, size) for x in (q, k, v[:, -keys:]))
        own = _each(q, k[:, 1 - first :], v[:, 1 - first :], 0, softcap, backend)
        before = _each(q[:, first:], k[:, :-1], v[:, :-1], size, softcap, backend)
        if first:
            out, lse = before
            pad = (0, 0) * (out.dim() - 2)
            before = F.pad(out, (*pad, 1, 0)), F.pad(lse, (*pad[2:], 1, 0), value=-torch.inf)
        out, lse = (x.flatten(1, 2)[:, ahead:][:, :tokens] for x in merge([own, before]))
        if not always:
            return out
        return merge([(out, lse), attend(always, softcap=softcap, backend=backend)])[0]


def _blocks(x: Tensor, size: int) -> Tensor:
    """(b, t, h, d) -> (b, blocks, size, h, d), the last filled up with zeros, which none sees."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _each(
    q: Tensor, k: Tensor, v: Tensor, origin: int, softcap: float | None, backend: str
) -> Partial:
    """Each block of queries over its block of keys, of which the first query is number `origin`."""
    b, blocks = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    q, k = apply_xpos_decay(q, k, origin)
    out, lse = attend([Part(q, k, v, causal=origin == 0)], softcap=softcap, backend=backend)
    return out.unflatten(0, (b, blocks)), lse.unflatten(0, (b, blocks))
