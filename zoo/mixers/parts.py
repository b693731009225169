"""What several mixers are made of."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from zoo.mixers.base import Mixer, compute_dtype, linear
from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear import project


def head_width(width: int, heads: int) -> int:
    """Channels of each head. Raises ValueError where the heads do not divide the width."""
    if width % heads:
        raise ValueError(f"heads={heads}: must divide width={width}.")
    return width // heads


class MultiHead(Mixer):
    """Queries, keys and values of equal heads, each kind projected from the width to the width."""

    def __init__(self, width: int, heads: int, *, causal: bool, backend: str) -> None:
        super().__init__()
        self.causal, self.backend = causal, backend
        self.heads, self.head_width = heads, head_width(width, heads)
        self.q_proj, self.k_proj, self.v_proj = (linear(width, width) for _ in range(3))

    def by_head(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... h k"]:
        return x.unflatten(-1, (self.heads, self.head_width))

    def qkv(self, x: Float[Tensor, "b t d"]) -> list[Float[Tensor, "b t h k"]]:
        return [self.by_head(y) for y in project(x, self.q_proj, self.k_proj, self.v_proj)]


class KeyValues(NamedTuple):
    """A key/value cache."""

    k: Float[Tensor, "b n h d"]
    v: Float[Tensor, "b n h d"]
    tokens_seen: int  # more than n where older keys were evicted


def append(past: Shaped[Tensor, "b n ..."], x: Shaped[Tensor, "b t ..."]) -> Tensor:
    """Both behind one another, in x's dtype."""
    return torch.cat([past.to(x.dtype), x], 1)


_reserved: int | None = None  # tokens that chunks to come will add to caches with gradients


@contextmanager
def reserve(tokens: int) -> Iterator[None]:
    """Have `grow` leave room for so many tokens more, also where there are gradients.

    For one text in chunks whose states all stay in the graph: keys and values of all chunks are in
    one memory, where each chunk would have a copy of those before it.
    """
    global _reserved
    before, _reserved = _reserved, tokens
    try:
        yield
    finally:
        _reserved = before


class _Growing:
    """Memory behind a cache: `filled` of its tokens are in use by the longest cache that has it."""

    def __init__(self, memory: Shaped[Tensor, "b n ..."], filled: int) -> None:
        self.memory, self.filled = memory, filled


def grow(past: Shaped[Tensor, "b n ..."], x: Shaped[Tensor, "b t ..."]) -> Tensor:
    """Both behind one another, in x's dtype, as `append` returns them.

    The result has room behind it, a quarter of its tokens, and the next call writes there instead
    of copying the past. Where another call has written there already, as where several answers go
    on from one prompt, the past is copied: no cache ever changes. With gradients only where room is
    reserved (`reserve`), and so much.
    """
    before, tokens = past.shape[1], past.shape[1] + x.shape[1]
    differentiable = torch.is_grad_enabled() and (past.requires_grad or x.requires_grad)
    if differentiable and _reserved is None:
        return append(past, x)
    both, room = _with_room(past, x.shape[1], x)
    if differentiable:  # what autograd has saved of the past stays as it is
        room.memory.data[:, before:tokens] = x.detach()
        both = _Grown.apply(past, x, both)
        both._growing = room
    else:
        both.narrow(1, before, tokens - before).copy_(x)
    return both


def extended(past: Shaped[Tensor, "b n ..."], tokens: int, like: Tensor) -> Tensor:
    """As `grow`, with room for so many tokens in like's dtype, which are yet to be written."""
    return _with_room(past, tokens, like)[0]


def _with_room(past: Tensor, more: int, like: Tensor) -> tuple[Tensor, _Growing]:
    before, tokens = past.shape[1], past.shape[1] + more
    room: _Growing | None = getattr(past, "_growing", None)
    if (
        room is None
        or room.filled != before
        or room.memory.dtype != like.dtype
        or room.memory.shape[1] < tokens
        or past.is_inference() != like.is_inference()
    ):
        size = tokens + (max(64, tokens // 4) if _reserved is None else _reserved)
        room = _Growing(like.new_empty((len(past), size, *past.shape[2:])), before)
        room.memory[:, :before] = past.detach()
    both = room.memory.narrow(1, 0, tokens)
    room.filled, both._growing = tokens, room  # type: ignore[attr-defined]
    return both, room


class _Grown(torch.autograd.Function):
    """Past and x, which are in one memory already, with the gradient of `append`."""

    @staticmethod
    def forward(ctx: Any, past: Tensor, x: Tensor, both: Tensor) -> Tensor:
        ctx.before, ctx.dtype = past.shape[1], past.dtype
        return both.view_as(both)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore
        return dy[:, : ctx.before].to(ctx.dtype), dy[:, ctx.before :], None


def no_keys(weight: Tensor, batch: int, heads: int, width: int) -> Float[Tensor, "b 0 h d"]:
    """Keys before the first token, of the dtype that products with `weight` will have."""
    return weight.new_empty((batch, 0, heads, width), dtype=compute_dtype(weight))


def wide_zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A state of zeros, on the device of `like`."""
    return like.new_zeros(shape, dtype=wide_dtype(like))


def conv_weight(channels: int, taps: int) -> nn.Parameter:
    """Of a depthwise convolution over `taps` tokens: U(+-1/sqrt(taps)), PyTorch's own."""
    bound = taps**-0.5
    return nn.Parameter(torch.empty(channels, taps).uniform_(-bound, bound))


class HeadConvolution(nn.Module):
    """A convolution over tokens with `taps` weights per head, the same for all its channels.

    Args:
        heads: of the tokens that are convolved.
        taps: tokens that an output depends on: its own and those before it, or to both sides.
    """

    def __init__(self, heads: int, taps: int) -> None:
        super().__init__()
        self.weight = conv_weight(heads, taps)

    def forward(
        self, x: Float[Tensor, "b t h d"], before: Float[Tensor, "b w h d"], *, causal: bool = True
    ) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b w h d"]]:
        """Return the sums, and the last `taps` - 1 tokens that were read.

        `before` are these of the text so far, zeros at its beginning; without `causal` as many
        zeros are on both sides.
        """
        whole, tokens = append(before, x), x.shape[1]
        if not causal:
            whole = F.pad(x, (0, 0, 0, 0, before.shape[1] // 2, before.shape[1]))
        taps = self.weight.to(x.dtype)[..., None].unbind(1)
        y = torch.stack([w * whole[:, k : k + tokens] for k, w in enumerate(taps)]).sum(0)
        return y, whole[:, whole.shape[1] - len(taps) + 1 :]


def no_inputs(weight: Float[Tensor, "d w"], batch: int) -> Float[Tensor, "b w-1 d"]:
    """The state of a convolution before the first token: its inputs so far, zeros."""
    channels, taps = weight.shape
    return weight.new_zeros((batch, taps - 1, channels), dtype=compute_dtype(weight))


def shifted(x: Tensor, last: Tensor | None) -> Tensor:
    """Each token's predecessor, (b, t, d): `last` (b, d), or zeros, then x without its last."""
    first = torch.zeros_like(x[:, 0]) if last is None else last.to(x.dtype)
    return torch.cat([first[:, None], x[:, :-1]], 1)
