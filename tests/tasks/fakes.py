"""Models whose costs are known, and contexts to measure them on."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.corpora import Corpus
from zoo.data.passkey import DIGITS, QUESTION, STATEMENT
from zoo.data.store import TokenStore
from zoo.data.tokenizers import BYTE_TOKENIZER
from zoo.mixers.base import Mixer
from zoo.model.backbone import Backbone, BackboneState
from zoo.model.flops import ReadingCost
from zoo.tasks.context import EvalContext, Row
from zoo.tasks.task import Task

VOCABULARY = 16


class Remembers(Backbone):
    """Predicts from the last `memory` tokens alone; before the first token it remembers nothing."""

    causal, recurrent, max_length, positions, extended = True, True, None, None, None

    def __init__(self, memory: int):
        nn.Module.__init__(self)  # a backbone to isinstance, with layers of its own
        self.memory, self.vocab_size, self.read = memory, VOCABULARY, 0
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(97, VOCABULARY, generator=generator, dtype=torch.float64)
        self.logits = nn.Parameter(logits, requires_grad=False)
        self.weights = torch.arange(memory, 0, -1)
        self.head = nn.Identity()  # of what `hidden` gives

    def forward(self, tokens: Tensor, state: BackboneState | None = None):
        batch, count = tokens.shape
        self.read += tokens.numel()
        before = self.empty_state(batch) if state is None else state
        seen = torch.cat([before.blocks[0], tokens + 1], 1)  # type: ignore[list-item]
        windows = seen.unfold(1, self.memory, 1)[:, -count:]
        logits = self.logits[(windows * self.weights).sum(-1) % 97]
        if state is None:
            return logits
        return logits, BackboneState((seen[:, -self.memory :],), before.tokens_seen + count)  # type: ignore

    def hidden(self, tokens: Tensor, state: BackboneState | None = None, positions: None = None):
        found = self(tokens, state)
        return (found, None) if state is None else found

    def sublayers(self) -> list[Mixer]:
        return []

    def empty_state(self, batch: int) -> BackboneState:
        return BackboneState((torch.zeros(batch, self.memory, dtype=torch.int64),), 0)  # type: ignore

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        del tokens
        return 8 * batch * self.memory

    def costs(self, window: np.ndarray) -> np.ndarray:
        """Nats of window[1:], one prediction after another, straight from the definition."""
        logits = self.logits.numpy()
        found = []
        for end in range(1, len(window)):
            history = window[max(0, end - self.memory) : end] + 1
            row = logits[(history * np.arange(len(history), 0, -1)).sum() % 97]
            found.append(np.log(np.exp(row).sum()) - row[window[end]])
        return np.array(found)


class Reader(Backbone):
    """A model of bytes whose state is the text so far; what it writes is in its `hidden`."""

    max_length, vocab_size, causal, recurrent = None, 256, True, True
    positions, extended, stages = None, None, ()

    def __init__(self):
        nn.Module.__init__(self)
        self.head = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def sublayers(self) -> list[Mixer]:
        return []

    def empty_state(self, batch: int) -> BackboneState:
        return BackboneState((torch.zeros(batch, 0, dtype=torch.int64),), 0)  # type: ignore

    def state_bytes(self, tokens: int, batch: int = 1) -> int:
        return 0


class Finder(Reader):
    """Writes what followed `STATEMENT`, where it was in the last `memory` tokens."""

    recurrent, max_length, vocab_size = True, None, 256

    def __init__(self, memory: int, slip: int | None = None):
        """`slip`: the place in the key of a digit that it gets wrong, by one."""
        super().__init__()
        self.memory, self.slip, self.prompts = memory, slip, []

    def forward(self, tokens, state):
        return self.hidden(tokens, state)

    def hidden(self, tokens, state):
        seen = torch.cat([state.blocks[0], tokens], 1)
        logits = torch.zeros(*tokens.shape, 256, dtype=torch.float64)
        for row, history in enumerate(seen.tolist()):
            for at in range(max(0, tokens.shape[1] - DIGITS), tokens.shape[1]):
                end = len(history) - tokens.shape[1] + at + 1
                if (
                    token := self.next(bytes(history[max(0, end - self.memory) : end]))
                ) is not None:
                    logits[row, at, token] = 5.0
        if tokens.shape[1] > DIGITS:
            self.prompts.append(tokens)
        return logits, BackboneState(
            (seen[:, -self.memory :],), state.tokens_seen + tokens.shape[1]
        )

    def next(self, text: bytes) -> int | None:
        stated, question = text.find(STATEMENT.encode()), text.rfind(QUESTION.encode())
        written = len(text) - question - len(QUESTION)
        if min(stated, question) < 0 or written >= DIGITS:
            return None
        return text[stated + len(STATEMENT) + written] ^ (written == self.slip)

    def state_bytes(self, tokens, batch=1):
        return 8 * batch * min(tokens, self.memory)


class FakeContext(EvalContext):
    """Models without layers have no operations that could be counted."""

    cost = ReadingCost(lambda _: 1.0, 2**30)


class TextsApart:
    """In the place of `RowBatch`, for models without layers: every text is read by itself."""

    def __init__(self, model: Backbone, states: Sequence[BackboneState]):
        self.model, self.states = model, [*states]

    def split(self) -> list[BackboneState]:
        return self.states

    def hidden(self, tokens: Tensor) -> Tensor:
        read = [self.model.hidden(*each) for each in zip(tokens.split(1), self.states, strict=True)]
        self.states = [after for _, after in read]  # type: ignore[misc]
        return torch.cat([x for x, _ in read])


class ByPosition(Remembers):
    """Gives every token after `position` tokens of context the cost `nats(position)`."""

    def __init__(self, nats: Callable[[Tensor], Tensor]):
        super().__init__(memory=1)
        self.nats = nats

    def forward(self, tokens: Tensor, state: BackboneState | None = None):
        before = state or self.empty_state(len(tokens))
        _, after = super().forward(tokens, before)
        positions = torch.arange(before.tokens_seen, before.tokens_seen + tokens.shape[1]) + 1
        chance = torch.exp(-self.nats(positions.double()))
        others = torch.log((1 - chance) / (VOCABULARY - 1))
        logits = others[:, None].repeat(1, VOCABULARY)
        logits[:, 0] = torch.log(chance)  # every token of its text is 0
        logits = logits.expand(len(tokens), -1, -1)
        return logits if state is None else (logits, after)


class BothSides(Remembers):
    """Predicts a token from what is shown of it and of its two neighbours."""

    causal = False

    def __init__(self):
        super().__init__(memory=3)
        self.vocab_size = VOCABULARY + 1

    def forward(self, tokens: Tensor, state: BackboneState | None = None):
        assert state is None
        self.read += tokens.numel()
        seen = nn.functional.pad(tokens + 1, (1, 1)).unfold(1, 3, 1)
        logits = self.logits[(seen * self.weights).sum(-1) % 97]
        return nn.functional.pad(logits, (0, 1), value=-torch.inf)  # never the mask itself


def text_store(tokens: np.ndarray, documents: int = 1, bytes_per_token: int = 1) -> TokenStore:
    offsets = np.linspace(0, len(tokens), documents + 1).astype(np.int64)
    meta = {"source_bytes": bytes_per_token * len(tokens)}
    sizes = np.full(len(tokens), bytes_per_token, np.uint16)
    return TokenStore(Path("nowhere/test"), tokens.astype(np.uint8), offsets, "sha", meta, sizes)


def random_text(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(VOCABULARY, size=count)


def text_corpus(store: TokenStore, documents: str = "joined") -> Corpus:
    tokenizer = BYTE_TOKENIZER._replace(vocab_size=VOCABULARY)
    return Corpus("fake", store, store, store, tokenizer, documents)


def measure(task: type[Task], context: EvalContext, **settings) -> Iterator[Row]:
    """The rows of a task under some settings."""
    return task(**settings).rows(context)


def make_context(model: nn.Module, folder: Path, store: TokenStore, **other) -> EvalContext:
    settings = {"train_length": 32, "data": text_corpus(store)} | other
    return FakeContext(model=model, folder=folder, **settings)  # type: ignore[arg-type]
