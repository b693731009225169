"""The contract every architecture keeps.

A model reads a sequence in chunks; what it keeps between chunks is its state. A mixer maps one
chunk and the state before it to the outputs and the state after it, so that any chunking of a
sequence gives what one call gives: outputs, final state and gradients. Training is one chunk,
decoding is chunks of one token, streaming is anything between.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

State = Any  # a tuple or NamedTuple of tensors and of the number of tokens seen


class Mixer(nn.Module):
    """Mixes information along the sequence: (b, t, width) -> (b, t, width), causally.

    The feed-forward slot keeps the same contract; one that does not look back has the state ().
    Constructors are keyword-only: `width`, then what is the architecture's own, then `layer` and
    `layers` (this layer's index and their number), which initialisations depend on.
    """

    max_length: int | None = None  # tokens it can read; beyond, forward raises ValueError
    length_dependent: ClassVar[bool] = False  # output t may depend on the length read so far
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


def detach(state: State) -> State:
    """The same state, out of the graph: gradients stop at the window's edge."""
    return tree_map_only(Tensor, Tensor.detach, state)


def count_bytes(state: State) -> int:
    """Bytes of all tensors in a state."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(state) if isinstance(x, Tensor))


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
