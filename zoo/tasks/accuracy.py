"""Accuracy of a synthetic task by length: the share of labels that are the likeliest symbol.

The rows are drawn from the task's own test examples, the same for every model; trained on short
ones, a model is measured on long ones. Labels of one row depend on each other, so that the interval
counts rows, not labels: Wilson's, as if each row were one question.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Int

from zoo.data.synthetic import NO_LABEL
from zoo.errors import UserError
from zoo.report.rows import wilson
from zoo.tasks.context import (
    EvalContext,
    Row,
    check_counts,
    check_length,
    check_lengths,
    check_state,
    chunk_tokens,
    run_guarded,
)

TIMES = (1, 2, 4, 8, 16)  # the training length
BATCH_TOKENS = 2**16  # short rows are read together, up to so many tokens
QUARTERS = 4


def measure(
    context: EvalContext,
    *,
    lengths: Sequence[int] | None = None,
    examples: int = 128,
    seed: int = 0,
    chunk: int = 4096,
) -> Iterator[Row]:
    """One row per length: accuracy over all labels, and over those in each quarter of the places.

    `lengths` are 1, 2 .. 16 times the training length unless given; each reads that many
    `examples`, drawn from `seed`, `chunk` tokens at a time.
    """
    lengths = [*(lengths or (times * context.train_length for times in TIMES))]
    lengths = check_lengths("accuracy", lengths)
    check_counts("accuracy", examples=examples, chunk=chunk)
    check_counts("accuracy", seed=seed, least=0, most=2**63)
    for length in lengths:
        key = {"split": context.split, "length": length, "examples": examples, "example_seed": seed}
        if not context.measured(key):
            outcome = run_guarded(partial(_read, context, length, examples, seed, chunk))
            yield key | outcome.row | (outcome.value or {})


def _read(context: EvalContext, length: int, rows: int, seed: int, chunk: int) -> Row:
    """The figures of one length."""
    check_length(context.model, length)
    drawn = context.examples.examples(context.split, seed, 0, rows, length)
    asked = drawn.labels != NO_LABEL
    if not asked.any():
        raise UserError(
            f"task.accuracy.examples={rows}: none of them has a label at length {length}. Use more."
        )
    at_once = max(1, BATCH_TOKENS // length)
    context.progress.begin(f"accuracy at {length}", rows * length)
    with context.arithmetic():
        found = [
            _likeliest(context, drawn.tokens[first : first + at_once], chunk)
            for first in range(0, rows, at_once)
        ]
        state_bytes = context.model.state_bytes(length)
    right = (np.concatenate(found) == drawn.labels) & asked
    accuracy = right.sum() / asked.sum()
    return {
        "accuracy": float(accuracy),
        "interval": wilson(round(accuracy * rows), rows),
        "chance": 1 / drawn.answers,
        "correct": int(right.sum()),
        "count": int(asked.sum()),
        "accuracy_by_quarter": _by_quarter(right, asked),
        "state_bytes": state_bytes,
    }


def _likeliest(
    context: EvalContext, tokens: Int[np.ndarray, "b t"], chunk: int
) -> Int[np.ndarray, "b t"]:
    """The symbol that the model finds likeliest at each place, read `chunk` tokens at a time."""
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
    right: Bool[np.ndarray, "b t"], asked: Bool[np.ndarray, "b t"]
) -> list[float | None]:
    """Accuracy in each quarter of the places; None where nothing is asked."""
    quarters = zip(*(np.array_split(part.sum(0), QUARTERS) for part in (right, asked)), strict=True)
    return [float(r.sum() / a.sum()) if a.sum() else None for r, a in quarters]
