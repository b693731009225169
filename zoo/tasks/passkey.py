"""Passkey retrieval by length and depth: does the model find what it read that far back?

A prompt states a key of `DIGITS` digits at some depth of the corpus's own text and queries it at
its end (zoo.data.passkey; Mohtashami & Jaggi 2023). Two answers are counted:

    accuracy    forced choice: the key has a higher likelihood than each of `candidates` - 1 other
                random keys; chance is 1 / candidates
    exact       greedy decoding writes the key; chance is 10^-DIGITS

Prompt i has the same key, the same other candidates and the same relative depth at every length,
and a longer one begins earlier in the same text: all models and lengths get the same questions. A
model answers from the state that the prompt left. Intervals are Wilson's, over prompts.

What is low at every length was not learned: train with `data.passkey=`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.config.domains import Count, Lengths, Range, Seed
from zoo.data.loader import begun, evaluation_text
from zoo.data.passkey import DIGITS, QUESTION, passkey_prompt, prompt_tokens, random_key, tokens
from zoo.data.tokenizers import Encode
from zoo.errors import refuse
from zoo.measurement import Declaration, Quantity
from zoo.report.statistics import wilson
from zoo.tasks.context import (
    EvalContext,
    NotApplicableError,
    Row,
    check_length,
    check_state,
    chunk_tokens,
    finite,
    nats,
)
from zoo.tasks.memory import check_memory
from zoo.tasks.perplexity import BATCH_TOKENS, TIMES
from zoo.tasks.readers import add_up, check_split, read_prompt
from zoo.tasks.task import PROMPT_FLOPS, STATE, Task, lengths_of

PAD = -1  # after the end of a key that has fewer tokens than another
TOKEN_BYTES = 32  # of a prompt: the text and the prompt in int64, and the copies that are read


def found(what: str) -> Iterator[Quantity]:
    """The shares of these that are found: by forced choice, and written out."""
    yield Quantity(
        field="accuracy",
        name=f"{what} found, forced choice",
        better="higher",
        form="share",
        interval="interval",
        chance="chance",
    )
    yield Quantity(
        field="exact",
        name=f"{what} found, exact match",
        better="higher",
        form="share",
        interval="exact_interval",
        chance="exact_chance",
    )


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """One row per length, with the counts at each depth: `depths` of them from 0 to 1.

    A length counts the tokens of prompt and answer. Each reads depths * repeats prompts, `chunk`
    tokens at a time. The state is that of the longest that was read.
    """

    declares = Declaration(
        title="Passkeys found",
        about="A key of four digits is stated somewhere in a text and queried at its end, with "
        "the same texts and keys for every model. A level score in bits per byte does not show "
        "this: a model may read on well and have forgotten the key.",
        quantities=(*found("passkeys"), STATE, PROMPT_FLOPS),
    )
    compresses: ClassVar[bool] = True
    has_question: ClassVar[bool] = True
    reads_together: ClassVar[bool] = True
    states: ClassVar[str] = "a passkey"
    lengths: Lengths | None = None
    depths: Annotated[int, Range(1, 1024)] = 5
    repeats: Annotated[int, Range(1, 1024)] = 10
    candidates: Annotated[int, Range(2, 10_000)] = 10
    seed: Seed = 0
    chunk: Count = 4096

    def check(self) -> None:
        longest, count = max(self.lengths or [0]), self.depths * self.repeats
        option = f"task.{self.name}.lengths={longest}"
        check_memory(option, count * longest * TOKEN_BYTES, f"{count} prompts")

    def questions(self, context: EvalContext) -> list[Row]:
        lengths = lengths_of(self.lengths, context, TIMES)
        if self.lengths and lengths[0] < (least := self._least_length(context, self._keys())):
            rule = f"must be at least {least}, the tokens of {self.states} and the question"
            refuse(f"task.{self.name}.lengths", lengths[0], rule)
        shared = {"split": context.split, "documents": context.corpus.eval_documents}
        return [shared | {"unit": lengths[-1], "length": length} for length in lengths]

    def measure(self, context: EvalContext, question: Row) -> Row:
        length, unit, count = question["length"], question["unit"], self.depths * self.repeats
        text = evaluation_text(context.store, unit, count, question["documents"])
        check_length(context.model, length)
        keys = self._keys()
        if length < (least := self._least_length(context, keys)):  # of the lengths by default
            raise NotApplicableError(f"{self.states} and the question take {least} tokens")
        encode = context.corpus.tokenizer.encode
        made = self._prompts(context, text, keys, length)
        prompts = [prompt for prompt, _ in made]
        rows, held = max(1, chunk_tokens(context, BATCH_TOKENS) // length), length
        if context.compress:
            shortened = (
                context.compress(one[:-size].tolist(), one[-size:].tolist()) for one, size in made
            )
            prompts = [begun(np.array(one), context.bos) for one in shortened]
            rows = 1  # their lengths differ
            held = max(map(len, prompts)) + DIGITS
        context.progress.begin(f"{self.name} at {length}", len(prompts) * length)
        right = []
        with context.arithmetic():
            for first in range(0, len(prompts), rows):
                batch = slice(first, first + rows)
                answers = [[tokens(name, encode) for name in names] for names in keys[batch]]
                right.append(_answer(context, np.stack(prompts[batch]), answers, self.chunk))
            state_bytes = context.model.state_bytes(held)
        chosen, written = np.concatenate(right).reshape(-1, self.depths, 2).sum(0).T  # by depth
        return {
            "accuracy": chosen.sum() / count,
            "interval": wilson(chosen.sum(), count),
            "chance": 1 / self.candidates,
            "correct": int(chosen.sum()),
            "correct_by_depth": chosen.tolist(),
            "exact": written.sum() / count,
            "exact_interval": wilson(written.sum(), count),
            "exact_chance": 10.0**-DIGITS,
            "exact_correct": int(written.sum()),
            "exact_by_depth": written.tolist(),
            "count": count,
            "digits": DIGITS,
            "state_bytes": state_bytes,
            **context.prompt_row([len(one) for one in prompts]),
        }

    def _least_length(self, context: EvalContext, keys: Sequence[Sequence[str]]) -> int:
        """The least tokens, the key's digits included, that every prompt has room in."""
        encode = context.corpus.tokenizer.encode
        stated = max(self._least(names, encode) for names in keys)
        return stated + DIGITS + (context.bos is not None)

    def _keys(self) -> list[list[str]]:
        """The key of each prompt, with other ones behind it."""
        count = self.depths * self.repeats
        return [_distinct_keys(self.seed, index, self.candidates) for index in range(count)]

    def _least(self, keys: Sequence[str], encode: Encode) -> int:
        """The least tokens of a prompt with these keys, the right one first."""
        return prompt_tokens(keys[0], encode)

    def _prompt(
        self, filler: Int[np.ndarray, " t"], index: int, keys: Sequence[str], encode: Encode
    ) -> tuple[Int[np.ndarray, " t"], int]:
        """A prompt that states the first of the keys, and the tokens of its question."""
        depth = np.linspace(0, 1, self.depths)[index % self.depths]
        prompt = passkey_prompt(filler, keys[0], depth, encode)
        return prompt, len(tokens(QUESTION, encode))

    def _prompts(
        self,
        context: EvalContext,
        text: Int[np.ndarray, "units t"],
        keys: Sequence[Sequence[str]],
        length: int,
    ) -> list[tuple[Int[np.ndarray, " t"], int]]:
        """The prompts of one length, without the key's digits at the end, each with the tokens of
        its question."""
        encode = context.corpus.tokenizer.encode
        start = np.array([] if context.bos is None else [context.bos], np.int64)
        prompts = []
        for i, names in enumerate(keys):
            filler = text[i // self.depths % len(text)][-(length - DIGITS) :]
            prompt, question = self._prompt(filler[len(start) :], i, names, encode)
            prompts.append((np.append(start, prompt), question))
        return prompts


def _distinct_keys(seed: int, index: int, count: int) -> list[str]:
    """The key of a prompt, then other ones."""
    generator = np.random.default_rng([seed, index])
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[random_key(generator)] = None
    return list(keys)


def _answer(
    context: EvalContext,
    prompts: Int[np.ndarray, "b t"],
    answers: Sequence[Sequence[Int[np.ndarray, " k"]]],
    chunk: int,
) -> Bool[np.ndarray, "b 2"]:
    """Whether each prompt's first answer is the likeliest, and is what greedy decoding writes."""
    check_split(context, prompts.shape[1])
    longest = max(len(answer) for several in answers for answer in several)
    padded = np.full((len(answers), len(answers[0]), longest), PAD)
    for row, several in enumerate(answers):
        if len({tuple(answer) for answer in several}) < len(several):
            rule = "cannot be measured, as the run's tokeniser writes different keys alike"
            refuse("task", "passkey", rule, "Measure another task")
        for column, answer in enumerate(several):
            padded[row, column, : len(answer)] = answer
    text = torch.from_numpy(prompts)
    right = add_up(context, answered, text, torch.from_numpy(padded), chunk)
    if context.ranks.size > 1:
        context.progress.advance(text.numel())
    return finite(right) > 0


def answered(
    context: EvalContext,
    prompts: Int[Tensor, "b t"],
    padded: Int[Tensor, "b candidates k"],
    chunk: int,
) -> Float[Tensor, "b 2"]:
    """1 where each prompt's first answer is the likeliest, and where it is what greedy decoding
    writes; nan where outputs are not finite, 0 in a process that does not read a prompt's end."""
    model, wanted = context.model, padded.to(context.device)
    read = read_prompt(context, prompts, chunk)
    if read is None:
        return torch.zeros(len(prompts), 2, device=context.device)
    x, state = read
    check_state(model, state, len(prompts))
    last, longest = model.head(x), wanted.shape[2]
    costs = []
    for answer in wanted.unbind(1):
        logits = last
        if longest > 1:
            logits = torch.cat([last, model(answer[:, :-1].clamp(min=0), state)[0]], 1)
        costs.append(nats(logits, answer.clamp(min=0)).masked_fill(answer == PAD, 0).sum(1))
    first, *others = costs
    written = [last.argmax(-1)]
    for _ in range(longest - 1):
        logits, state = model(written[-1], state)
        written.append(logits[:, -1:].argmax(-1))
    same = (torch.cat(written, 1) == wanted[:, 0]) | (wanted[:, 0] == PAD)
    right = torch.stack([first < torch.stack(others).amin(0), same.all(1)], 1).float()
    return right if torch.isfinite(torch.stack(costs)).all() else right.fill_(torch.nan)
