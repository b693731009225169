"""Tasks of lm-evaluation-harness, by the harness itself (zoo.model.lm_harness)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from zoo.config.domains import Count, Range
from zoo.errors import refuse, refuse_path
from zoo.measurement import Declaration, Quantity
from zoo.model.language_model import LanguageModel
from zoo.model.lm_harness import harness_model, imported
from zoo.tasks.context import EvalContext, Row
from zoo.tasks.task import Task


class _OfHarness(Declaration):
    """Which quantities a row has is known from the row: the harness's tasks have their own, of
    which `score` is the first."""

    def plain(self, row: Mapping[str, Any]) -> dict[str, Any]:
        where = {"subtask": row["subtask"]} if "subtask" in row else {}
        mine = tuple(
            Quantity(
                field=f"scores.{name}",
                name=f"{row['subtask']}, {name}",
                better=_direction(row["higher_is_better"].get(name.partition(" (")[0])),
                where=where,
            )
            for name in row.get("measures", ())
        )
        return Declaration(title=self.title, about=self.about, quantities=mine).plain(row)


def _direction(higher: bool | None) -> Any:
    return None if higher is None else "higher" if higher else "lower"


@dataclass(frozen=True, kw_only=True)
class Harness(Task):
    """One row for each of the harness's `tasks`, which may be groups, with its measures.

    `include` is a folder of further task files. `shots` examples precede each question, and
    each task has `limit` questions. Contexts are cut on the left to `max_length` tokens with what
    follows them. Nothing is fetched unless a task names a data set of the hub.
    """

    declares = _OfHarness(
        title="lm-evaluation-harness",
        about="Tasks of lm-evaluation-harness: its questions, and how it counts.",
        quantities=(Quantity(field="score", name="score", better=None),),
    )
    unidentifying = ("tasks", "include", "batch", "max_length")  # a question has its own
    tasks: Sequence[str] | None = None
    include: str | None = None
    shots: Annotated[int, Range(0, 1024)] | None = None
    limit: Count | None = None
    max_length: Count | None = None
    batch: Count = 8

    def check(self) -> None:
        if not self.tasks:
            rule = "must name tasks of lm-evaluation-harness: [hellaswag,lambada_openai]"
            refuse("task.harness.tasks", self.tasks, rule)
        manager = self._manager()
        for name in self.tasks:
            if name not in manager.all_tasks:
                advice = "Name another, or their folder: task.harness.include=<folder>"
                refuse("task.harness.tasks", name, "is no task of the harness", advice)

    def questions(self, context: EvalContext) -> list[Row]:
        _ = context.corpus  # a text is needed for its tokenizer
        length = self.max_length or context.train_length
        return [{"subtask": name, "length": length} for name in self.tasks or ()]

    def measure(self, context: EvalContext, question: Row) -> Row:
        model = LanguageModel(
            backbone=context.model,
            tokenizer=context.corpus.tokenizer,
            train_length=context.train_length,
            precision=context.precision,
        )
        name, evaluate = question["subtask"], imported().simple_evaluate
        found = evaluate(
            model=harness_model(model, rows=self.batch, max_length=question["length"]),
            tasks=[name],
            task_manager=self._manager(),
            num_fewshot=self.shots,
            limit=self.limit,
            log_samples=False,
        )
        return _row(name, found)

    def _manager(self) -> Any:
        try:
            return imported(".tasks").TaskManager(include_path=self.include)
        except (OSError, ValueError) as error:
            line = (str(error).splitlines() or [""])[0]
            refuse_path(f"task.harness.include={self.include}", line, "Name another folder")


def _row(name: str, found: Mapping[str, Any]) -> Row:
    """A row's fields of what the harness returned for a task or a group."""
    results = {**found["results"], **found.get("groups", {})}[name]
    values = {
        _measure(key): value
        for key, value in results.items()
        if "," in key and isinstance(value, int | float) and not isinstance(value, bool)
    }
    errors = {key: value for key, value in values.items() if "_stderr" in key}
    scores = {key: value for key, value in values.items() if key not in errors}
    worst = [score for score in scores.values() if not math.isfinite(score)]
    first = (worst or [*scores.values()])[:1]  # one that is no number fails the row
    return {
        **({"score": float(first[0])} if first else {}),
        **{f"scores.{key}": float(value) for key, value in scores.items()},
        "measures": [*scores],
        "standard_errors": errors,
        "higher_is_better": found.get("higher_is_better", {}).get(name, {}),
        "versions": found.get("versions", {}),
        "shots": found.get("n-shot", {}).get(name),
        "count": found.get("n-samples", {}).get(name, {}).get("effective"),
    }


def _measure(key: str) -> str:
    """`acc` of "acc,none", `exact_match (strict)` of "exact_match,strict"."""
    name, _, how = key.partition(",")
    return name if how == "none" else f"{name} ({how})"
