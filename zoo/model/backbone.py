"""Embedding -> N x (norm, mixer, norm, feed-forward) -> norm -> head. Knows no mixer by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.data.synthetic import NO_LABEL
from zoo.errors import NoStateError, UserError
from zoo.mixers.base import Mixer, Shared, State
from zoo.ops.rms_norm import RMSNorm
from zoo.positions.absolute import Learned, Sinusoidal
from zoo.positions.rope import by_row


class Block(nn.Module):
    """x += mixer(norm(x)); x += feed_forward(norm(x)). The second line only where there is one."""

    def __init__(self, *, width: int, mixer: Mixer, feed_forward: Mixer | None, norm_eps: float):
        super().__init__()
        self.mixer_norm = RMSNorm(width, norm_eps)
        self.mixer = mixer
        self.feed_forward_norm = RMSNorm(width, norm_eps) if feed_forward else None
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, state: State = None, shared: Shared | None = None):
        halves = [(self.mixer_norm, self.mixer), (self.feed_forward_norm, self.feed_forward)]
        after = []
        for index, (norm, half) in enumerate(halves):
            if half is None:
                after.append(())
                continue
            more = {"shared": shared} if half.shares else {}
            if state is None:
                x = x + half(norm(x), **more)
            else:
                y, new = _with_state(half, norm(x), state[index], more)
                x = x + y
                after.append(new)
        return x if state is None else (x, tuple(after))

    def halves(self) -> list[Mixer]:
        return [half for half in (self.mixer, self.feed_forward) if half is not None]


def _check_tied(model: "Backbone", weights: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse weights of an untied head for a model that has none: the last to be loaded would be
    both."""
    head, embedding = (weights.get(f"{prefix}{name}.weight") for name in ("head", "embedding"))
    if head is None or embedding is None or model.head.weight is not model.embedding.weight:
        return
    if head.shape != embedding.shape or not torch.equal(head, embedding.to(head)):
        raise UserError(
            "these weights have a head of their own and the model's is its embedding: build it "
            "with Backbone(..., tied=False)"
        )


def _with_state(half: Mixer, x: Tensor, state: State, more: dict[str, Any]) -> tuple[Tensor, State]:
    """What it returns for a state; NoStateError where it keeps none."""
    found: Any = None
    if "state" in inspect.signature(half.forward).parameters:
        found = half(x, state, **more)
    if not isinstance(found, tuple) or len(found) != 2:
        name = type(half).__name__
        raise NoStateError(
            f"{name} keeps no state, so it cannot read a text in chunks or write token by token: "
            "given a state, forward must return (y, state)"
        )
    return found


class BackboneState(NamedTuple):
    blocks: tuple[tuple[State, State], ...]
    seen: int  # tokens read so far


class Backbone(nn.Module):
    """A language model: tokens (b, t) -> logits (b, t, vocabulary).

    `mixers` and `feed_forwards` are constructors, cycled over the layers: one entry each for a
    plain model, several for a hybrid. `positions`, if given, is added at the embedding. The head
    is the embedding itself unless `tied=False`. `checkpoint_activations` recomputes each block in
    the backward pass instead of keeping what it computed.
    """

    extended: str | None = None  # the extension that zoo.model.extend gave it

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        layers: int,
        mixers: Sequence[Callable[..., Mixer]],
        feed_forwards: Sequence[Callable[..., Mixer] | None],
        positions: Sinusoidal | Learned | None = None,
        norm_eps: float = 1e-6,
        tied: bool = True,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size, self.width = vocab_size, width
        self.checkpoint_activations = checkpoint_activations
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = positions
        blocks = []
        for layer in range(layers):
            place = {"width": width, "layer": layer, "layers": layers}
            feed_forward = feed_forwards[layer % len(feed_forwards)]
            block = Block(
                width=width,
                mixer=mixers[layer % len(mixers)](**place),
                feed_forward=feed_forward(**place) if feed_forward else None,
                norm_eps=norm_eps,
            )
            blocks.append(block)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(width, norm_eps)
        self.frequencies: nn.Module | None = None  # trained ones, length -> (inv_freq, factor)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_load_state_dict_pre_hook(_check_tied)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        state: BackboneState | None = None,
        positions: Tensor | None = None,
    ) -> Any:
        """Logits (b, t, vocabulary), or (logits, state) exactly when a state is given.

        `positions`, (b, t) and rising, are where the tokens of a training window stand instead of
        at 0, 1, 2 ..; layers find them in `shared`. Raises ValueError where the tokens seen would
        exceed `max_length`.
        """
        start = state.seen if state else 0
        self._check_length(start + tokens.shape[1])
        x = self.embedding(tokens)
        if self.positions is not None:
            x = self.positions(x, start, positions)
        after, shared = [], {}
        if positions is not None:
            shared["positions"] = positions
            if self.frequencies is not None:  # once for all layers
                shared["inv_freq"], _ = by_row(self.frequencies, positions)
        for index, block in enumerate(self.blocks):
            before = state.blocks[index] if state else None
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, before, shared, use_reentrant=False)
            else:
                x = block(x, before, shared)
            if state:
                x, new = x
                after.append(new)
        logits = self.head(self.norm(x))
        return (logits, BackboneState(tuple(after), start + tokens.shape[1])) if state else logits

    def loss(
        self,
        tokens: Int[Tensor, "b t1"],
        state: BackboneState | None = None,
        positions: Tensor | None = None,
    ) -> Any:
        """Mean negative log-likelihood (nats) of tokens 1.. given those before them."""
        found = self(tokens[:, :-1], state, positions)
        logits, state = found if state else (found, None)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return (nll, state) if state else nll

    def labels_loss(
        self,
        tokens: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"],
        positions: Tensor | None = None,
    ) -> Tensor:
        """Mean negative log-likelihood (nats) of each label given the tokens up to its own place.

        Where a label is `NO_LABEL` nothing is asked; 0 where nothing is asked at all, as may be in
        one of the micro-batches that share a step.
        """
        logits = self(tokens, positions=positions)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
        )
        return nll / (labels != NO_LABEL).sum().clamp(min=1)

    def masked_loss(
        self,
        shown: Int[Tensor, "b t"],
        tokens: Int[Tensor, "b t"],
        chosen: Bool[Tensor, "b t"],
    ) -> Tensor:
        """Mean negative log-likelihood (nats) of the `chosen` tokens of what is shown masked."""
        logits = self(shown)[chosen]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, tokens[chosen])

    def _check_length(self, tokens: int) -> None:
        if self.max_length is not None and tokens > self.max_length:
            raise ValueError(
                f"this model reads at most {self.max_length} tokens and was given {tokens}"
            )

    def halves(self) -> list[Mixer]:
        """Every mixer and feed-forward, in the order they act."""
        return [half for block in self._blocks() for half in block.halves()]

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    @property
    def max_length(self) -> int | None:
        """Tokens the model can read, the least of its parts' limits; None where there is none."""
        parts = (*self.halves(), self.positions)
        limits = [part.max_length for part in parts if part is not None]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def causal(self) -> bool:
        """Whether every output depends on the tokens up to its own alone."""
        return all(half.causal for half in self.halves())

    @property
    def min_window(self) -> int:
        """Tokens a training window must have for every parameter to learn."""
        return max(half.min_window for half in self.halves())

    @property
    def recurrent(self) -> bool:
        """Whether the state stays the same size however many tokens were read."""
        return all(half.recurrent for half in self.halves())

    def empty_state(self, batch: int) -> BackboneState:
        """The state before the first token."""
        return BackboneState(
            tuple(
                (
                    block.mixer.empty_state(batch),
                    block.feed_forward.empty_state(batch) if block.feed_forward else (),
                )
                for block in self._blocks()
            ),
            0,
        )

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes the state holds after `tokens` tokens."""
        return sum(half.state_bytes(tokens, batch) for half in self.halves())

    def carry(self, state: BackboneState, window: int) -> BackboneState:
        """What passes on to the next training window, out of the graph."""
        blocks = []
        for block, (mixer, feed_forward) in zip(self._blocks(), state.blocks, strict=True):
            second = block.feed_forward
            blocks.append(
                (
                    block.mixer.carry(mixer, window),
                    second.carry(feed_forward, window) if second else (),
                )
            )
        return BackboneState(tuple(blocks), state.seen)
