"""Recall of one of many facts by length: several keys are stated in a text, and one is queried.

As task=passkey, but a prompt states `facts` keys, each behind a sign of its own, evenly from its
beginning to its end, and the question names the sign of one (zoo.data.passkey). The other facts'
keys are among the candidates: a model that finds a key, but not whose it is, is right once in
`facts`.

What is low at every length was not learned: train with `data.passkey=` and `data.passkey_facts=`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Int

from zoo.config.domains import Range
from zoo.data.passkey import QUESTION, SIGNS, STATEMENT, facts_prompt, sentence, signed, tokens
from zoo.data.tokenizers import Encode
from zoo.errors import refuse
from zoo.measurement import Declaration
from zoo.tasks.passkey import Passkey, found
from zoo.tasks.task import PROMPT_FLOPS, STATE


@dataclass(frozen=True, kw_only=True)
class Facts(Passkey):
    """One row per length; the fact that is queried is the nearest to each of `depths` places."""

    declares = Declaration(
        title="Facts found",
        about="Several keys, each behind a sign of its own, are stated in a text and one of them "
        "is queried at its end, with the same texts and keys for every model.",
        quantities=(*found("facts"), STATE, PROMPT_FLOPS),
    )
    states: ClassVar[str] = "the facts"
    facts: Annotated[int, Range(2, 16)] = 8  # as many as there are SIGNS

    def check(self) -> None:
        super().check()
        if self.candidates < self.facts:
            rule = f"must be at least the number of facts ({self.facts}), which are among them"
            refuse("task.facts.candidates", self.candidates, rule)

    def _least(self, keys: Sequence[str], encode: Encode) -> int:
        facts = zip(SIGNS, keys[: self.facts], strict=False)
        stated = sum(len(sentence(STATEMENT, *fact, encode)) for fact in facts)
        return stated + max(len(tokens(signed(QUESTION, sign), encode)) for sign in SIGNS)

    def _prompt(
        self, filler: Int[np.ndarray, " t"], index: int, keys: Sequence[str], encode: Encode
    ) -> tuple[Int[np.ndarray, " t"], int]:
        """A prompt that states the first `facts` of the keys and queries the very first."""
        generator = np.random.default_rng([self.seed, index, 1])
        signs = generator.permutation([*SIGNS])[: self.facts].tolist()
        depth = np.linspace(0, 1, self.depths)[index % self.depths]
        queried, others = round(depth * (self.facts - 1)), list(keys[1 : self.facts])
        stated = [*others[:queried], keys[0], *others[queried:]]
        pairs = [*zip(signs, stated, strict=True)]
        prompt = facts_prompt(filler, pairs, queried, encode)
        return prompt, len(tokens(signed(QUESTION, signs[queried]), encode))
