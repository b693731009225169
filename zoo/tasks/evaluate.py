"""The driver: runs tasks over run folders, appends their rows to `results.jsonl` and reports.

For each run and task it gets the task's questions, finds those that the run's results already
answer, audits the model for leaks before the first of the others, and lets the task answer them.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zoo.config.schema.eval import EvalConfig
from zoo.config.validate import plain
from zoo.devices import prepare
from zoo.errors import FORM, UserError, refuse, sentence
from zoo.model.device import pick_device
from zoo.report import published, write_report
from zoo.report.page import pictures_folder, terminal
from zoo.report.rows import gather, in_words
from zoo.report.wandb import mirror
from zoo.runs.files import write_text
from zoo.runs.folder import RunFolder
from zoo.runs.rows import time_of_now
from zoo.tasks.context import EvalContext, Row
from zoo.tasks.extensions import check_extension
from zoo.tasks.identity import trained_settings
from zoo.tasks.isolation import Apart, Begun, Measure, Measured, Steps, here, measure_each
from zoo.tasks.known import known_besides, other_lengths
from zoo.tasks.measured_run import MeasuredRun
from zoo.tasks.progress import Progress
from zoo.tasks.readers import read_together
from zoo.tasks.task import Task

log = logging.getLogger("zoo")


def evaluate(
    config: EvalConfig,
    folders: Sequence[RunFolder],
    *,
    say: Callable[[str], None],
    progress: Progress | None = None,
    fresh: bool = False,
    apart: Apart = here,
    answers: list[Row] | None = None,
) -> int:
    """Measure every run with every task, write the report, `say` its table; returns the exit code.

    A measurement that a run's `results.jsonl` already holds, of the same checkpoint under the same
    settings, is not repeated unless `fresh`. The report also has earlier answers to the same
    questions under other extensions, and those of tasks that are not requested now.

    Before anything of a run is measured its model is audited for leaks, under the extension. One
    that leaks is not measured: its row has the status `leaks` and the reason.

    `apart` calls a function in a process of its own: a run whose measurements crash it is a failed
    one, and the others go on. `answers` gets the rows of what this measured or had measured before,
    without the earlier ones beside them.

    Returns 0, or 1 where a run or a measurement failed or nothing was measured. Raises UserError,
    before any model is opened, for settings or an extension that fit no run; and where no run can
    be opened, or no question can be measured for the only one.
    """
    tasks = {name: part.load()() for name, part in config.task.items()}
    for task in tasks.values():
        task.check()
    if (ranks := config.sequence_parallel or 1) > 1 and apart is here:
        rule = "needs processes that are forked from this one, as on Linux by eval.py"
        refuse("sequence_parallel", ranks, rule, "Leave it out")
    if config.against:
        published.require({folder.info.get("fingerprint") for folder in folders})
    if config.publish:
        named = [(one.name, one.config.seed, trained_settings(one)) for one in folders]
        published.check_names(Path(config.publish), named)
    if config.report and (pictures := pictures_folder(Path(config.report))).is_file():
        raise UserError(
            f"report={config.report}: its pictures go to the folder {pictures}, which is a file. "
            "Name another file."
        )
    apart(check_extension, config.extension, folders, config.kv_cache)
    log.info("measuring %s", ", ".join(map(str, folders)))
    progress = progress or Progress.on_stderr()

    session = f"{time_of_now()} {os.getpid()}"

    def begin() -> Measure:
        return _measure(config, tasks, progress, fresh, session)

    together = partial(_together, apart, config, session) if ranks > 1 else apart
    rows, runs, errors = [], [], []
    for folder, found in zip(folders, measure_each(begin, folders, together), strict=True):
        runs.append(found.record)
        if found.damage:  # one of several keeps its place; the only one's is raised below
            errors.append(found.damage)
            if len(folders) > 1:
                log.warning("%s", found.damage)
            continue
        if len(folders) == 1 and all(row["status"] == "not_applicable" for row in found.rows):
            raise UserError(_alone(found.rows[0]))
        if len(folders) == 1 and len(found.rows) == len(found.refused):
            raise found.refused[0]
        rows += [*found.rows, *found.besides]
        _print_reasons(folder, found.rows)
    if answers is not None:
        answers += [row for row in rows if row.get("requested", True)]
    if len(errors) == len(folders):
        raise errors[0] if len(errors) == 1 else _none_opened(errors)
    places = {folder.path.resolve().parent for folder in folders}
    beside = folders[0].path.parent if len(places) == 1 else Path(config.runs)
    apart(_report, config, rows, runs, beside, say)  # the libraries that draw keep threads
    statuses = {row["status"] for row in rows if row.get("requested", True)}
    failed = errors or {"failed", "leaks"} & statuses or "ok" not in statuses
    return int(bool(failed))


def _together(
    apart: Apart,
    config: EvalConfig,
    session: str,
    measure: Callable[..., object],
    *arguments: Any,
) -> None:
    """Call `measure` in the first of several processes that read texts together."""

    def opened(folder: RunFolder) -> EvalContext:
        log.setLevel(logging.ERROR)  # the first process speaks
        device = _prepared(config)
        return MeasuredRun.open(config, folder, device, Progress(), session).context()

    apart(read_together, opened, measure, *arguments, count=config.sequence_parallel)


def _prepared(config: EvalConfig) -> torch.device:
    """This process's device, with its threads set."""
    threads = config.threads or torch.get_num_threads() // (config.sequence_parallel or 1)
    torch.set_num_threads(max(1, threads))
    device = pick_device(config.device)
    if line := prepare(device.type):
        log.info("%s", line)
    return device


def _measure(
    config: EvalConfig, tasks: dict[str, Task], progress: Progress, fresh: bool, session: str
) -> Measure:
    """How a run is measured in this process; takes its device and threads."""
    device = _prepared(config)

    def measure(folder: RunFolder) -> Steps:
        progress.run = folder.name
        yield Begun({"run": folder.name, "arm": folder.name}, [*tasks])
        try:
            run = MeasuredRun.open(config, folder, device, progress, session)
        except UserError as error:
            bad = {"run": folder.name, "arm": folder.name, "status": "failed"}
            yield Measured(bad | {"reason": str(error)}, damage=error)
            return
        yield (record := run.record())
        rows = []
        for step in run.measure(tasks, fresh):
            if not isinstance(step, Begun):
                rows.append(step)
            yield step
        leaks = any(row["status"] == "leaks" for row in rows)
        besides = []
        if not leaks:
            kept = run.folder.rows()
            besides += known_besides(run.folder, kept, run.about, run.requested)
            if config.publish:  # one table holds all lengths of a run
                besides += other_lengths(run.folder, kept, run.about, run.requested)
        progress.clear()
        yield Measured(record, rows, besides, run.refused)

    return measure


def _alone(row: Row) -> str:
    """Why the only run cannot be measured, as a refusal."""
    if FORM.fullmatch(row["reason"]):
        return row["reason"]
    rule = f"does not apply to {row['run']} ({row['reason'].removesuffix('.')})"
    return sentence(f"task={row['task']}", rule, "Choose another task, or another run")


def _none_opened(errors: Sequence[UserError]) -> UserError:
    first = str(errors[0]).removesuffix(".")
    return UserError(f"run: none of the {len(errors)} runs can be measured. The first: {first}.")


def _print_reasons(folder: RunFolder, rows: Sequence[Row]) -> None:
    """Say at once why a run's measurements failed, each reason once."""
    without = [row for row in rows if row["status"] in ("failed", "unfinished", "leaks")]
    for reason in dict.fromkeys(in_words(row) for row in without):
        log.warning("%s: %s", folder, reason)


def _report(
    config: EvalConfig,
    rows: list[Row],
    runs: list[Row],
    beside: Path,
    say: Callable[[str], None],
) -> None:
    """Write the report and mirror it as configured, W&B's files in the folder `beside`; `say` the
    table and the report's file."""
    if config.publish:
        table = Path(config.publish)
        tree, anew = published.added(table, rows, runs)
        table.parent.mkdir(parents=True, exist_ok=True)
        write_text(table, published.text(tree))
        for name in anew:
            log.warning("%s: %s was trained again; what it had is gone from the table", table, name)
    theirs, their_runs, differing = published.beside(rows) if config.against else ([], [], [])
    for line in differing:
        log.warning("%s", line)
    report = Path(config.report) if config.report else None
    shown = rows + theirs, runs + their_runs
    said = write_report(*shown, report) if report else terminal(gather(*shown))
    if config.logger.name == "wandb":
        about = {"project": config.logger.project, "config": plain(config), "report": report}
        mirror(rows, runs, beside, config.logger.mode, **about)
    say(f"{said}\n\nreport: {report}" if report else said)
