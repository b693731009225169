"""Accuracy of a synthetic task by length: the share of labels that are the likeliest symbol.

The rows are drawn from the task's own test examples, the same for every model; trained on short
ones, a model is measured on long ones. Labels of one row depend on each other, so that the interval
counts rows, not labels: Wilson's, as if each row were one question. Beside chance a row has what
the best rule without any association scores on these rows (zoo.data.guesses).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int

from zoo.config.domains import Count, Lengths, Seed
from zoo.data.guesses import best_guess
from zoo.data.synthetic import NO_LABEL
from zoo.errors import UserError
from zoo.measurement import Declaration, Quantity
from zoo.report.statistics import wilson
from zoo.tasks.context import EvalContext, Row, check_length, check_state, chunk_tokens
from zoo.tasks.memory import check_memory
from zoo.tasks.task import STATE, Task, lengths_of

TIMES = (1, 2, 4, 8, 16)  # the training length
BATCH_TOKENS = 2**16  # short rows are read together, up to so many tokens
TOKEN_BYTES = 32  # of an example: its token, label and prediction in int64, and what is compared
QUARTERS = 4


@dataclass(frozen=True, kw_only=True)
class Accuracy(Task):
    """One row per length: accuracy over all labels, and in each quarter of the positions.

    Each length reads `examples` examples, drawn from `seed`, `chunk` tokens at a time.
    """

    declares = Declaration(
        title="Accuracy",
        about="The share of labels that the model finds likeliest, on examples of the task that "
        "it was trained on. Models are trained on short examples and tested on longer ones.",
        quantities=(
            Quantity(
                field="accuracy",
                name="accuracy",
                better="higher",
                form="share",
                interval="interval",
                chance="chance",
                guess="guess",
            ),
            STATE,
        ),
    )
    reads: ClassVar[str] = "examples"
    lengths: Lengths | None = None
    examples: Count = 128
    seed: Seed = 0
    chunk: Count = 4096

    def check(self) -> None:
        longest = max(self.lengths or [0])
        option = f"task.accuracy.lengths={longest}"
        check_memory(option, self.examples * longest * TOKEN_BYTES, f"{self.examples} examples")

    def questions(self, context: EvalContext) -> list[Row]:
        lengths = lengths_of(self.lengths, context, TIMES)
        return [{"split": context.split, "length": length} for length in lengths]

    def measure(self, context: EvalContext, question: Row) -> Row:
        length, rows = question["length"], self.examples
        check_length(context.model, length)
        drawn = context.examples.examples(context.split, self.seed, 0, rows, length)
        labelled = drawn.labels != NO_LABEL
        if not labelled.any():
            raise UserError(
                f"task.accuracy.examples={rows}: none has a label at length {length}. Use more."
            )
        at_once = max(1, BATCH_TOKENS // length)
        context.progress.begin(f"accuracy at {length}", rows * length)
        with context.arithmetic():
            found = [
                _likeliest(context, drawn.tokens[first : first + at_once], self.chunk)
                for first in range(0, rows, at_once)
            ]
            state_bytes = context.model.state_bytes(length)
        right = (np.concatenate(found) == drawn.labels) & labelled
        accuracy = right.sum() / labelled.sum()
        return {
            "accuracy": float(accuracy),
            "interval": wilson(round(accuracy * rows), rows),
            "chance": 1 / drawn.answers,
            "guess": best_guess(drawn),
            "correct": int(right.sum()),
            "count": int(labelled.sum()),
            "accuracy_by_quarter": _by_quarter(right, labelled),
            "state_bytes": state_bytes,
        }


def _likeliest(
    context: EvalContext, tokens: Int[np.ndarray, "b t"], chunk: int
) -> Int[np.ndarray, "b t"]:
    """The symbol that the model finds likeliest at each position, read `chunk` tokens at a time."""
    model, parts = context.model, []
    text = torch.from_numpy(tokens)
    state = model.empty_state(len(text))
    for piece in text.split(chunk_tokens(context, chunk), 1):
        logits, state = model(piece.to(context.device), state)
        if not torch.isfinite(logits).all():
            raise ArithmeticError("the model's outputs are not finite numbers")
        parts.append(logits.argmax(-1).cpu().numpy())
        context.progress.advance(piece.numel())
    check_state(model, state, len(text))
    return np.concatenate(parts, 1)


def _by_quarter(
    right: Bool[np.ndarray, "b t"], labelled: Bool[np.ndarray, "b t"]
) -> list[float | None]:
    """Accuracy in each quarter of the positions; None where there are no labels."""
    quarters = zip(
        *(np.array_split(part.sum(0), QUARTERS) for part in (right, labelled)), strict=True
    )
    return [float(r.sum() / all_.sum()) if all_.sum() else None for r, all_ in quarters]
