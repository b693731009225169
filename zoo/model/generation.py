"""Writes text: a prompt is read into a state, from which one token after another is drawn.

The state is the model's own, under its extension, so that a token costs what the architecture's
state costs: the same at any length for a recurrent model, a read of the cache for attention.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.config.domains import Range, Seed, check
from zoo.data.tokenizers import CONTEXT, Tokenizer
from zoo.errors import refuse
from zoo.mixers.base import count_bytes
from zoo.model.arithmetic import arithmetic
from zoo.model.backbone import Backbone, BackboneState
from zoo.ops.dtypes import wide_dtype

CHUNK = 4096  # tokens of a prompt that are read at a time
Temperature = Annotated[float, Range(0)]
Share = Annotated[float, Range(above=0, most=1)]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: only the likeliest tokens are drawn from, as few as have this probability together
            (Holtzman 2019, section 3.1, arXiv:1904.09751); 1 draws from all.
        seed: of the random numbers. The same seed, text and machine give the same tokens.

    Raises:
        UserError: for a temperature below 0, a top_p that is no share above 0, a seed below 0 or of
            more than 32 bits, and either top_p or a seed where nothing is drawn.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check("temperature", self.temperature, Temperature)
        check("top_p", self.top_p, Share)
        check("seed", self.seed, Seed)
        for name, value, unset in (("top_p", self.top_p, 1), ("seed", self.seed, 0)):
            if self.temperature == 0 and value != unset:
                rule = "temperature=0 takes the likeliest token, nothing is drawn"
                refuse(name, value, rule, "Set a temperature, or leave it out")

    def start(self) -> Callable[[Float[Tensor, " v"]], int]:
        """What draws the tokens of one text from their logits, one after another."""
        if self.temperature == 0:
            return lambda logits: int(logits.argmax())
        generator = torch.Generator().manual_seed(int(self.seed))

        def draw(logits: Float[Tensor, " v"]) -> int:
            chances = self.probabilities(logits.cpu())
            return int(torch.multinomial(chances, 1, generator=generator))

        return draw

    def probabilities(self, logits: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """The distribution that a token is drawn from, in float64; for temperatures above 0."""
        wide = logits.double()
        chances = ((wide - wide.max()) / self.temperature).softmax(-1)
        if self.top_p < 1:
            falling, places = chances.sort(descending=True, stable=True)
            likelier = falling.cumsum(-1) - falling  # probability of the tokens before each
            chances[places[likelier >= self.top_p]] = 0
        return chances / chances.sum()


class Writer:
    """A text in the making: what was read and written so far is in its state.

    `read` and `write` may follow each other in any order, as in a conversation.
    """

    def __init__(self, model: Backbone, precision: str = "32-true") -> None:
        """Raises UserError where the model cannot write: it reads both ways."""
        if not model.causal:
            rule = "reads its text both ways, so it cannot write on"
            refuse("model", type(model.sublayers()[0]).__name__, rule, "Use a causal model")
        self.model, self.precision = model, precision
        self.device = next(model.parameters()).device
        self.state: BackboneState = model.empty_state(1)
        self._unread: list[int] = []
        self._last: list[int] = []  # tokens of the text, of which its last are needed
        self._logits: Tensor | None = None  # after what was read
        self.written = 0  # tokens drawn so far, ends of documents apart
        self._sampling: Sampling | None = None  # how tokens were drawn last, and what draws them
        self._draw: Callable[[Float[Tensor, " v"]], int] | None = None

    @property
    def last_tokens(self) -> list[int]:
        """The last tokens of the text, on which the next characters may depend."""
        return self._last

    @property
    def unread(self) -> list[int]:
        """Tokens of the text that are not in the state yet."""
        return [*self._unread]

    @property
    def tokens(self) -> int:
        """Tokens of the text so far."""
        return self.state.tokens_seen + len(self._unread)

    @property
    def state_bytes(self) -> int:
        """Bytes that the state holds."""
        return count_bytes(self.state)

    def read(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text; they are read when the next token is requested.

        Raises UserError for a token that the model does not have, and where the text becomes longer
        than it can read.
        """
        size = self.model.vocab_size
        if bad := [token for token in tokens if not 0 <= token < size]:
            refuse("tokens", bad[0], f"must be from 0 to {size - 1}, the model's tokens")
        self.check_length(len(tokens))
        self._unread += map(int, tokens)
        self._last = [*self._last, *map(int, tokens)][-CONTEXT:]

    def check_length(self, more: int) -> None:
        """Refuse a text that would be longer by `more` tokens than the model can read."""
        most = self.model.max_length
        if most is not None and self.tokens + more > most:
            rule = f"the model reads at most {most:,} tokens, and the text has {self.tokens:,}"
            refuse("tokens", more, rule, "Write fewer tokens, or shorten the prompt")

    def next_logits(self) -> Float[Tensor, " v"]:
        """The logits of the token after the text, in float32 or better. The text is not empty."""
        if self._unread:
            text, x = torch.tensor(self._unread, device=self.device)[None], None
            with arithmetic(self.model, self.precision, self.device):
                for piece in text.split(CHUNK, 1):
                    x, after = self.model.hidden(piece, self.state)
                    assert after is not None
                    self.state = after
                assert x is not None, "the text has tokens"
                logits = self.model.head(x[0, -1])
            self._logits = logits.to(wide_dtype(logits))
            self._unread = []
        assert self._logits is not None, "there is no text to go on from"
        return self._logits

    def write(self, count: int, sampling: Sampling, ends: Collection[int] = ()) -> Iterator[int]:
        """Draw up to `count` tokens, which become part of the text; stops before one of `ends`.

        Random numbers go on from those of the last call of the same `sampling`.

        Raises UserError where the text would become longer than the model can read, and
        ArithmeticError where the model gives no finite numbers.
        """
        self.check_length(count)
        if self._draw is None or self._sampling != sampling:
            self._sampling, self._draw = sampling, sampling.start()
        draw = self._draw
        for _ in range(count):
            logits = self.next_logits()
            least, most = logits.aminmax()  # NaN where there is one
            if not (math.isfinite(least) and math.isfinite(most)):
                raise ArithmeticError("the model's outputs are not finite numbers")
            token = draw(logits)
            self._unread.append(token)
            self._last = [*self._last, token][-CONTEXT:]
            if token in ends:
                return
            self.written += 1
            yield token


def write_text(
    writer: Writer, tokenizer: Tokenizer, count: int, sampling: Sampling, stop: Sequence[str] = ()
) -> Iterator[str]:
    """Write on from a text, at most `count` tokens; yield the new part in pieces.

    Each of the tokenizer's `ends` ends it, and so does the first of the `stop` texts, which is left
    out.
    """
    written = writer.write(count, sampling, tokenizer.ends)
    return until(tokenizer.decode(written, writer.last_tokens), stop)


def until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first of the `stop` texts, which is left out.

    What may be the beginning of one waits until the text shows whether it is.
    """
    waiting = ""
    for piece in pieces:
        waiting += piece
        places = [place for word in stop if (place := waiting.find(word)) >= 0]
        if places:
            if waiting[: min(places)]:
                yield waiting[: min(places)]
            return
        held_back = max((_overlap(waiting, word) for word in stop), default=0)
        if sure := waiting[: len(waiting) - held_back]:
            yield sure
        waiting = waiting[len(waiting) - held_back :]
    if waiting:
        yield waiting


def _overlap(text: str, word: str) -> int:
    """Characters at the text's end that begin the word."""
    sizes = range(min(len(text), len(word) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(word[:size])), 0)
