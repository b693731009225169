"""One layer of a backbone: norm, short convolution, mixer, norm, feed-forward, and their states."""

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from zoo.errors import NoStateError
from zoo.mixers.base import ROW_CROSS_LAYERS, CrossLayer, Mixer, RowStates, State
from zoo.mixers.short_conv import ShortConvolution
from zoo.ops.decode_block import HalfEnds
from zoo.ops.linear import is_hooked
from zoo.parallel.hand_over import HandOver

Norm = Callable[[int], nn.Module]  # width -> a normalisation over it


class BlockState(NamedTuple):
    """What a block's sublayers keep; () of one that it does not have."""

    mixer: State
    feed_forward: State = ()
    short_conv: State = ()


class Block(nn.Module):
    """u = norm(x); u = short_conv(u); x += mixer(u); x += feed_forward(norm(x)).

    Without the short convolution and the feed-forward where there is none. With `parallel_residual`
    both halves read the same x, x += mixer(norm_1(x)) + feed_forward(norm_2(x)) (GPT-J; Black 2022,
    GPT-NeoX-20B, section 2.1, arXiv 2204.06745). With `post_norm` what a half adds is normalised
    once more, x += norm'(mixer(norm(x))) (Gemma 2, section 2, arXiv 2408.00118).
    """

    def __init__(
        self,
        *,
        width: int,
        mixer: Mixer,
        feed_forward: Mixer | None,
        norm: Norm,
        short_conv: int | None = None,
        parallel_residual: bool = False,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.parallel_residual = parallel_residual
        self.mixer_norm = norm(width)
        self.mixer_post_norm = norm(width) if post_norm else None
        self.feed_forward_post_norm = norm(width) if post_norm and feed_forward else None
        self.short_conv = ShortConvolution(width=width, taps=short_conv) if short_conv else None
        self.mixer = mixer
        self.feed_forward_norm = norm(width) if feed_forward else None
        self.feed_forward = feed_forward

    def forward(
        self, x: Tensor, state: BlockState | None = None, cross_layer: CrossLayer | None = None
    ) -> Any:
        """The block's output, or (output, state) exactly when a state is given."""
        before = state or BlockState(None, None, None)
        feed_forward_state, conv_state, read = (), (), x
        found = self._in_one_call("mixer", x, x, before.mixer, cross_layer)
        if found is not None:
            x, mixer_state = found
        else:
            u = self.mixer_norm(x)
            if self.short_conv is not None:
                u, conv_state = _apply(self.short_conv, u, before.short_conv, cross_layer)
            y, mixer_state = _apply(self.mixer, u, before.mixer, cross_layer)
            x = x + (self.mixer_post_norm(y) if self.mixer_post_norm else y)
        read = read if self.parallel_residual else x
        found = self._in_one_call("feed_forward", read, x, before.feed_forward, cross_layer)
        if found is not None:
            x, feed_forward_state = found
        elif self.feed_forward is not None and self.feed_forward_norm is not None:
            u = self.feed_forward_norm(read)
            y, feed_forward_state = _apply(self.feed_forward, u, before.feed_forward, cross_layer)
            x = x + (self.feed_forward_post_norm(y) if self.feed_forward_post_norm else y)
        if state is None:
            return x
        return x, BlockState(mixer_state, feed_forward_state, conv_state)

    def _in_one_call(
        self, name: str, x: Tensor, onto: Tensor, state: State, cross_layer: CrossLayer | None
    ) -> tuple[Tensor, State] | None:
        """A half of the block, onto + sublayer(norm(x)), where one call of a kernel computes it.

        That is so for one token, where the sublayer's own class says so, not one that it derives
        from; else None.
        """
        parts = self._modules
        sublayer = cast(Mixer | None, parts.get(name))
        if sublayer is None or x.shape[1] != 1 or "half_of_a_token" not in vars(type(sublayer)):
            return None
        if state is None or isinstance(state, HandOver | RowStates) or is_hooked(sublayer):
            return None
        if name == "mixer" and self.short_conv is not None:
            return None
        norm, post_norm = cast(nn.Module, parts[f"{name}_norm"]), parts.get(f"{name}_post_norm")
        return sublayer.half_of_a_token(HalfEnds(x, onto, norm, post_norm), state, cross_layer)

    def named_sublayers(self) -> dict[str, Mixer]:
        """The sublayers that the block has, by their names in `BlockState`."""
        parts = {name: getattr(self, name) for name in BlockState._fields}
        return {name: part for name, part in parts.items() if part is not None}

    def empty_state(self, batch: int) -> BlockState:
        """The state before the first token."""
        parts = self.named_sublayers().items()
        return BlockState(**{name: part.empty_state(batch) for name, part in parts})

    @property
    def recurrent(self) -> bool:
        """Whether the state stays the same size however many tokens were read."""
        return all(part.recurrent for part in self.named_sublayers().values())


def _apply(
    sublayer: Mixer, x: Tensor, state: State, cross_layer: CrossLayer | None
) -> tuple[Tensor, State]:
    """The sublayer's output and, where a state is given, its state after x.

    Raises NoStateError where it keeps none.
    """
    more = {"cross_layer": cross_layer} if sublayer.uses_cross_layer else {}
    if state is None:
        return sublayer(x, **more), None
    if isinstance(state, HandOver):
        read = partial(_apply, sublayer, cross_layer=cross_layer)
        return state.read(read, x, sublayer.empty_state(len(x)))
    if isinstance(state, RowStates) and not sublayer.takes_rows:
        return _apply_by_row(sublayer, x, state, cross_layer)
    found: Any = None
    if takes_state(sublayer):
        found = sublayer(x, state, **more)
    if not isinstance(found, tuple) or len(found) != 2:
        raise NoStateError(
            f"{type(sublayer).__name__} keeps no state, so it cannot read a text in chunks or "
            "write token by token: given a state, forward must return (y, state)"
        )
    return found


def _apply_by_row(
    sublayer: Mixer, x: Tensor, state: RowStates, cross_layer: Any
) -> tuple[Tensor, RowStates]:
    """Read text by text, each with its own state."""
    rows = zip(x.split(1), state.rows, cross_layer[ROW_CROSS_LAYERS], strict=True)
    found = [_apply(sublayer, *row) for row in rows]
    return torch.cat([y for y, _ in found]), RowStates([after for _, after in found])


def takes_state(sublayer: Mixer) -> bool:
    """Whether it can read a text in chunks, as far as its signature says."""
    return _named_state(type(sublayer).forward)


@functools.cache
def _named_state(forward: Callable[..., Any]) -> bool:
    return "state" in inspect.signature(forward).parameters
