"""The contract every architecture keeps.

A model reads a sequence in chunks; what it keeps between chunks is its state. A mixer maps one
chunk and the state before it to the outputs and the state after it, so that any chunking of a
sequence gives what one call gives: outputs, final state and gradients. Training is one chunk,
decoding is chunks of one token, streaming is anything between.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

State = Any  # a tuple or NamedTuple of tensors and of the number of tokens seen
Shared = dict[str, Tensor]  # what earlier layers left for later ones, for the tokens of one call


class Mixer(nn.Module):
    """Mixes information along the sequence: (b, t, width) -> (b, t, width), causally.

    The feed-forward slot keeps the same contract; one that does not look back has the state ().
    Constructors are keyword-only: `width`, then what is the architecture's own, then `layer` and
    `layers` (this layer's index and their number), which initialisations depend on.

    A design published for encoders takes `causal`: with `causal=False` it has its paper's form,
    reads a whole sequence at once and raises ValueError when given a state.

    One whose layers read what an earlier layer computed (RWKV-7's first values) sets `shares`, and
    its forward takes `shared` besides: empty before the first layer of each call, filled and read
    in the order of the layers, for the same tokens. Given none, a layer stands alone.
    """

    causal: bool = True  # output t depends on inputs <= t alone
    max_length: int | None = None  # tokens it can read; beyond, forward raises ValueError
    min_window: int = 1  # tokens; trained on shorter windows, some of its parameters learn nothing
    shares: ClassVar[bool] = False
    recurrent: ClassVar[bool] = True  # the state's size does not grow with the tokens seen

    def forward(self, x: Tensor, state: State = None) -> Any:
        """x (b, t, width) -> y (b, t, width), or (y, state) exactly when a state is given."""
        raise NotImplementedError

    def empty_state(self, batch: int) -> State:
        """The state before the first token, on the parameters' device."""
        del batch
        return ()

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes the state holds after `tokens` tokens; by default those of the empty state."""
        del tokens
        return count_bytes(self.empty_state(batch))

    def carry(self, state: State, window: int) -> State:
        """What passes on to the next training window of `window` tokens: the state, detached."""
        del window
        return detach(state)


class MultiHead(Mixer):
    """Queries, keys and values of equal heads, each kind projected from the width to the width."""

    def __init__(self, width: int, heads: int, *, causal: bool, backend: str) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} must divide width={width}")
        self.causal, self.backend = causal, backend
        self.heads, self.head_width = heads, width // heads
        self.q_proj, self.k_proj, self.v_proj = (linear(width, width) for _ in range(3))

    def by_head(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... h k"]:
        return x.unflatten(-1, (self.heads, self.head_width))

    def qkv(self, x: Float[Tensor, "b t d"]) -> list[Float[Tensor, "b t h k"]]:
        return [self.by_head(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj)]


def at_least(minimum: float, **values: float) -> None:
    """Raise ValueError that names the first of a constructor's `values` below `minimum`."""
    for name, value in values.items():
        if not value >= minimum:  # nan is neither
            raise ValueError(f"{name}={value} must be at least {minimum}")


def detach(state: State) -> State:
    """The same state, out of the graph: gradients stop at the window's edge."""
    return tree_map_only(Tensor, Tensor.detach, state)


def count_bytes(state: State) -> int:
    """Bytes of all tensors in a state."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(state) if isinstance(x, Tensor))


def shifted(x: Tensor, last: Tensor | None) -> Tensor:
    """Each token's predecessor, (b, t, d): `last` (b, d), or zeros, then x without its last."""
    first = torch.zeros_like(x[:, 0]) if last is None else last.to(x.dtype)
    return torch.cat([first[:, None], x[:, :-1]], 1)


def refuse_state(state: State) -> None:
    """Raise ValueError where a bidirectional mixer is asked to read chunk by chunk."""
    if state is not None:
        raise ValueError("a bidirectional mixer reads a whole sequence at once: it keeps no state")


def linear(inputs: int, outputs: int, *, gain: float = 1.0, bias: bool = False) -> nn.Linear:
    """A projection that keeps unit variance times `gain`^2: weights N(0, gain^2 / inputs)."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=gain * inputs**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def residual_gain(layers: int) -> float:
    """Gain of a block's last projection: 2 `layers` such branches add up to unit variance."""
    return (2 * layers) ** -0.5


def no_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a matrix-shaped parameter that weight decay would pull to a wrong place."""
    parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products of `x` will have: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
