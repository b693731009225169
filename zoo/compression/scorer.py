"""A language model that gives the information of each token of a text: I(x_t) = -log p(x_t | x_<t).

It reads the text once, a chunk at a time, from a state: a recurrent model in constant memory, at
any length. What was read is a `Prefix`, from which several continuations may be scored.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import refuse
from zoo.model.arithmetic import arithmetic
from zoo.model.backbone import BackboneState
from zoo.model.flops import ReadingCost, reading_cost
from zoo.model.language_model import LanguageModel
from zoo.ops.dtypes import wide_dtype

CHUNK, MAX_LOGITS = 2048, 2**24  # tokens that are read at a time, and numbers of their logits


class Prefix(NamedTuple):
    """A text that was read: the state after it, and the logits of what may follow."""

    state: BackboneState
    logits: Float[Tensor, " v"]


class Scorer:
    """A causal model as the scorer of a compression; `flops` are the operations of all it read.

    Args:
        model: a run's or a checkpoint's.
        place: where it lies, for a refusal.

    Raises:
        UserError: the model is not causal.
    """

    def __init__(self, model: LanguageModel, place: str) -> None:
        self.model, self.place, self.tokenizer = model, place, model.tokenizer
        self.flops = 0.0
        if not model.backbone.causal:
            rule = "reads its text both ways, so it gives no token a probability after those before"
            refuse("by", place, rule, "Use a causal model")

    @functools.cached_property
    def cost(self) -> ReadingCost:
        return reading_cost(self.model.backbone)

    def start(self) -> Prefix:
        """The empty text: the token that ends a document, as every text begins after one."""
        empty = self.model.backbone.empty_state(1)
        return self.read(Prefix(empty, torch.empty(0)), [self.tokenizer.end])

    def read(self, prefix: Prefix, tokens: Sequence[int]) -> Prefix:
        """The prefix with these tokens after it."""
        for chunk in self._chunks(tokens):
            logits, state = self._forward(prefix, chunk)
            prefix = Prefix(state, logits[-1].clone())
        return prefix

    def information(self, prefix: Prefix, tokens: Sequence[int]) -> Float[np.ndarray, " t"]:
        """I(x_t), in nats, of each token after the prefix and those before it.

        Raises:
            UserError: the model cannot read so many tokens.
        """
        found = [np.zeros(0)]
        for chunk in self._chunks(tokens):
            logits, state = self._forward(prefix, chunk)
            ahead = torch.cat([prefix.logits[None], logits[:-1]])
            wide = ahead.to(wide_dtype(ahead)).log_softmax(-1)
            at = torch.tensor(chunk, device=wide.device)
            found.append(-wide.gather(-1, at[:, None])[:, 0].double().cpu().numpy())
            prefix = Prefix(state, logits[-1])
        return np.concatenate(found)

    def means(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """The mean information of each text's tokens, every text by itself, none of them empty.

        Texts of like lengths are read side by side, padded behind, where nothing looks.
        """
        order = sorted(range(len(texts)), key=lambda one: len(texts[one]))
        found = [0.0] * len(texts)
        while order:
            count = max(1, self._most() // (len(texts[order[-1]]) + 1))
            batch, order = order[-count:], order[:-count]
            if len(batch) == 1:
                (one,) = batch
                found[one] = float(self.information(self.start(), texts[one]).mean())
                continue
            longest = len(texts[batch[-1]])
            self._check(longest + 1)
            rows = [
                [*texts[one], *[self.tokenizer.end] * (longest - len(texts[one]))] for one in batch
            ]
            read = torch.tensor([[self.tokenizer.end, *row[:-1]] for row in rows])
            wanted = torch.tensor(rows, device=self.model.device)
            model = self.model.backbone
            with arithmetic(model, self.model.precision, self.model.device):
                logits = model(read.to(self.model.device))
            self.flops += len(rows) * self.cost.of(longest)
            wide = logits.to(wide_dtype(logits)).log_softmax(-1)
            nats = -wide.gather(-1, wanted[..., None])[..., 0].double().cpu()
            for row, one in enumerate(batch):
                found[one] = float(nats[row, : len(texts[one])].mean())
        return found

    def _most(self) -> int:
        """How many tokens are read at a time."""
        return max(1, min(CHUNK, MAX_LOGITS // self.model.backbone.vocab_size))

    def _check(self, tokens: int) -> None:
        most = self.model.backbone.max_length
        if most is not None and tokens > most:
            rule = f"reads at most {most:,} tokens, and here are {tokens:,} or more"
            refuse("by", self.place, rule, "Score by a model without such a limit")

    def _forward(
        self, prefix: Prefix, tokens: Sequence[int]
    ) -> tuple[Float[Tensor, "t v"], BackboneState]:
        model = self.model.backbone
        self._check(prefix.state.tokens_seen + len(tokens))
        batch = torch.tensor([tokens], device=self.model.device)
        with arithmetic(model, self.model.precision, self.model.device):
            logits, state = model(batch, prefix.state)
        self.flops += self.cost.of(len(tokens), prefix.state.tokens_seen)
        return logits[0], state

    def _chunks(self, tokens: Sequence[int]) -> list[list[int]]:
        size = self._most()
        return [[*tokens[at : at + size]] for at in range(0, len(tokens), size)]
