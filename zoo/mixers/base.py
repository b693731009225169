"""The contract every architecture keeps.

A model reads a sequence in chunks; what it keeps between chunks is its state. A mixer maps one
chunk and the state before it to the outputs and the state after it, so that any chunking of a
sequence gives what one call gives: outputs, final state and gradients. Training is one chunk,
decoding is chunks of one token, streaming is anything between.
"""

import functools
import inspect
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from zoo.config.domains import fits, refuse_kind
from zoo.ops.decode_block import HalfEnds
from zoo.ops.linear import Linear
from zoo.positions.base import CrossLayer

State = Any  # a tuple or NamedTuple of tensors and of the number of tokens seen
MixerOutput = Float[Tensor, "b t d"] | tuple[Float[Tensor, "b t d"], State]  # given a state, a pair


class LayerStore(UserDict[str, Any]):
    """A CrossLayer that is no dict: what wraps a block (FSDP, checkpoints) copies dicts."""


ROW_CROSS_LAYERS = "rows"  # of a CrossLayer: those of texts whose states are apart, a list
AUXILIARY = "auxiliary"  # of a CrossLayer: losses of layers in training, added up


class RowStates:
    """States of several texts, one each, where they are no rows of one state.

    A layer that `takes_rows` is given it as it is; others read text by text.
    """

    def __init__(self, rows: Sequence[State]) -> None:
        self.rows = rows


class Mixer(nn.Module):
    """Mixes information along the sequence: (b, t, width) -> (b, t, width), causally.

    The feed-forward slot keeps the same contract; one that does not look back has the state ().
    Constructors are keyword-only: `width`, then what is the architecture's own, then `layer` and
    `layers` (this layer's index and their number), which initialisations depend on.

    A design published for encoders takes `causal`: with `causal=False` it has its paper's form,
    reads a whole sequence at once and raises ValueError when given a state.

    A mixer whose layers read what an earlier layer computed (RWKV-7's first values) sets
    `uses_cross_layer`, and its forward takes `cross_layer` as well: a dict, empty before the first
    layer of each call, that the layers fill and read in their order, for the same tokens. Without
    it a layer reads nothing from the others.
    """

    causal: bool = True  # output t depends on inputs <= t alone
    max_length: int | None = None  # tokens it can read; beyond, forward raises ValueError
    min_window: int = 1  # tokens; trained on shorter windows, some of its parameters learn nothing
    uses_cross_layer: ClassVar[bool] = False
    recurrent: bool = True  # the state's size does not grow with the tokens seen
    extendable: ClassVar[bool] = False  # extensions act on its `positions`, a scheme
    takes_rows: ClassVar[bool] = False  # forward may be given `RowStates` with one token of each
    publishes_first: ClassVar[bool] = False  # the state after a chunk, before it computes with it
    scheme: ClassVar[str] = ""  # the class of it, where the mixer has one of its own

    def forward(self, x: Tensor, state: State = None) -> Any:
        """x (b, t, width) -> y (b, t, width), or (y, state) exactly when a state is given."""
        raise NotImplementedError

    def half_of_a_token(
        self, ends: HalfEnds, state: State, cross_layer: CrossLayer | None
    ) -> tuple[Tensor, State] | None:
        """The half of a block that this sublayer is in, for one token, in one call of a kernel.

        Returns its output and the state after it; None where it is computed operation by operation
        (zoo.ops.decode_block), as by default and by classes that only inherit it.
        """
        del ends, state, cross_layer
        return None

    def __init_subclass__(cls, **options: Any) -> None:
        """Has the constructor refuse arguments that its annotations do not allow."""
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _checked(cls.__init__)

    def empty_state(self, batch: int) -> State:
        """The state before the first token, on the parameters' device."""
        del batch
        return ()

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes the state holds after `tokens` tokens; by default those of the empty state."""
        del tokens
        return count_bytes(self.empty_state(batch))

    def truncate_state(self, state: State, window: int) -> State:
        """The state that the next training window starts from, out of the graph.

        `window` is the length of the windows in tokens. A state that grows keeps that much of it.
        """
        del window
        return detach(state)


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor with its arguments checked: UserError for one outside of its domain."""
    declared = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(self: Mixer, *args: Any, **values: Any) -> None:
        for name, value in values.items():
            kind = declared[name].annotation if name in declared else Any
            if not fits(value, kind):
                default = declared[name].default
                default = ... if default is inspect.Parameter.empty else default
                refuse_kind(name, value, kind, default)
        init(self, *args, **values)

    return checked


def at_least(minimum: float, **values: float) -> None:
    """Raise ValueError that names the first of a constructor's `values` below `minimum`."""
    for name, value in values.items():
        if not value >= minimum:  # nan is neither
            raise ValueError(f"{name}={value}: must be >= {minimum}.")


def add_auxiliary_loss(cross_layer: CrossLayer, loss: Tensor) -> None:
    """Add a scalar to what a training step's loss has besides that of the prediction."""
    cross_layer[AUXILIARY] = cross_layer[AUXILIARY] + loss if AUXILIARY in cross_layer else loss


def detach(state: State) -> State:
    """The same state, out of the graph: gradients stop at the window's edge."""
    return tree_map_only(Tensor, Tensor.detach, state)


def count_bytes(state: State) -> int:
    """Bytes of all tensors in a state."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(state) if isinstance(x, Tensor))


def refuse_state(state: State) -> None:
    """Raise ValueError where a bidirectional mixer has to read chunk by chunk."""
    if state is not None:
        raise ValueError("a bidirectional mixer reads a whole sequence at once: it keeps no state")


def linear(inputs: int, outputs: int, *, gain: float = 1.0, bias: bool = False) -> Linear:
    """A projection that keeps unit variance times `gain`^2: weights N(0, gain^2 / inputs)."""
    layer = Linear(inputs, outputs, bias=bias)
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
    if kind == "meta":  # which knows no autocast
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
