"""Tokens per second and peak memory by length: reading a text at once, writing token by token."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from zoo.tasks.context import (
    EvalContext,
    NotApplicableError,
    Row,
    check_counts,
    check_length,
    check_lengths,
    check_state,
    chunk_tokens,
    run_guarded,
)
from zoo.tasks.memory import peak_bytes

TIMES = (1, 4, 16, 32)  # the training length
PATIENCE = 2.0  # seconds of repeats per length; one is timed however long it takes


def measure(
    context: EvalContext,
    *,
    lengths: Sequence[int] | None = None,
    decode_tokens: int = 32,
    repeats: int = 3,
    chunk: int = 4096,
) -> Iterator[Row]:
    """Two rows per length; one sequence of random tokens, medians of timed repeats.

    `forward` reads `length` tokens in one call, after a first call that is not timed. `decode`
    reads a prompt of that length, `chunk` tokens at a time, then writes `decode_tokens` tokens one
    by one; its figures are those of the writing. `peak_bytes` is what the call, or the state and
    the writing of a token, took beyond the model's weights; None where the device does not tell.
    """
    lengths = [*(lengths or (times * context.train_length for times in TIMES))]
    lengths = check_lengths("speed", lengths)
    check_counts("speed", decode_tokens=decode_tokens, repeats=repeats, chunk=chunk)
    phases: list[tuple[Row, Callable[[Tensor], Row]]] = [
        ({"phase": "forward", "repeats": repeats}, partial(_forward, context, repeats)),
        (
            {"phase": "decode", "decode_tokens": decode_tokens},
            partial(_decode, context, decode_tokens, chunk_tokens(context, chunk)),
        ),
    ]
    asked = [(about | {"length": length}, phase) for length in lengths for about, phase in phases]
    wanted = [(key, phase) for key, phase in asked if not context.measured(key)]
    if wanted:  # the first call of a process builds and loads what later ones find
        run_guarded(partial(_forward, context, 1, _random_tokens(context, min(64, lengths[0]))))
    for key, phase in wanted:
        context.progress.begin(f"speed of {key['phase']} at {key['length']}", key["length"])
        outcome = run_guarded(lambda: phase(_random_tokens(context, key["length"])))  # noqa: B023
        yield key | outcome.row | (outcome.value or {})


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
        state, times = model.empty_state(1), []
        for piece in tokens.split(chunk, 1):
            logits, state = model(piece, state)
            context.progress.advance(piece.shape[1])
        held, token = check_state(model, state), logits[:, -1:].argmax(-1)
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
