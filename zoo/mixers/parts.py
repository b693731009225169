"""What several mixers are made of."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.mixers.base import Mixer, compute_dtype, linear


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
        return [self.by_head(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj)]


def conv_weight(channels: int, taps: int) -> nn.Parameter:
    """Of a depthwise convolution over `taps` tokens: U(+-1/sqrt(taps)), PyTorch's own."""
    bound = taps**-0.5
    return nn.Parameter(torch.empty(channels, taps).uniform_(-bound, bound))


def no_inputs(weight: Float[Tensor, "d w"], batch: int) -> Float[Tensor, "b w-1 d"]:
    """The state of a convolution before the first token: its inputs so far, zeros."""
    channels, taps = weight.shape
    return weight.new_zeros((batch, taps - 1, channels), dtype=compute_dtype(weight))


def shifted(x: Tensor, last: Tensor | None) -> Tensor:
    """Each token's predecessor, (b, t, d): `last` (b, d), or zeros, then x without its last."""
    first = torch.zeros_like(x[:, 0]) if last is None else last.to(x.dtype)
    return torch.cat([first[:, None], x[:, :-1]], 1)
