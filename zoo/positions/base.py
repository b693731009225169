"""What a position scheme is: a class that a YAML file chooses by `_target_`.

A scheme inside attention is a `Positions`; for every chunk of a text the mixer calls

    prepare     queries and keys as they are cached: rotated, or as they came
    attend      queries over cached and own keys: all of them, biased, or those of a pattern
    evict       the keys and values that later queries may see

One at the token embedding is an `EmbeddedPositions`. Its short name, `model.positions=alibi`, is
that of its module. The class attributes declare what goes with a scheme; they are literals, since
`zoo.config.schemes` reads them from the source, before anything is imported.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.errors import UserError, below, refuse
from zoo.ops.attention import Part, attention, own_and_past

if TYPE_CHECKING:  # which rotates by what this package defines
    from zoo.attention.pattern import AttentionPattern

CrossLayer = MutableMapping[str, Any]  # what layers left for later ones, for one call's tokens


class PositionScheme(nn.Module):
    """How a model knows the order of its tokens."""

    embedded: ClassVar[bool] = False  # added to the token embedding, not inside attention
    one_sided: ClassVar[bool] = False  # knows keys before the query alone: causal attention
    takes_sink: ClassVar[bool] = True  # a learned sink, which has no position, goes with it
    takes_softcap: ClassVar[bool] = True  # its scores are products, which may be bounded
    takes_pattern: ClassVar[bool] = False  # an extension's attention pattern acts on it
    takes_patterns: ClassVar[tuple[str, ...]] = ()  # modules of those that do, where not all
    placeable: ClassVar[bool] = (
        False  # a training window's tokens may have positions of a longer text
    )
    scaled_by: ClassVar[tuple[str, ...]] = ()  # modules of the functions that may be its `scaling`

    # Which keys are seen, and at what distance; None: all, the true one.
    pattern: AttentionPattern | None = None

    @property
    def name(self) -> str:
        """The short name, `alibi` of zoo.positions.alibi."""
        return type(self).__module__.rpartition(".")[2]

    def scale(self, scaling: Callable[..., Any], factor: float, original_length: int) -> None:
        """Act under the scaling of an extension, one of `scaled_by`'s.

        Raises:
            ValueError: the scaling has options that this scheme has no use for.
        """
        raise NotImplementedError


class EmbeddedPositions(PositionScheme):
    """Positions added to the token embedding, which continue after the tokens already seen."""

    embedded: ClassVar[bool] = True
    placeable: ClassVar[bool] = True
    max_length: int | None = None  # positions there are; None: as many as are read

    def positions_from(self, start: int, tokens: int) -> Int[Tensor, " t"]:
        """Return the positions of the tokens start, start + 1, ... of a text."""
        at = torch.arange(start, start + tokens)
        return at if self.pattern is None else self.pattern.placed(at)

    def forward(
        self, x: Float[Tensor, "b t d"], start: int = 0, positions: Tensor | None = None
    ) -> Float[Tensor, "b t d"]:
        """Add the positions start, start + 1, ... to x, or those of `positions`, (b, t)."""
        raise NotImplementedError


class Positions(PositionScheme):
    """Positions inside attention; by itself, every key up to the query's own and no position.

    Args:
        heads: of the queries.
        head_width: channels of a head.
    """

    softcap: float | None = None  # bound of the scores, see zoo.ops.attention; None: none

    def __init__(self, heads: int, head_width: int, /) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width

    def rotate(self, x: Float[Tensor, "b t h d"], at: int | Tensor) -> Float[Tensor, "b t h d"]:
        """Rotate each token to its position (`at`: see `rope.apply_rope`), or return x."""
        del at
        return x

    def slopes(self) -> list[float] | None:
        """What each head's scores lose per token of distance; None: nothing."""
        return None

    def prepare(
        self, q: Tensor, k: Tensor, start: int, cross_layer: CrossLayer | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return a chunk's queries and keys as `attend` reads them and as keys are cached.

        Args:
            start: tokens read before the chunk.
            cross_layer: may hold "positions", (b, t), those of a training window's tokens.
        """
        del cross_layer
        return self.rotate(q, start), self.rotate(k, start)

    def attend(
        self,
        q: Float[Tensor, "b t h d"],
        k: Float[Tensor, "b n g d"],
        v: Float[Tensor, "b n g e"],
        start: int,
        cross_layer: CrossLayer | None = None,
        *,
        causal: bool = True,
        sinks: Sequence[Part] = (),
        backend: str = "auto",
    ) -> Float[Tensor, "b t h e"]:
        """Return the attention of the queries, the last t of the n tokens, over the keys they see.

        The g heads of keys and values divide the h of queries.

        Args:
            sinks: further keys that every query sees, without a position.
        """
        if self.pattern is not None and placed_positions(self, cross_layer) is None:
            return self.pattern(q, k, v, start, backend, sinks, self.softcap)
        if not causal or q.shape[1] == 1:  # the last token sees every key
            return attention([Part(q, k, v), *sinks], softcap=self.softcap, backend=backend)
        parts = [*own_and_past(q, k, v), *sinks]
        return attention(parts, softcap=self.softcap, backend=backend)

    def rotation_of_a_token(
        self, position: int, like: Tensor, cross_layer: CrossLayer | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return the cosines and sines, (1, 1, half), of the token at a position, in like's dtype.

        None where its queries and keys are not only rotated by them, and attend to every key.
        """
        del position, like, cross_layer
        return None

    @property
    def bounded(self) -> bool:
        """Whether the number of cached keys stops growing."""
        return self.pattern is not None and self.pattern.recent is not None

    def cached(self, tokens: int) -> int:
        """Return how many keys are cached after so many tokens."""
        return self.pattern.cached(tokens) if self.pattern else tokens

    def evict(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that later queries may see."""
        return self.pattern.evict(k, v) if self.pattern else (k, v)

    def truncate(self, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Return the cache that passes on to the next training window of so many tokens."""
        sinks = self.pattern.sinks if self.pattern is not None else 0
        bounded = sinks and self.bounded  # already, by the pattern
        if bounded or k.shape[1] <= sinks + window:
            return k, v
        k, v = (
            torch.cat([x[:, :sinks], x[:, -window:]], 1) if sinks else x[:, -window:]
            for x in (k, v)
        )
        return k, v


def placed_positions(scheme: PositionScheme, cross_layer: CrossLayer | None) -> Tensor | None:
    """Return the positions that a training window's tokens are given, (b, t), if it takes them."""
    return cross_layer.get("positions") if cross_layer and scheme.placeable else None


def placed_keys(scheme: PositionScheme, cross_layer: CrossLayer | None) -> Tensor | None:
    """Return the positions of the window's tokens so far, (b, n): of those before a chunk too."""
    own = placed_positions(scheme, cross_layer)
    return cross_layer.get("key_positions", own) if cross_layer and own is not None else None


def build_positions(
    scheme: Callable[..., Positions],
    heads: int,
    head_width: int,
    *,
    causal: bool = True,
    sink: bool = False,
    supported: Sequence[type[Positions]] = (),
) -> Positions:
    """Build a mixer's scheme and check that it goes with the mixer.

    Args:
        scheme: the constructor, with its own options bound.
        causal, sink: the mixer's options of that name.
        supported: the schemes that the mixer works with; none given: every one.

    Raises:
        UserError: `positions=<name>: ...` where it does not.
    """
    if not callable(scheme):
        refuse("positions", scheme, "must be a position scheme", "Use such a class, as Rope is.")
    try:
        positions = scheme(heads, head_width)
    except UserError as error:
        raise below("positions", error) from error
    names = [kind.__module__.rpartition(".")[2] for kind in supported]
    if supported and not isinstance(positions, tuple(supported)):
        allowed = f"{', '.join(names[:-1])} or {names[-1]}"
        refuse("positions", positions.name, f"must be {allowed} in this mixer")
    if positions.one_sided and not causal:
        advice = "Use rope or none, or objective=causal."
        refuse("positions", positions.name, "is defined for causal attention alone", advice)
    if sink and not positions.takes_sink:
        rule = (
            f"cannot be combined with positions={positions.name}, as a sink has no position to bias"
        )
        refuse("sink", True, rule, "Use positions=rope, xpos or none.")
    return positions
