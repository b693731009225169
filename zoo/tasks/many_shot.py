"""Recall from many demonstrations: does a model use more of them than its window holds?

Demonstrations are items with their labels (zoo.data.demonstrations), a question one of the items.
`window` tokens hold whole demonstrations, behind the token that begins a text where the model was
trained with one. A prompt of n windows has n times as many, the first of a list that fills the most
windows; questions are of the whole list, so that what a prompt does not show can only be guessed.
All models, extensions and numbers of windows get the same demonstrations and questions.

Under extension=pcw or structured the windows are read side by side, each with a beginning token of
its own, and the question behind them (Ratner 2023, section 3, arXiv 2212.10947; Hao 2022, section
3, arXiv 2212.06713). Otherwise the demonstrations follow each other. What acts across tokens
without being attention, such as a convolution or a recurrence, reads windows one behind another.

The answer is the label of highest likelihood among all. Text is for models that have learned to
recall, such as checkpoints; a tiny model learns it of symbols: train with data=recall and as many
data.task.keys as the windows hold, or with data=mqar.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import numpy as np

from zoo.attention.parallel_windows import ParallelWindows
from zoo.config.domains import Count, Range, Seed, Several
from zoo.data.demonstrations import Demonstration, Demonstrations, lines, symbols
from zoo.data.examples import SyntheticData
from zoo.errors import UserError, below, refuse, sentence
from zoo.measurement import Declaration, Quantity
from zoo.model.extend import position_schemes
from zoo.model.scoring import likelihoods
from zoo.report.statistics import wilson
from zoo.tasks.context import EvalContext, NotApplicableError, Row, check_length
from zoo.tasks.memory import check_memory
from zoo.tasks.task import STATE, Task

Window = list[Demonstration]
TOKEN_BYTES = 24  # of the prompt before each answer, which lists of tokens hold


class Draw(NamedTuple):
    """Demonstrations by windows, and the questions: one of them each."""

    windows: list[Window]
    labels: list[list[int]]
    questions: list[Demonstration]


@dataclass(frozen=True, kw_only=True)
class ManyShot(Task):
    """One row per number of windows; its length is as many times the training length.

    `draws` lists of demonstrations are read, with `questions_each` questions behind each.
    """

    declares = Declaration(
        title="Many-shot recall",
        about="Items with their labels are shown, as many as a number of windows hold, and one of "
        "all the items is to be labelled, with the same items for every model. The length is the "
        "number of windows times the training length.",
        quantities=(
            Quantity(
                field="accuracy",
                name="labels found",
                better="higher",
                form="share",
                interval="interval",
                chance="chance",
            ),
            STATE,
        ),
    )
    unidentifying = ("windows", "batch")
    reads: ClassVar[str] = "any"
    windows: Annotated[Sequence[Annotated[int, Range(1, 1024)]], Several] = (1, 2, 4)
    window: Count | None = None
    draws: Annotated[int, Range(1, 1024)] = 8
    questions_each: Annotated[int, Range(1, 1024)] = 32
    labels: Annotated[int, Range(2, 26)] | None = None
    seed: Seed = 0
    batch: Count = 64

    def questions(self, context: EvalContext) -> list[Row]:
        """One for each number of windows.

        Raises:
            NotApplicableError: the model is an encoder, or its data has no keys.
            UserError: a window and a question are longer than the training length, there are too
                few items, or the extension has fewer or smaller windows.
        """
        shared = {"most": max(self.windows), "window": self._window(context)}
        drawn = self._draw(context, 0, **shared)
        longest = max(len(one.question) for window in drawn.windows for one in window)
        room = context.train_length - longest - max(map(len, drawn.labels))
        if shared["window"] > room:
            rule = f"must be at most {room}, so that a question fits into the training length"
            refuse("task.many_shot.window", shared["window"], rule)
        with _side_by_side(context, drawn.windows):
            pass  # refused where the extension has not so many
        answers = self.questions_each * len(drawn.labels)
        held = TOKEN_BYTES * answers * shared["most"] * shared["window"]
        check_memory(f"task.many_shot.windows={shared['most']}", held, f"{answers} answers")
        return [
            {**shared, "windows": number, "length": number * context.train_length}
            for number in sorted({*self.windows})
        ]

    def measure(self, context: EvalContext, question: Row) -> Row:
        number, most, window = (question[name] for name in ("windows", "most", "window"))
        count = self.draws * self.questions_each
        context.progress.begin(f"many-shot, {number} windows", count, "questions")
        right, shown, prompts, held, labels = 0, 0, [], [], []
        for place in range(self.draws):
            draw = self._draw(context, place, most=most, window=window)
            read, labels = draw.windows[:number], draw.labels
            with _side_by_side(context, read) as parallel:
                prompts.append(_prompt(context.bos, read, parallel))
                check_length(context.model, len(prompts[-1]) + context.train_length - window)
                chosen = _answers(context, prompts[-1], draw, self.batch)
                held.append(context.model.state_bytes(len(prompts[-1])))
            within = {tuple(one.question) for part in read for one in part}
            shown += sum(tuple(one.question) in within for one in draw.questions)
            pairs = zip(chosen, draw.questions, strict=True)
            right += sum(answer == one.label for answer, one in pairs)
            context.progress.advance(self.questions_each)
        return {
            "accuracy": right / count,
            "interval": wilson(right, count),
            "chance": 1 / len(labels),
            "correct": right,
            "count": count,
            "shown": shown,  # questions whose item the prompt has
            "prompt_tokens": max(map(len, prompts)),
            "state_bytes": max(held),
        }

    def _window(self, context: EvalContext) -> int:
        return 3 * context.train_length // 4 if self.window is None else self.window

    def _draw(self, context: EvalContext, place: int, *, most: int, window: int) -> Draw:
        """The demonstrations of one list and its questions, the same for every model."""
        found = self._source(context, np.random.default_rng([self.seed, place, 0]))
        begin, windows, one = len(_start(context.bos)), [], next(found.drawn)
        while len(windows) < most:
            own, left = [], window - begin
            while one is not None and len(one.shown) <= left:
                own.append(one)
                left -= len(one.shown)
                one = next(found.drawn, None)
            if one is None and (not own or len(windows) + 1 < most):
                rule = f"hold more demonstrations than there are items ({found.items})"
                advice = f"Use fewer or smaller windows, or data={context.data.name} of more keys"
                refuse("task.many_shot.windows", [*self.windows], rule, advice)
            if one is not None and not own:
                least = begin + len(one.shown)
                rule = f"must be at least {least}, the tokens of a demonstration"
                refuse("task.many_shot.window", window, rule)
            windows.append(own)
        every = [one for own in windows for one in own]
        generator = np.random.default_rng([self.seed, place, 1])
        chosen = generator.integers(len(every), size=self.questions_each).tolist()
        return Draw(windows, found.labels, [every[number] for number in chosen])

    def _source(self, context: EvalContext, generator: np.random.Generator) -> Demonstrations:
        data = context.data
        if not isinstance(data, SyntheticData):
            return lines(data.tokenizer, self.labels or 8, generator)
        if self.labels is not None:
            rule = f"the labels of data={data.name} are its values"
            refuse("task.many_shot.labels", self.labels, rule, "Leave it out")
        if (found := symbols(data, generator)) is None:
            rule = "has no keys with values"
            advice = "Use a run of data=recall or data=mqar, or of text"
            raise NotApplicableError(sentence(f"data={data.name}", rule, advice))
        return found


@contextmanager
def _side_by_side(context: EvalContext, windows: Sequence[Window]) -> Iterator[bool]:
    """Let an extension with parallel windows read these; whether there is one."""
    start = len(_start(context.bos))
    sizes = [start + sum(len(one.shown) for one in window) for window in windows]
    before = {
        scheme: scheme.pattern
        for scheme in position_schemes(context.model)
        if isinstance(scheme.pattern, ParallelWindows)
    }
    if before and context.model.sink is not None:
        sizes[0] += 1  # the model's own token before every text
    try:
        now = {scheme: one.arranged(sizes, begun=bool(start)) for scheme, one in before.items()}
    except UserError as error:
        raise below("extension.attention", error) from None
    try:
        for scheme, pattern in now.items():
            scheme.pattern = pattern
        yield bool(before)
    finally:
        for scheme, pattern in before.items():
            scheme.pattern = pattern


def _start(bos: int | None) -> list[int]:
    return [] if bos is None else [bos]


def _prompt(bos: int | None, windows: Sequence[Window], parallel: bool) -> list[int]:
    """The tokens of the demonstrations, with a beginning token for each window or for them all."""
    parts = [[token for one in window for token in one.shown] for window in windows]
    starts = [_start(bos if parallel or not place else None) for place in range(len(parts))]
    pairs = zip(starts, parts, strict=True)
    return [token for start, part in pairs for token in (*start, *part)]


def _answers(context: EvalContext, prompt: Sequence[int], draw: Draw, rows: int) -> list[int]:
    """The label of highest likelihood for each question behind a prompt."""
    pairs = [([*prompt, *one.question], label) for one in draw.questions for label in draw.labels]
    found = likelihoods(context.model, pairs, rows=rows, precision=context.precision)
    nats = np.array([one.nats for one in found]).reshape(len(draw.questions), -1)
    if not np.isfinite(nats).all():
        raise ArithmeticError("the model's outputs are not finite numbers")
    return nats.argmax(1).tolist()
