"""The base of every task: its settings, its questions, how it answers, what it declares.

A task is a dataclass of its settings in a module of its name, `zoo/tasks/<name>.py`, and a YAML
file that sets them, `configs/task/<name>.yaml`. The driver (zoo.tasks.evaluate) gets its
`questions`, leaves out those that the run's results already answer, and writes a row for each of
the others. Reports draw the row from the task's `declares`, and know no task by name.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

from zoo.config.introspect import check_types, is_target
from zoo.errors import UserError, below
from zoo.measurement import Declaration, Quantity
from zoo.model.backbone import Backbone
from zoo.tasks.context import EvalContext, Outcome, Row, check_length, run_guarded

# The bytes that a model keeps of what it has read: a cost that several tasks see.
STATE = Quantity(
    field="state_bytes", name="state kept between chunks", better="lower", form="bytes", cost=True
)
# What a model computes before it answers: to shorten the prompt, where it is, and to read it.
PROMPT_FLOPS = Quantity(
    field="prompt_flops",
    name="operations per prompt, those of its compression included",
    better="lower",
    unit="FLOPs",
    cost=True,
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A measurement of trained models; a subclass adds its settings as fields with annotations.

    Raises UserError for a setting outside the values that its annotation allows.
    """

    declares: ClassVar[Declaration]
    # What it measures a model on, that of its training: text, examples of a task, or any.
    reads: ClassVar[str] = "text"
    # Whether a model can be measured that reads both ways, of objective=masked.
    both_ways: ClassVar[bool] = False
    # Whether `measure` reads what EvalContext.compress leaves of its prompts.
    compresses: ClassVar[bool] = False
    # Whether a question ends those prompts.
    has_question: ClassVar[bool] = False
    # Whether several processes may read its texts together, EvalContext.ranks.
    reads_together: ClassVar[bool] = False
    # Whether it searches for other rotary frequencies of the model as it was trained.
    rescales: ClassVar[bool] = False
    # Settings that do not change an answer: which questions there are, and how a text is cut.
    unidentifying: ClassVar[tuple[str, ...]] = ("lengths", "chunk")

    def __post_init__(self) -> None:
        target = f"{type(self).__module__}.{type(self).__qualname__}"
        if is_target(target):
            try:
                check_types(target, {each.name: getattr(self, each.name) for each in fields(self)})
            except UserError as error:
                raise below(f"task.{self.name}", error) from None

    @property
    def name(self) -> str:
        """The module's name, which is that of its YAML file and of its options."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def settings(self) -> Row:
        """The settings that identify a measurement, by the names of their options."""
        names = [one.name for one in fields(self) if one.name not in self.unidentifying]
        return {f"task.{self.name}.{name}": getattr(self, name) for name in names}

    def check(self) -> None:
        """Refuse settings that cannot be measured, whatever the model; called before one is opened.

        Raises UserError.
        """

    def check_model(self, model: Backbone) -> None:
        """Raise NotApplicableError where no question can be answered of a model, whatever its
        weights and the text are: it is called before these are read, and has no weights."""
        if lengths := getattr(self, "lengths", None):
            check_length(model, min(lengths))

    def questions(self, context: EvalContext) -> Iterable[Row]:
        """The fields that distinguish each measurement from others, such as {"length": 512}."""
        raise NotImplementedError

    def still_valid(self, context: EvalContext) -> bool:
        """Whether earlier answers may be reused: False where files that they left are gone."""
        return True

    def measure(self, context: EvalContext, question: Row) -> Row:
        """Answer one question: the fields of the row that hold what came out.

        Raises NotApplicableError where the question has no meaning for the model.
        """
        raise NotImplementedError

    def answers(self, context: EvalContext, wanted: Sequence[Row]) -> Iterator[tuple[Row, Outcome]]:
        """Answer the questions one after another; a task that reads a text once for several
        overrides this."""
        for question in wanted:
            yield question, run_guarded(partial(self.measure, context, question))

    def rows(self, context: EvalContext, wanted: Sequence[Row] | None = None) -> Iterator[Row]:
        """One row for each question, by default for all: the question and what came out."""
        wanted = [*self.questions(context)] if wanted is None else wanted
        for question, outcome in self.answers(context, wanted):
            yield question | outcome.row | (outcome.value or {})


def lengths_of(
    given: Sequence[int] | None, context: EvalContext, multiples: Sequence[int]
) -> list[int]:
    """The test lengths, shortest first, each once; by default multiples of the training length."""
    return sorted({*(given or (times * context.train_length for times in multiples))})
