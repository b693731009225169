"""Tokens per second and peak memory by length: reading a text at once, writing token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import ClassVar, cast

import torch
from torch import Tensor

from zoo.config.domains import Count, Lengths
from zoo.measurement import Declaration, Quantity
from zoo.model.backbone import BackboneState
from zoo.report.timings import DECODING
from zoo.tasks.context import (
    EvalContext,
    NotApplicableError,
    Outcome,
    Row,
    check_length,
    check_state,
    run_guarded,
)
from zoo.tasks.memory import check_memory, peak_bytes
from zoo.tasks.task import STATE, Task, lengths_of

TIMES = (1, 4, 16, 32)  # the training length
PATIENCE = 2.0  # seconds of repeats per length; one is timed however long it takes
TOKEN_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Speed(Task):
    """Two rows per length; one sequence of random tokens, medians of timed repeats.

    `forward` reads `length` tokens in one call, after a first call that is not timed. `decode`
    reads a prompt of that length, `chunk` tokens at a time, then writes `decode_tokens` tokens one
    by one; its figures are those of the writing. `peak_bytes` is what the call, or the state and
    the writing of a token, took beyond the model's weights; None where the device has none.
    """

    declares = Declaration(
        title="Speed and memory",
        about="Forward reads a text of this length in one call; decoding writes one token after "
        "another behind a text of this length.",
        quantities=(
            Quantity(
                field="tokens_per_second",
                name="forward",
                better="higher",
                unit="tokens per second",
                where={"phase": "forward"},
                cost=True,
            ),
            DECODING,
            Quantity(
                field="peak_bytes",
                name="peak memory of the forward pass",
                better="lower",
                form="bytes",
                where={"phase": "forward"},
                cost=True,
            ),
            STATE,
        ),
    )
    reads: ClassVar[str] = "any"
    both_ways: ClassVar[bool] = True
    lengths: Lengths | None = None
    decode_tokens: Count = 32
    repeats: Count = 3
    chunk: Count = 4096

    def check(self) -> None:
        longest = max(self.lengths or [0])
        check_memory(f"task.speed.lengths={longest}", longest * TOKEN_BYTES, "the text")

    def questions(self, context: EvalContext) -> list[Row]:
        lengths = lengths_of(self.lengths, context, TIMES)
        return [{"phase": phase, "length": n} for n in lengths for phase in ("forward", "decode")]

    def answers(self, context: EvalContext, wanted: Sequence[Row]) -> Iterator[tuple[Row, Outcome]]:
        if wanted:  # the first call of a process builds and loads what later ones find
            short = min(64, *(question["length"] for question in wanted))
            run_guarded(lambda: _forward(context, 1, _random_tokens(context, short)))
        yield from super().answers(context, wanted)

    def measure(self, context: EvalContext, question: Row) -> Row:
        phase, length = question["phase"], question["length"]
        context.progress.begin(f"speed of {phase} at {length}", length)
        tokens = _random_tokens(context, length)
        if phase == "forward":
            return _forward(context, self.repeats, tokens)
        return _decode(context, self.decode_tokens, self.chunk, tokens)


def _forward(context: EvalContext, repeats: int, tokens: Tensor) -> Row:
    model, length = context.model, tokens.shape[1]
    check_length(model, length)
    with context.arithmetic():
        peak, times = peak_bytes(context.device, lambda: model(tokens)), []
        while len(times) < repeats and sum(times) < PATIENCE:
            began = _now(context.device)
            model(tokens)
            times.append(_now(context.device) - began)
        held = model.state_bytes(length) if model.causal else None  # an encoder keeps none
        return _figures(median(times), length, peak) | {"state_bytes": held}


def _decode(context: EvalContext, steps: int, chunk: int, tokens: Tensor) -> Row:
    model, length = context.model, tokens.shape[1]
    if not model.causal:
        raise NotApplicableError("a model that reads both ways does not write token by token")
    check_length(model, length + steps)
    with context.arithmetic():
        x, state, times = None, model.empty_state(1), []
        for piece in tokens.split(chunk, 1):
            x, after = model.hidden(piece, state)
            state = cast(BackboneState, after)
            context.progress.advance(piece.shape[1])
        assert x is not None, "a prompt has tokens"
        held, token = check_state(model, state), model.head(x[:, -1:]).argmax(-1)
        writing = peak_bytes(context.device, lambda: model(token, state))
        for _ in range(steps):
            began = _now(context.device)
            logits, state = model(token, state)
            token = logits.argmax(-1)
            times.append(_now(context.device) - began)
        peak = None if writing is None else held + writing
        return _figures(median(times), 1, peak) | {"state_bytes": held}


def _figures(seconds: float, tokens: int, peak: int | None) -> Row:
    return {
        "tokens_per_second": tokens / seconds,
        "milliseconds": 1000 * seconds,
        "peak_bytes": peak,
    }


def _random_tokens(context: EvalContext, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(context.model.vocab_size, (1, count), generator=generator)
    return tokens.to(context.device)


def _now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return perf_counter()
