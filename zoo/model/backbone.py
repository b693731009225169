"""Embedding -> N x (norm, mixer, norm, feed-forward) -> norm -> head. Knows no mixer by name."""

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.config.stored import weights_as_now
from zoo.data.synthetic import NO_LABEL
from zoo.errors import refuse
from zoo.mixers.base import CrossLayer, LayerStore, Mixer, no_weight_decay
from zoo.model.block import Block, BlockState
from zoo.model.recompute import auxiliary_loss, chunk_cross_layers, read_again
from zoo.ops.cross_entropy import summed_cross_entropy
from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear import Linear
from zoo.ops.rms_norm import OffsetRMSNorm, RMSNorm
from zoo.positions.base import EmbeddedPositions
from zoo.positions.rope import by_row

NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms_norm": RMSNorm,
    "rms_norm_offset": OffsetRMSNorm,
    "layer_norm": nn.LayerNorm,  # with a bias
}


def check_tied(model: "Backbone", weights: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse weights of an untied head for a model that has none: the last to be loaded would be
    both."""
    head, embedding = (weights.get(f"{prefix}{name}.weight") for name in ("head", "embedding"))
    if head is None or embedding is None or model.head.weight is not model.embedding.weight:
        return
    if head.shape != embedding.shape or not torch.equal(head, embedding.to(head)):
        rule = "these weights have a head of their own and the model's is its embedding"
        refuse("tied", True, rule, "Build the model with Backbone(..., tied=False)")


def _rename_weights(_model: "Backbone", weights: dict[str, Tensor], *_: Any) -> None:
    weights_as_now(weights)


class Head(Linear):
    """From what the last block left to logits, z or softcap tanh(z / softcap)."""

    def __init__(self, width: int, vocab_size: int, softcap: float | None = None) -> None:
        super().__init__(width, vocab_size, bias=False)
        self.softcap = softcap

    def forward(self, input: Float[Tensor, "... width"]) -> Float[Tensor, "... v"]:
        logits = super().forward(input)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class BackboneState(NamedTuple):
    blocks: tuple[BlockState, ...]
    tokens_seen: int


class Backbone(nn.Module):
    """A language model: tokens (b, t) -> logits (b, t, vocabulary).

    `mixers` and `feed_forwards` are constructors, cycled over the layers: one entry each for a
    plain model, several for a hybrid. So are `short_convs`, the tokens that a short convolution
    before the mixer reads (zoo.mixers.short_conv), or None for no such layer. `positions`, if
    given, is added at the embedding. The head is the embedding itself unless `tied=False`. `norm`
    is one of NORMS; with `embedding_norm` the embedded tokens are normalised too, as in RWKV.
    Embedded tokens are multiplied by `embedding_scale`, and logits z are c tanh(z / c) for a
    `logit_softcap` c, where these are given. `post_norm` is the blocks'. With `sink_token` a
    learned token is before every text, at position 0, whose output nobody reads: the learnable sink
    of Xiao 2023 (section 3.3, arXiv 2309.17453), which extension=streaming_llm keeps with sinks=1.
    `checkpoint_activations` computes each block again in the backward pass instead of keeping what
    it computed: whole, or so many tokens at a time (zoo.model.recompute). `built` is called with
    the embedding and with each block as soon as they have their first weights, which it may take.
    """

    stages: tuple[tuple[Any, int], ...] = ()  # extensions of zoo.model.extend, windows trained on
    quantized: str | None = None  # the bits that its weights are kept in, if not plain numbers
    _auxiliary: Tensor | None = None  # what the layers added to the loss, of the last call
    quantized_cache: str | None = None  # those of its keys and values

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        layers: int,
        mixers: Sequence[Callable[..., Mixer]],
        feed_forwards: Sequence[Callable[..., Mixer] | None],
        short_convs: Sequence[int | None] = (None,),
        positions: EmbeddedPositions | None = None,
        norm: str = "rms_norm",
        norm_eps: float = 1e-6,
        embedding_norm: bool = False,
        parallel_residual: bool = False,
        post_norm: bool = False,
        embedding_scale: float | None = None,
        logit_softcap: float | None = None,
        tied: bool = True,
        sink_token: bool = False,
        checkpoint_activations: bool | int = False,
        built: Callable[[nn.Module], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self.vocab_size, self.width = vocab_size, width
        self.embedding_scale = embedding_scale
        self.checkpoint_activations = checkpoint_activations
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        built(self.embedding)
        self.positions = positions
        make_norm = partial(NORMS[norm], eps=norm_eps)
        self.embedding_norm = make_norm(width) if embedding_norm else None
        blocks = []
        for layer in range(layers):
            place = {"width": width, "layer": layer, "layers": layers}
            feed_forward = feed_forwards[layer % len(feed_forwards)]
            block = Block(
                width=width,
                mixer=mixers[layer % len(mixers)](**place),
                feed_forward=feed_forward(**place) if feed_forward else None,
                norm=make_norm,
                short_conv=short_convs[layer % len(short_convs)],
                parallel_residual=parallel_residual,
                post_norm=post_norm,
            )
            built(block)
            blocks.append(block)
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(width)
        self.frequencies: nn.Module | None = None  # trained ones, length -> (inv_freq, factor)
        self.head = Head(width, vocab_size, logit_softcap)
        if tied:
            self.head.weight = self.embedding.weight
        self.sink = no_weight_decay(nn.Parameter(torch.randn(width) * 0.02)) if sink_token else None
        self.register_load_state_dict_pre_hook(check_tied)
        self.register_load_state_dict_pre_hook(_rename_weights)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        state: BackboneState | None = None,
        positions: Tensor | None = None,
    ) -> Any:
        """Logits (b, t, vocabulary), or (logits, state) exactly when a state is given.

        `positions`, (b, t) and rising, are where the tokens of a training window are instead of
        at 0, 1, 2 ..; layers find them in `cross_layer`. With a state they are those of the text
        from its first token on. Raises ValueError where the tokens seen would exceed `max_length`.
        """
        x, after = self.hidden(tokens, state, positions)
        logits = self.head(x)
        return (logits, after) if state else logits

    def hidden(
        self,
        tokens: Int[Tensor, "b t"],
        state: BackboneState | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Float[Tensor, "b t width"], BackboneState | None]:
        """What the head reads, and the state where one is given; see `forward`.

        Who needs the logits of a few tokens alone applies the head to theirs: over a large
        vocabulary it costs as much as several layers.
        """
        reading = self.hidden_by_block(tokens, state, positions)
        while True:
            try:
                next(reading)
            except StopIteration as end:
                return end.value

    def hidden_by_block(
        self,
        tokens: Int[Tensor, "b t"],
        state: BackboneState | None = None,
        positions: Tensor | None = None,
    ) -> Generator[None, None, tuple[Tensor, BackboneState | None]]:
        """As `hidden`, stopping behind every block: several chunks can be read in turn."""
        start, after = state.tokens_seen if state else 0, []
        x, cross_layer = self.embed(tokens, start, positions)
        chunk = self._recomputed(x.shape[1])
        cross_layers = chunk_cross_layers(cross_layer, x.shape[1], chunk or x.shape[1])
        for index, block in enumerate(self.layers):
            before = state.blocks[index] if state else None
            if chunk:
                x = read_again(block, x, before, cross_layers, chunk)
            else:
                x = block(x, before, cross_layer)
            if state:
                x, new = x
                after.append(new)
            yield
        seen = BackboneState(tuple(after), start + tokens.shape[1]) if state else None
        self._auxiliary = auxiliary_loss(cross_layers, x.shape[1], chunk)
        return self.norm(x[:, x.shape[1] - tokens.shape[1] :]), seen

    def embed(
        self, tokens: Int[Tensor, "b t"], start: int, positions: Tensor | None = None
    ) -> tuple[Float[Tensor, "b t2 width"], CrossLayer]:
        """What the first block reads after `start` tokens, and what layers find in `cross_layer`.

        t2 is t, and one more where the text begins with the sink token.
        """
        self._check_length(start + tokens.shape[1])
        x, first = self.embedding(tokens), start
        if self.sink is not None:
            first = start + 1 if start else 0
            if not start:
                x = torch.cat([self.sink.to(x.dtype).expand(len(x), 1, -1), x], 1)
            elif self.training and torch.is_grad_enabled():
                x = x + 0 * self.sink.to(x.dtype)  # a gradient, as DDP needs it in every process
            if positions is not None:
                positions = F.pad(positions + 1, (1, 0))
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        cross_layer, at = LayerStore(), None
        if positions is not None:
            at = cross_layer["positions"] = positions[:, first : first + x.shape[1]]
            cross_layer["key_positions"] = positions[:, : first + x.shape[1]]
            cross_layer["lengths"] = positions.amax(1) + 1
            if self.frequencies is not None:  # once for all layers
                cross_layer["inv_freq"], _ = by_row(self.frequencies, cross_layer["lengths"])
        if self.positions is not None:
            x = self.positions(x, first, at)
        return x, cross_layer

    def _recomputed(self, tokens: int) -> int:
        """How many of so many tokens the backward pass computes again at a time; 0: none."""
        if not (self.checkpoint_activations and self.training and torch.is_grad_enabled()):
            return 0
        return tokens if self.checkpoint_activations is True else self.checkpoint_activations

    def loss(
        self,
        tokens: Int[Tensor, "b t1"],
        state: BackboneState | None = None,
        positions: Tensor | None = None,
    ) -> Any:
        """Mean negative log-likelihood (nats) of tokens 1.. given those before them.

        In training this and the other losses have what layers add (`add_auxiliary_loss`).
        """
        x, after = self.hidden(tokens[:, :-1], state, positions)
        nll = self.summed_nll(x, tokens[:, 1:]) / tokens[:, 1:].numel()
        nll = self.with_auxiliary(nll)
        return (nll, after) if state else nll

    def labels_loss(
        self,
        tokens: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"],
        positions: Tensor | None = None,
        weight: float = 1.0,
    ) -> Tensor:
        """Mean negative log-likelihood (nats) of each label given the tokens up to its own place.

        Where a label is `NO_LABEL` nothing is predicted; 0 where nothing is at all, as may be in
        one of the micro-batches that share a step. `weight` is that of the labels' mean in a step;
        what layers add counts by its rows, so alike in all micro-batches.
        """
        x, _ = self.hidden(tokens, positions=positions)
        nll = self.summed_nll(x, labels) / (labels != NO_LABEL).sum().clamp(min=1)
        return self.with_auxiliary(nll * weight)

    def with_auxiliary(self, loss: Tensor, share: float = 1.0) -> Tensor:
        """The loss and what the layers of the last call add to it, as far as it is theirs."""
        auxiliary, self._auxiliary = self._auxiliary, None
        return loss if auxiliary is None else loss + share * auxiliary

    def masked_loss(
        self,
        shown: Int[Tensor, "b t"],
        tokens: Int[Tensor, "b t"],
        chosen: Bool[Tensor, "b t"],
        weight: float = 1.0,
    ) -> Tensor:
        """As `labels_loss`, of the `chosen` tokens of what is shown masked."""
        return self.labels_loss(shown, torch.where(chosen, tokens, NO_LABEL), weight=weight)

    def summed_nll(self, x: Float[Tensor, "... width"], targets: Int[Tensor, "..."]) -> Tensor:
        """Nats of the targets, summed; those that are `NO_LABEL` cost nothing."""
        if self.head.softcap is not None:
            logits = self.head(x.reshape(-1, self.width))
            how = {"ignore_index": NO_LABEL, "reduction": "sum"}
            return F.cross_entropy(logits.to(wide_dtype(logits)), targets.reshape(-1), **how)
        return summed_cross_entropy(
            x.reshape(-1, self.width), self.head.weight, targets.reshape(-1), NO_LABEL
        )

    def _check_length(self, tokens: int) -> None:
        if self.max_length is not None and tokens > self.max_length:
            raise ValueError(
                f"this model reads at most {self.max_length} tokens and was given {tokens}"
            )

    def sublayers(self) -> list[Mixer]:
        """Every mixer, feed-forward and short convolution."""
        return [part for block in self.layers for part in block.named_sublayers().values()]

    @property
    def layers(self) -> list[Block]:
        """The blocks, the first first."""
        return cast(list[Block], list(self.blocks))

    @property
    def max_length(self) -> int | None:
        """Tokens the model can read, the least of its parts' limits; None where there is none."""
        parts = (*self.sublayers(), self.positions)
        limits = [part.max_length for part in parts if part is not None]
        least = min((limit for limit in limits if limit is not None), default=None)
        return least if least is None or self.sink is None else least - 1

    @property
    def causal(self) -> bool:
        """Whether every output depends on the tokens up to its own alone."""
        return all(layer.causal for layer in self.sublayers())

    @property
    def min_window(self) -> int:
        """Tokens a training window must have for every parameter to learn."""
        return max(layer.min_window for layer in self.sublayers())

    @property
    def recurrent(self) -> bool:
        """Whether the state stays the same size however many tokens were read."""
        return all(layer.recurrent for layer in self.sublayers())

    def empty_state(self, batch: int) -> BackboneState:
        """The state before the first token."""
        return BackboneState(tuple(block.empty_state(batch) for block in self.layers), 0)

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes the state holds after `tokens` tokens."""
        read = tokens + (self.sink is not None and tokens > 0)
        return sum(layer.state_bytes(read, batch) for layer in self.sublayers())

    def truncate_state(self, state: BackboneState, window: int) -> BackboneState:
        """The state that the next training window starts from, out of the graph."""
        blocks = []
        for block, before in zip(self.layers, state.blocks, strict=True):
            after = {
                name: part.truncate_state(getattr(before, name), window)
                for name, part in block.named_sublayers().items()
            }
            blocks.append(BlockState(**after))
        return BackboneState(tuple(blocks), state.tokens_seen)
