"""Compression of the prompts that tasks have a model read, under the options compress.*."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.compression.prompt import compressed, prompt_of
from zoo.compression.scorer import Scorer
from zoo.config.schema.eval import Compress
from zoo.data.tokenizers import Tokenizer
from zoo.errors import UserError, below, sentence
from zoo.model.flops import ReadingCost
from zoo.model.language_model import load_language_model


class CompressionError(UserError):
    """The options compress.* cannot shorten a prompt, whichever model reads it."""


@dataclass
class Compressor:
    """Shortens prompts in the tokens of the model that reads them.

    Attributes:
        scorer: of the method; None for one that reads nothing.
        reader: the reading model's tokenizer.
        cost: what the reading model computes.
        read, given: tokens that prompts were left with, and had.
        flops: operations of reading what they were left with.
    """

    config: Compress
    scorer: Scorer | None
    reader: Tokenizer
    cost: ReadingCost
    read: int = 0
    given: int = 0
    flops: float = 0.0
    _known: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)

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
        kept = self._known[key]
        self.read, self.given = self.read + len(kept), self.given + len(tokens) + len(question)
        self.flops += self.cost.of(len(kept))
        return kept

    def _shortened(self, tokens: Sequence[int], question: Sequence[int]) -> list[int]:
        assert self.config.method is not None
        text, question_text = ("".join(self.reader.decode(part)) for part in (tokens, question))
        tokenizer = self.scorer.tokenizer if self.scorer else self.reader
        prompt = prompt_of(text, tokenizer, question=question_text)
        kept = compressed(self.config.method.load(), self.scorer, prompt, rate=self.config.rate)
        if tokenizer.name == self.reader.name:
            return prompt.tokens(kept)
        return self.reader.tokens(prompt.text(kept))

    def _named(self, error: UserError) -> str:
        """The refusal of a method, which knows the last names of its options alone."""
        option, _, rest = str(error).partition("=")
        if option == "question":
            rule = "ranks documents by a question, and the prompt has none"
            return sentence(f"compress={self.config.name}", rule, "Use compress=llmlingua")
        if option == "text":
            rule = rest.partition(": ")[2]
            return f"compress={self.config.name}: {rule}"
        return str(below("compress", error))

    @property
    def row(self) -> dict[str, Any]:
        """What a row says of the prompts since the last one: their tokens, and the operations of
        shortening and of reading them."""
        found: dict[str, Any] = {"prompt_tokens_read": self.read, "prompt_tokens_given": self.given}
        found["reader_flops"] = self.flops
        found["compressor_flops"] = self.scorer.flops if self.scorer else 0.0
        self.read, self.given, self.flops = 0, 0, 0.0
        if self.scorer:
            self.scorer.flops = 0.0
        return found


@functools.lru_cache(maxsize=1)
def scorer_of(path: str, device: str) -> Scorer:
    """The run or the checkpoint that scores, opened once for all runs that are measured."""
    model = load_language_model(path, device=device)
    try:
        return Scorer(model, path)
    except UserError as error:
        raise below("compress", error) from None
