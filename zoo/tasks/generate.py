"""Writes on from a prompt, and times it: what a model says, and what a token costs it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Annotated, ClassVar

from zoo.compression.compressor import CompressionError
from zoo.config.domains import Count, Range, Seed
from zoo.errors import UserError, below, refuse
from zoo.measurement import Declaration, Quantity
from zoo.model.generation import Sampling, Writer, write_text
from zoo.model.scoring import write_texts
from zoo.tasks.context import EvalContext, NotApplicableError, Outcome, Row, run_guarded
from zoo.tasks.task import PROMPT_FLOPS, Task

ROWS = 8  # texts that are written at once


@dataclass(frozen=True, kw_only=True)
class Generate(Task):
    """A row for each prompt: the text that follows it, and tokens per second while it was written.

    Writing ends after `tokens` tokens, at the end of a document or before one of the `stop` texts.
    An empty prompt begins a document. `temperature`, `top_p` and `seed` are those of
    `zoo.model.generation.Sampling`. The first token is not timed: it comes with the prompt's.
    Several prompts are written on from together (`zoo.model.scoring.write_many`), each as it would
    be alone, and are not timed.
    """

    declares = Declaration(
        title="Text written",
        about="The model writes on from a prompt, one token after another, from the state that the "
        "text before left.",
        text="text",
        prompt="prompt",
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
    unidentifying = ("prompt",)  # each row has its own
    prompt: str | Sequence[str] = ""
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
        if not isinstance(self.prompt, str):
            if not self.prompt or "" in self.prompt:
                rule = "must be one prompt, or a list of prompts that are not empty"
                refuse("task.generate.prompt", self.prompt, rule)
            if len({*self.prompt}) < len(self.prompt):
                rule = "names a prompt twice"
                refuse("task.generate.prompt", self.prompt, rule, "Give each prompt once")

    @property
    def prompts(self) -> list[str]:
        """The prompts, of which there may be one."""
        return [self.prompt] if isinstance(self.prompt, str) else [*self.prompt]

    def questions(self, context: EvalContext) -> list[Row]:
        return [{"prompt": prompt, "prompts": len(self.prompts)} for prompt in self.prompts]

    def answers(self, context: EvalContext, wanted: Sequence[Row]) -> Iterator[tuple[Row, Outcome]]:
        """One prompt is timed; of several all texts are written together."""
        if len(self.prompts) == 1:
            yield from super().answers(context, wanted)
            return
        begun = [run_guarded(partial(self._begun, context, one["prompt"])) for one in wanted]
        ready = [outcome.value for outcome in begun if outcome.ok]
        context.progress.begin("writing", len(ready), "texts")
        whole = run_guarded(lambda: self._written(context, [writer for writer, _ in ready]))
        found = iter(whole.value or ())
        for question, outcome in zip(wanted, begun, strict=True):
            if outcome.ok:
                _, cost = outcome.value
                value = {**next(found), **cost} if whole.ok else None
                yield question, Outcome(value, whole.row)
            else:
                yield question, outcome

    def _written(self, context: EvalContext, writers: Sequence[Writer]) -> list[Row]:
        """What follows several prompts, without times."""
        texts = write_texts(
            context.model,
            context.corpus.tokenizer,
            [writer.unread for writer in writers],
            tokens=self.tokens,
            sampling=self.sampling,
            stop=self.stop or (),
            rows=ROWS,
            precision=context.precision,
        )
        context.progress.advance(len(texts))
        return [
            {
                "text": one.text,
                "prompt_tokens": writer.tokens,
                "tokens": one.tokens,
                "prompt_tokens_per_second": None,
                "tokens_per_second": None,
                "state_bytes": context.model.state_bytes(writer.tokens + one.read),
            }
            for writer, one in zip(writers, texts, strict=True)
        ]

    def measure(self, context: EvalContext, question: Row) -> Row:
        tokenizer = context.corpus.tokenizer
        writer, cost = self._begun(context, question["prompt"])
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
            **cost,
        }

    def _begun(self, context: EvalContext, prompt: str) -> tuple[Writer, Row]:
        """A text that begins with a prompt, or with what is left of it; and what a row says of
        reading it."""
        tokenizer, writer = context.corpus.tokenizer, Writer(context.model, context.precision)
        try:
            given = tokenizer.tokens(prompt)
            given = context.compress(given) if context.compress and given else given
            start = [] if tokenizer.bos is None else [tokenizer.bos]
            writer.read([*start, *given] or [tokenizer.end])
            cost = context.prompt_row([writer.tokens])  # also of one that fails: not the next one's
            writer.check_length(self.tokens)
        except CompressionError:
            raise
        except UserError as error:
            raise NotApplicableError(str(below("task.generate", error))) from None
        return writer, cost
