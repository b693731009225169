"""Passkey retrieval as papers have it: a key of five digits in a repeated filler, in plain words.

The prompt is that of Mohtashami & Jaggi 2023 (arXiv 2305.16300, section 4.2), which PI (Chen 2023,
arXiv 2306.15595, section 3.3) and YaRN (Peng 2023, arXiv 2309.00071, section 4.3.2) use:

    There is an important info hidden inside a lot of irrelevant text. ...
    The grass is green. The sky is blue. ...                                (repeated)
    The pass key is 12345. Remember it. 12345 is the pass key.
    The grass is green. The sky is blue. ...                                (repeated)
    What is the pass key? The pass key is

As many fillers as fit make a prompt of at most a length's tokens with the answer, for any
tokenizer. A prompt is answered where greedy writing begins with the key. Where keys are:

    pi      at `distances` distances k from the end, evenly over the length, `repeats` keys at each.
            k_max is the largest k so that at every smaller one, too, at least `success` of the keys
            are found (PI, section 3.3: 32 distances, 10 keys, 20 %); 0 where there is none
    yarn    at random places, `repeats` prompts in all (YaRN: 10)

The papers leave open how long PI's prompts are; here they are as long as the length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np

from zoo.config.domains import Count, Lengths, Range, Seed
from zoo.data.tokenizers import Tokenizer
from zoo.errors import refuse
from zoo.measurement import Declaration, Quantity
from zoo.model.generation import Sampling
from zoo.model.scoring import write_many
from zoo.report.statistics import wilson
from zoo.tasks.context import EvalContext, Row, check_length
from zoo.tasks.passkey import TIMES
from zoo.tasks.task import STATE, Task, lengths_of

DIGITS = 5
HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
STATED = "The pass key is {key}. Remember it. {key} is the pass key."
QUERY = "What is the pass key? The pass key is"


class PasskeyPrompt(NamedTuple):
    """A prompt's tokens, its key, and the tokens from the key's statement to the end."""

    tokens: list[int]
    key: str
    distance: int


@dataclass(frozen=True, kw_only=True)
class PublishedPasskey(Task):
    """One row per length: how many keys are found, under `protocol` also how far back (`k_max`)."""

    declares = Declaration(
        title="Passkeys found, as published",
        about="A key of five digits is stated once in a filler that says the same over and over, "
        "and queried at the end, in the words of the papers.",
        quantities=(
            *(
                Quantity(
                    field="exact",
                    name=f"passkeys found, as {paper} has it",
                    better="higher",
                    form="share",
                    interval="interval",
                    chance="chance",
                    where={"protocol": protocol},
                )
                for protocol, paper in (("pi", "PI"), ("yarn", "YaRN"))
            ),
            Quantity(
                field="k_max",
                name="effective window (k_max)",
                better="higher",
                unit="tokens",
                where={"protocol": "pi"},
            ),
            STATE,
        ),
    )
    unidentifying = ("lengths", "batch", "protocol")  # a question has the protocol
    lengths: Lengths | None = None
    protocol: Literal["pi", "yarn"] = "pi"
    distances: Annotated[int, Range(1, 1024)] = 32
    repeats: Annotated[int, Range(1, 1024)] = 10
    success: Annotated[float, Range(above=0, most=1)] = 0.2
    seed: Seed = 0
    batch: Count = 8

    def questions(self, context: EvalContext) -> list[Row]:
        _ = context.corpus
        lengths = lengths_of(self.lengths, context, TIMES)
        return [{"protocol": self.protocol, "length": length} for length in lengths]

    def measure(self, context: EvalContext, question: Row) -> Row:
        length, tokenizer = question["length"], context.corpus.tokenizer
        check_length(context.model, length)
        answer = len(tokenizer.tokens(" 12345")) + 1  # with a token of its own for the space
        groups = self._groups(tokenizer, length - answer)
        prompts = [prompt for group in groups for prompt in group]
        context.progress.begin(f"published passkey at {length}", len(prompts) * length)
        written = write_many(
            context.model,
            [prompt.tokens for prompt in prompts],
            tokens=answer,
            sampling=Sampling(),
            stops=lambda *_: False,
            rows=self.batch,
            precision=context.precision,
        )
        found = {
            id(prompt): "".join(tokenizer.decode(tokens, prompt.tokens))
            .lstrip()
            .startswith(prompt.key)
            for prompt, tokens in zip(prompts, written, strict=True)
        }
        shares = [sum(found[id(one)] for one in group) / len(group) for group in groups]
        distances = [max(one.distance for one in group) for group in groups]
        right = sum(found.values())
        row = {
            "exact": right / len(prompts),
            "interval": wilson(right, len(prompts)),
            "chance": 10.0**-DIGITS,
            "correct": right,
            "count": len(prompts),
            "found_by_distance": shares,
            "distances": distances,
            "state_bytes": context.model.state_bytes(length),
        }
        if self.protocol == "pi":
            row["k_max"] = k_max(distances, shares, self.success)
        return row

    def _groups(self, tokenizer: Tokenizer, most: int) -> list[list[PasskeyPrompt]]:
        """The prompts, those of one distance together, nearest first; each of its own key."""
        generator = np.random.default_rng(self.seed)
        counts = self.distances if self.protocol == "pi" else 1
        groups = []
        for place in range(counts):
            group = []
            for _ in range(self.repeats):
                key = str(generator.integers(10 ** (DIGITS - 1), 10**DIGITS))
                share = (place + 1) / counts if self.protocol == "pi" else generator.random()
                group.append(prompt(tokenizer, key, share, most))
            groups.append(group)
        return groups


def prompt(tokenizer: Tokenizer, key: str, share: float, most: int) -> PasskeyPrompt:
    """A prompt of as many fillers as `most` tokens hold, `share` of them behind the key.

    Raises UserError where there is no room for the key and its question.
    """
    sizes = {count: len(_tokens(tokenizer, key, 0, count)) for count in (0, 1)}
    if sizes[0] > most:
        rule = f"must be at least {sizes[0] + DIGITS + 1}, the tokens of a prompt and its answer"
        refuse("task.published_passkey.lengths", most, rule)
    count = (most - sizes[0]) // max(1, sizes[1] - sizes[0])
    while count and len(_tokens(tokenizer, key, 0, count)) > most:
        count -= 1
    behind = round(share * count)
    whole = _tokens(tokenizer, key, count - behind, behind)
    while len(whole) > most and count:  # where fillers on both sides are cut otherwise
        count -= 1
        behind = round(share * count)
        whole = _tokens(tokenizer, key, count - behind, behind)
    before = "\n".join([HEAD, *[FILLER] * (count - behind), ""])
    return PasskeyPrompt(whole, key, len(whole) - len(tokenizer.start(before)))


def _tokens(tokenizer: Tokenizer, key: str, before: int, behind: int) -> list[int]:
    stated = STATED.format(key=key)
    parts = [HEAD, *[FILLER] * before, stated, *[FILLER] * behind, QUERY]
    return tokenizer.start("\n".join(parts))


def k_max(distances: Sequence[int], shares: Sequence[float], success: float) -> int:
    """The largest distance so that at it and at every smaller one the share is at least `success`;
    0 where that of the smallest is less."""
    reached = 0
    for distance, share in sorted(zip(distances, shares, strict=True)):
        if share < success:
            break
        reached = distance
    return reached
