"""Texts that several processes read together while one of them measures: `sequence_parallel=`.

    read_together   what each process does: the first one measures, the others serve it
    serve           open the models that the first process opens, read their chunks of its texts
    score_text      the cost of a text, alone or together
    read_prompt     what the head reads last in a text and the state after it, in one process
    add_up          the sum of what all processes compute, each from its chunks

The first process has the tasks and writes the rows. A text goes to all, each reads its chunks as in
training (zoo.parallel), and what they find is added up in the first. The state after a text is
whole where its last chunk was read, if the text is read for it.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from zoo.data.loader import begun
from zoo.errors import RunError
from zoo.model.backbone import BackboneState
from zoo.model.chunks import read_chunks, split_over
from zoo.parallel.ranks import Ranks
from zoo.runs.files import one_line
from zoo.runs.folder import RunFolder
from zoo.tasks.context import EvalContext, NotApplicableError, finite, nats, score

WAIT = timedelta(days=7)  # for a text: the first process may do something else meanwhile
LOST = "gloo"  # in the message of a process whose peer has ended

Share = Callable[..., Tensor]  # (context, ...) -> what a process finds, 0 where others do
Open = Callable[[RunFolder], EvalContext]


class OutOfStepError(BaseException):
    """A process failed while others wait for what it would have sent: no row can be measured on.

    It passes through what makes a row of an error.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def read_together(open_run: Open, measure: Callable[..., object], *arguments: Any) -> None:
    """Call `measure(*arguments)` in the first process, and serve it in the others.

    Processes are given as torchrun does, in the environment. Raises RunError where one of them
    fails on a text.

    Args:
        open_run: opens a run's model in a process that serves.
    """
    dist.init_process_group("gloo", timeout=WAIT)
    try:
        if dist.get_rank():
            serve(open_run)
        else:
            measure(*arguments)
            _send(None)
    except OutOfStepError as failure:
        if LOST in str(failure):  # the process that ended says why, or who started it does
            raise failure.error from None
        which = f"process {dist.get_rank() + 1} of {dist.get_world_size()}"
        raise RunError(f"{which}: {one_line(failure.error)}") from None
    finally:
        dist.destroy_process_group()


def serve(open_run: Open) -> None:
    """Open the models that the first process opens, and read chunks of its texts, until it ends."""
    context = None
    while (command := _send(None)) is not None:
        if isinstance(command, RunFolder):
            context = None  # its memory is free before the next model is opened
            try:
                context, problem = open_run(command), None
            except Exception as error:
                problem = one_line(error)
            _gathered(problem)
        else:
            assert context is not None
            with context.arithmetic():
                _share(context, *command)


def open_together(folder: RunFolder) -> None:
    """Have the other processes open the run that this one has opened. RunError where one cannot."""
    _send(folder)
    for number, problem in enumerate(_gathered(None), 1):
        if problem is not None:
            raise RunError(f"process {number}: {problem}")


def score_text(
    context: EvalContext, tokens: Int[np.ndarray, "b t1"], chunk: int
) -> Float[np.ndarray, "b t"]:
    """Nats (float64) of tokens 1.. given those before, from the empty state: by all processes.

    With several each reads about `chunk` tokens at a time at most. Raises NotApplicableError for
    fewer tokens than processes, ArithmeticError where the model gives no finite numbers.
    """
    if context.ranks.size == 1:
        return score(context, tokens, chunk=chunk)[0]
    check_split(context, tokens.shape[1] - 1)
    text = torch.as_tensor(begun(tokens, context.bos), dtype=torch.int64)
    found = add_up(context, chunk_nats, text, chunk)
    context.progress.advance(found.numel())
    return finite(found)


def check_split(context: EvalContext, tokens: int) -> None:
    """Raise NotApplicableError for fewer tokens than processes."""
    if tokens < (size := context.ranks.size):
        raise NotApplicableError(f"{tokens} tokens cannot be split over {size} processes")


def add_up(context: EvalContext, share: Share, *arguments: Any) -> Tensor:
    """The sum over all processes of `share(context, *arguments)`; called in the first one.

    An error in any of them ends the measurement: what depends on numbers alone is to be a number.
    """
    if context.ranks.size == 1:
        return share(context, *arguments)
    try:
        _send((share, *arguments))
    except Exception as error:  # a process ended between two texts
        raise OutOfStepError(error) from error
    return _share(context, share, *arguments)


def _share(context: EvalContext, share: Share, *arguments: Any) -> Tensor:
    """This process's share, in the first process the sum of all."""
    try:
        found = share(context, *arguments)
        context.ranks.finish()
        dist.reduce(found, 0)
    except Exception as error:
        raise OutOfStepError(error) from error
    return found


def chunk_nats(
    context: EvalContext, tokens: Int[Tensor, "b t1"], chunk: int
) -> Float[Tensor, "b t"]:
    """Nats of tokens 1.. in this rank's chunks, 0 in those of others."""
    model, targets, found = context.model, tokens[:, 1:], None
    split = split_over(model, context.ranks, targets.shape[1], chunk=chunk)
    for own, x, _ in read_chunks(model, split, tokens[:, :-1]):
        part = nats(model.head(x), targets[:, own])
        found = part.new_zeros(targets.shape) if found is None else found
        found[:, own] = part
    assert found is not None  # no rank is without a chunk
    return found


def read_prompt(
    context: EvalContext, tokens: Int[Tensor, "b t"], chunk: int
) -> tuple[Float[Tensor, "b 1 width"], BackboneState] | None:
    """What the head reads at the last token, and the state after it.

    None in the processes that do not read the last chunk.
    """
    model, ranks, found = context.model, context.ranks, None
    if ranks.size == 1:
        after = model.empty_state(len(tokens))
        for piece in tokens.split(chunk, 1):
            x, left = model.hidden(piece.to(context.device), after)
            after = cast(BackboneState, left)
            context.progress.advance(piece.numel())
            found = x[:, -1:], after
        return found
    split = split_over(model, ranks, tokens.shape[1], chunk=chunk)
    for _, x, after in read_chunks(model, split, tokens, keep_last=True):
        if after is not None:
            found = x[:, -1:], after
    return found


def ranks_here() -> Ranks:
    """This process's place among those that read together; alone where there is one."""
    if not dist.is_available() or not dist.is_initialized():
        return Ranks(1, 0)
    return Ranks(dist.get_world_size(), dist.get_rank())


def _send(value: Any) -> Any:
    """What the first process gives all of them; others give None."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gathered(value: Any) -> list[Any]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
