"""Compression of the prompts that tasks have a model read, under the options compress.*.

By `rate` a share of the tokens is kept. By `flops` as many as the reading model has operations left
for, after those of the scorer: at one number of operations, compression included, all methods can
be compared, and with a model that reads everything. What a scorer computes depends a little on what
it keeps, so that the rate is found on the first prompt of each length, and is that of all others.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.compression.prompt import Prompt, compressed, prompt_of
from zoo.compression.scorer import Scorer
from zoo.config.schema.eval import Compress
from zoo.data.tokenizers import Tokenizer
from zoo.errors import UserError, below, refuse
from zoo.model.flops import ReadingCost
from zoo.model.language_model import load_language_model

FIXED_POINT, CLOSE = 8, 0.005  # readings of the first prompt at most; share of the operations


class CompressionError(UserError):
    """The options compress.* cannot shorten a prompt, whichever model reads it."""


@dataclass
class Compressor:
    """Shortens prompts in the tokens of the model that reads them.

    Attributes:
        scorer: of the method; None for one that reads nothing.
        reader: the reading model's tokenizer.
        cost: what the reading model computes.
        prompts: that were shortened; one is so once.
        read, given: tokens that prompts were left with, and had.
        flops, scored: operations of reading what they were left with, and of finding that.
    """

    config: Compress
    scorer: Scorer | None
    reader: Tokenizer
    cost: ReadingCost
    prompts: int = 0
    read: int = 0
    given: int = 0
    flops: float = 0.0
    scored: float = 0.0
    _rates: dict[int, float] = field(default_factory=dict)  # by the tokens of a prompt
    _known: dict[tuple[Any, ...], tuple[list[int], float]] = field(default_factory=dict)

    def __call__(self, tokens: Sequence[int], question: Sequence[int] = ()) -> list[int]:
        """The tokens of a prompt that are left, a question's behind them.

        Args:
            tokens: of the prompt, without the question.
            question: what the text is read for, at its end. The methods may shorten it.

        Raises:
            CompressionError: nothing would be left, or the scorer cannot read the prompt.
        """
        key = (tuple(map(int, tokens)), tuple(map(int, question)))
        if key not in self._known:
            try:
                self._known = {key: self._shortened(*key)}  # a task takes one several times
            except UserError as error:
                raise CompressionError(self._named(error)) from None
        kept, scored = self._known[key]
        self.scored += scored
        self.prompts += 1
        self.read, self.given = self.read + len(kept), self.given + len(tokens) + len(question)
        self.flops += self.cost.of(len(kept))
        return kept

    def _shortened(self, tokens: Sequence[int], question: Sequence[int]) -> tuple[list[int], float]:
        """The tokens that are left, and the scorer's operations."""
        assert self.config.method is not None
        text, question_text = ("".join(self.reader.decode(part)) for part in (tokens, question))
        tokenizer = self.scorer.tokenizer if self.scorer else self.reader
        prompt = prompt_of(text, tokenizer, question=question_text)
        rate = self._rate(prompt, len(tokens) + len(question))
        kept, scored = self._compressed(prompt, rate)
        if tokenizer.name == self.reader.name:
            return prompt.tokens(kept), scored
        return self.reader.tokens(prompt.text(kept)), scored

    def _compressed(self, prompt: Prompt, rate: float) -> tuple[list[int], float]:
        """The pieces that are left of a prompt, and the scorer's operations."""
        assert self.config.method is not None
        before = self.scorer.flops if self.scorer else 0.0
        kept = compressed(self.config.method.load(), self.scorer, prompt, rate=rate)
        return kept, self.scorer.flops - before if self.scorer else 0.0

    def _rate(self, prompt: Prompt, size: int) -> float:
        """The share that is kept of a prompt of `size` tokens, in the reader's tokenizer."""
        if self.config.rate is not None:
            return self.config.rate
        if size not in self._rates:
            self._rates[size] = self._affordable(prompt, size, self.config.flops or 0.0)
        return self._rates[size]

    def _affordable(self, prompt: Prompt, size: int, flops: float) -> float:
        """The largest share for which so many operations suffice; 1 where they do for all.

        Raises:
            UserError: the scorer alone computes more.
        """
        if (whole := self.cost.tokens(flops)) >= size:
            return 1.0
        spent, before = 0.0, flops
        for _ in range(FIXED_POINT if self.scorer else 0):
            if abs(spent - before) < CLOSE * flops:
                break
            rate = max(self.cost.tokens(flops - spent), 1) / size
            spent, before = self._compressed(prompt, rate)[1], spent
        if (left := self.cost.tokens(flops - spent)) < 1:
            needs = spent + self.cost.of(1)
            rule = f"is less than the {needs:.3g} that a prompt of {size:,} tokens takes at least"
            refuse("flops", f"{flops:g}", rule, "Use more, a smaller scorer, or shorter prompts")
        return min(left, whole) / size

    def _named(self, error: UserError) -> str:
        """The refusal of a method, which knows the last names of its options alone."""
        option, _, rest = str(error).partition("=")
        if option == "rate" and self.config.flops is not None:
            rule = rest.partition(": ")[2]
            return f"compress.flops={self.config.flops:g}: {rule}"
        if option == "text":
            rule = rest.partition(": ")[2]
            return f"compress={self.config.name}: {rule}"
        return str(below("compress", error))

    @property
    def row(self) -> dict[str, Any]:
        """What a row says of the prompts since the last one: their tokens, and the operations of
        shortening and of reading them, of all and of one on average."""
        found: dict[str, Any] = {"prompt_tokens_read": self.read, "prompt_tokens_given": self.given}
        found["reader_flops"] = self.flops
        found["compressor_flops"] = self.scored
        found["prompt_flops"] = (self.flops + self.scored) / max(self.prompts, 1)
        self.prompts, self.read, self.given, self.flops, self.scored = 0, 0, 0, 0.0, 0.0
        return found


@functools.lru_cache(maxsize=1)
def scorer_of(path: str, device: str) -> Scorer:
    """The run or the checkpoint that scores, opened once for all runs that are measured."""
    model = load_language_model(path, device=device)
    try:
        return Scorer(model, path)
    except UserError as error:
        raise below("compress", error) from None
