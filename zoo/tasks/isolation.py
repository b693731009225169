"""Measures runs one after another beside this process, so that one that crashes costs its own rows.

All runs share one further process: a model that ends it (a signal, no memory) leaves what was found
so far, gets a row that says so, in its results.jsonl too, and the runs after it go on in a new
process. What was found comes back through a file, as what is sent by a process that dies may be
lost.
"""

import logging
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from zoo.errors import RunError, UserError
from zoo.runs.files import one_line
from zoo.runs.folder import RunFolder
from zoo.runs.rows import time_of_now
from zoo.tasks.context import Row

log = logging.getLogger("zoo")

Apart = Callable[..., object]  # calls a function with arguments; RunError where its process crashed


@dataclass
class Measured:
    """What came of one run."""

    record: Row
    rows: list[Row] = field(default_factory=list)  # requested now
    besides: list[Row] = field(default_factory=list)  # known of before
    refused: list[UserError] = field(default_factory=list)  # by tasks
    damage: UserError | None = None  # for which it could not be opened


@dataclass
class Begun:
    """What is measured next: the tasks that are left, the next one first, and the fields of the
    rows that they have should nothing come of them."""

    row: Row
    tasks: Sequence[str]


Steps = Iterable[Row | Begun | Measured]  # a run's record, its rows, and last of all the whole
Measure = Callable[[RunFolder], Steps]


def here(function: Callable[..., object], *arguments: Any) -> None:
    """Call it in this process."""
    function(*arguments)


def measure_each(
    prepare: Callable[[], Measure], folders: Sequence[RunFolder], apart: Apart = here
) -> Iterator[Measured]:
    """Yield what came of each folder, in their order. `prepare` is called in each process begun.

    Raises what `prepare` raises.
    """
    left = [*folders]
    while left:
        crash = "the process ended before its measurements"
        with tempfile.TemporaryFile() as file:
            try:
                apart(_measure_all, prepare, left, file)
            except RunError as error:
                crash = str(error)
            done, steps = _read(file)
        yield from done
        left = left[len(done) :]
        if left:
            yield _ended(left.pop(0), steps, crash)


def _measure_all(
    prepare: Callable[[], Measure], folders: Sequence[RunFolder], file: IO[bytes]
) -> None:
    measure = prepare()
    for folder in folders:
        for step in _guarded(measure, folder):
            pickle.dump(step, file)
            file.flush()


def _guarded(measure: Measure, folder: RunFolder) -> Iterator[Row | Begun | Measured]:
    """An error that nobody foresaw costs the run that it came of, and leaves its traceback."""
    steps: list[Row | Begun] = []
    try:
        for step in measure(folder):
            if not isinstance(step, Measured):
                steps.append(step)
            yield step
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        yield _ended(folder, steps, one_line(error))


def _read(file: IO[bytes]) -> tuple[list[Measured], list[Row | Begun]]:
    """What a process has left: the runs that it measured, and the steps of the one it was at."""
    file.seek(0)
    done: list[Measured] = []
    steps: list[Row | Begun] = []
    while True:
        try:
            step = pickle.load(file)
        except (EOFError, pickle.UnpicklingError):  # the process may have died while it wrote
            return done, steps
        if isinstance(step, Measured):
            done.append(step)
            steps = []
        else:
            steps.append(step)


def _ended(folder: RunFolder, steps: Sequence[Row | Begun], reason: str) -> Measured:
    """What was found of a run, its record first, before its measurements ended.

    The rows that say so, one for each task without an answer, are appended to the run's results.
    """
    why = {"status": "failed", "reason": reason}
    begun = [step for step in steps if isinstance(step, Begun)][-1:]
    unopened = {"run": folder.name, "arm": folder.name, **why}
    record, *rows = [step for step in steps if not isinstance(step, Begun)] or [unopened]
    failed = [one.row | {"task": task} | why for one in begun for task in one.tasks]
    try:
        for row in failed:
            folder.append_row({"time": time_of_now(), **row})
    except UserError as error:  # a full disk, say: the other runs go on
        log.warning("%s", error)
    return Measured(record, [*rows, *(failed or [record | {"task": None, **why}])])
