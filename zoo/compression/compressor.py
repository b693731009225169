"""Compression of the prompts that tasks have a model read, under the options compress.*.

By `rate` a share of the tokens is kept. By `flops` as many as the reading model has operations left
for, after those of the scorer: at one number of operations, compression included, all methods can
be compared, and with a model that reads everything. What a scorer computes depends a little on what
it keeps, and a method may keep some tokens more than its share: each prompt is shortened again
until it takes no more than it may, from the share of the first prompt of its length on.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.compression.prompt import Prompt, compressed, prompt_from, prompt_of
from zoo.compression.scorer import Scorer
from zoo.config.schema.eval import Compress
from zoo.data.tokenizers import Tokenizer
from zoo.errors import UserError, below, refuse
from zoo.model.flops import ReadingCost
from zoo.model.language_model import load_language_model

TRIES, CLOSE = 8, 0.01  # shortenings towards the operations, and the share of them left over


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
        searched: those of rates that were tried and not kept, to find the one that a number of
            operations suffices for.
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
    searched: float = 0.0
    _targets: dict[int, int] = field(default_factory=dict)  # tokens kept, by those of a prompt
    _known: dict[tuple[Any, ...], tuple[list[int], float, float]] = field(default_factory=dict)

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
        kept, scored, searched = self._known[key]
        self.scored, self.searched = self.scored + scored, self.searched + searched
        self.prompts += 1
        self.read, self.given = self.read + len(kept), self.given + len(tokens) + len(question)
        self.flops += self.cost.of(len(kept))
        return kept

    def _shortened(
        self, tokens: Sequence[int], question: Sequence[int]
    ) -> tuple[list[int], float, float]:
        """The tokens that are left, the scorer's operations, and those of rates tried in vain."""
        assert self.config.method is not None
        prompt = prompt_from(tokens, self.reader, question)
        if not self._scores_readers_tokens:
            assert self.scorer is not None
            text = prompt.text(range(prompt.question.start))
            wanted = prompt.text(prompt.question)
            prompt = prompt_of(text, self.scorer.tokenizer, question=wanted)
        whole = [*tokens, *question]
        if self.config.rate is not None:
            return *self._compressed(prompt, whole, self.config.rate), 0.0
        return self._affordable(prompt, whole, self.config.flops or 0.0)

    @property
    def _scores_readers_tokens(self) -> bool:
        return self.scorer is None or self.scorer.tokenizer.name == self.reader.name

    def _compressed(self, prompt: Prompt, whole: list[int], rate: float) -> tuple[list[int], float]:
        """The reader's tokens that are left of a prompt, and the scorer's operations."""
        assert self.config.method is not None
        before = self.scorer.flops if self.scorer else 0.0
        kept = compressed(self.config.method.load(), self.scorer, prompt, rate=rate)
        spent = self.scorer.flops - before if self.scorer else 0.0
        if kept == [*range(len(prompt.pieces))]:
            return whole, spent
        if self._scores_readers_tokens:
            return prompt.tokens(kept), spent
        return self.reader.tokens(prompt.text(kept)), spent

    def _affordable(
        self, prompt: Prompt, tokens: list[int], flops: float
    ) -> tuple[list[int], float, float]:
        """As `_shortened`: the most of a prompt, of these tokens of the reader's, for which so many
        operations suffice; all of it where they do.

        Raises:
            UserError: they suffice for nothing.
        """
        size, whole = len(tokens), self.cost.tokens(flops)
        if whole >= size:
            return *self._compressed(prompt, tokens, 1.0), 0.0
        low, high = 0, max(whole, 1) + 1  # targets within the operations, and beyond
        below, above = flops, math.inf  # by how many; halved where the other end moves (Illinois)
        target, found, least = self._targets.get(size, max(whole, 1)), None, math.inf
        searched = 0.0
        for count in itertools.count(1):
            left, spent = self._compressed(prompt, tokens, target / size)
            searched += spent
            used = spent + self.cost.of(len(left))
            least = min(least, used)
            if used <= flops:
                low, below, above, found = target, flops - used, above / 2, (left, spent)
            else:
                high, below, above = target, below / 2, used - flops
            close = used <= flops and used >= (1 - CLOSE) * flops
            if high - low <= 1 or close or (found and count >= TRIES):
                break
            if found and above < math.inf:
                target = round(low + below / (below + above) * (high - low))
            else:  # by larger and larger steps, as a method may keep the same units for several
                target += count * (self.cost.tokens(max(flops - spent, 0.0)) - len(left))
            target = min(max(target, low + 1), high - 1)
        if found is None:
            rule = f"is less than the {least:.3g} that a prompt of {size:,} tokens takes at least"
            refuse("flops", f"{flops:g}", rule, "Use more, a smaller scorer, or shorter prompts")
        self._targets.setdefault(size, low)
        return *found, searched - found[1]

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
        if self.config.flops is not None:
            found["search_flops"] = self.searched
        found["prompt_flops"] = (self.flops + self.scored) / max(self.prompts, 1)
        self.prompts, self.read, self.given = 0, 0, 0
        self.flops, self.scored, self.searched = 0.0, 0.0, 0.0
        return found


@functools.lru_cache(maxsize=1)
def scorer_of(path: str, device: str) -> Scorer:
    """The run or the checkpoint that scores, opened once for all runs that are measured."""
    model = load_language_model(path, device=device)
    try:
        return Scorer(model, path)
    except UserError as error:
        raise below("compress", error) from None
