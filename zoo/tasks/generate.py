"""Writes on from a prompt, and times it: what a model says, and what a token costs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated, ClassVar

from zoo.config.domains import Count, Range, Seed
from zoo.errors import UserError, below
from zoo.measurement import Declaration, Quantity
from zoo.model.generation import Sampling, Writer, write_text
from zoo.tasks.context import EvalContext, NotApplicableError, Row
from zoo.tasks.task import PROMPT_FLOPS, Task


@dataclass(frozen=True, kw_only=True)
class Generate(Task):
    """One row: the text that follows `prompt`, and tokens per second while it was written.

    Writing ends after `tokens` tokens, at the end of a document or before one of the `stop` texts.
    An empty prompt begins a document. `temperature`, `top_p` and `seed` are those of
    `zoo.model.generation.Sampling`. The first token is not timed: it comes with the prompt's.
    """

    declares = Declaration(
        title="Text written",
        about="The model writes on from a prompt, one token after another, from the state that the "
        "text before left.",
        text="text",
        quantities=(
            Quantity(field="tokens", name="tokens written", better=None),
            Quantity(
                field="tokens_per_second",
                name="writing",
                better="higher",
                unit="tokens per second",
            ),
            Quantity(
                field="prompt_tokens_per_second",
                name="reading the prompt",
                better="higher",
                unit="tokens per second",
            ),
            Quantity(field="state_bytes", name="state in the end", better="lower", form="bytes"),
            PROMPT_FLOPS,
        ),
    )
    compresses: ClassVar[bool] = True
    prompt: str = ""
    tokens: Count = 128
    temperature: Annotated[float, Range(0, 1000)] = 0.0
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    seed: Seed = 0
    stop: Sequence[str] | None = None

    @property
    def sampling(self) -> Sampling:
        """How a token is chosen. UserError for settings that do not go together."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    def check(self) -> None:
        try:
            _ = self.sampling
        except UserError as error:
            raise below("task.generate", error) from None
        if "" in (self.stop or ()):
            raise UserError("task.generate.stop=: must not be empty.")

    def questions(self, context: EvalContext) -> list[Row]:
        return [{}]  # the settings say it all

    def measure(self, context: EvalContext, question: Row) -> Row:
        tokenizer, writer = context.corpus.tokenizer, Writer(context.model, context.precision)
        given = self._prompt(context)
        try:
            start = [] if tokenizer.bos is None else [tokenizer.bos]
            writer.read([*start, *given] or [tokenizer.end])
            writer.check_length(self.tokens)
        except UserError as error:
            raise NotApplicableError(str(below("task.generate", error))) from None
        prompt = writer.tokens
        context.progress.begin("writing", prompt + self.tokens)
        began = perf_counter()
        writer.next_logits()
        first = perf_counter()
        context.progress.advance(prompt)

        text, stop = "", self.stop or ()
        for piece in write_text(writer, tokenizer, self.tokens, self.sampling, stop):
            text += piece
            context.progress.advance(1)
        steps, seconds = writer.state.tokens_seen - prompt, perf_counter() - first
        return {
            "text": text,
            "prompt_tokens": prompt,
            "tokens": writer.written,
            "prompt_tokens_per_second": prompt / (first - began),
            "tokens_per_second": steps / seconds if steps else None,
            "state_bytes": writer.state_bytes,
            **context.prompt_row([prompt]),
        }

    def _prompt(self, context: EvalContext) -> list[int]:
        """The tokens of the prompt, or what is left of them."""
        try:
            given = context.corpus.tokenizer.tokens(self.prompt)
        except UserError as error:
            raise NotApplicableError(str(below("task.generate", error))) from None
        return context.compress(given) if context.compress and given else given
