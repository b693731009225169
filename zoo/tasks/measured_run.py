"""One run under an extension while it is measured: its questions, its model, its rows."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from zoo.compression.compressor import Compressor, scorer_of
from zoo.config.longrope_factors import with_found_factors
from zoo.config.measurable import unmeasurable
from zoo.config.schema.data import Data
from zoo.config.schema.eval import EvalConfig
from zoo.config.schema.model import Extension
from zoo.config.validate import plain
from zoo.data.corpora import Corpus
from zoo.errors import UserError
from zoo.measurement import agrees, is_quantized, lacking, not_finite
from zoo.model.checkpoint import load
from zoo.model.extend import extend
from zoo.model.flops import reading_cost
from zoo.model.weights import choose_weights, loaded_in, quantize_as
from zoo.parallel.ranks import Ranks
from zoo.report.validity import is_audited
from zoo.runs.claim import changed_code
from zoo.runs.folder import RunFolder
from zoo.runs.provenance import measured_by
from zoo.runs.resume import with_place
from zoo.runs.rows import time_of_now
from zoo.tasks.context import (
    EvalContext,
    LeakError,
    NotApplicableError,
    Outcome,
    Row,
    failure_row,
    run_guarded,
)
from zoo.tasks.diagnostics import diagnosed
from zoo.tasks.extensions import without_weights
from zoo.tasks.identity import (
    LABELS,
    compressed_identity,
    row_identity,
    weights_of,
)
from zoo.tasks.isolation import Begun
from zoo.tasks.known import run_record
from zoo.tasks.leaks import Leaks, is_leak, leaked_in_training, lengths_read
from zoo.tasks.progress import Progress
from zoo.tasks.readers import open_together, ranks_here
from zoo.tasks.task import Task
from zoo.training.data import open_data

log = logging.getLogger("zoo")


@dataclass
class MeasuredRun:
    """One run while it is measured; `requested` are the questions of this evaluation."""

    config: EvalConfig  # under the extension as it is for this run
    folder: RunFolder
    about: Row
    device: torch.device
    progress: Progress
    session: str  # the same for all that one call of the evaluation measures
    ranks: Ranks = field(default_factory=ranks_here)
    requested: list[Row] = field(default_factory=list)
    refused: list[UserError] = field(default_factory=list)  # by tasks

    @classmethod
    def open(
        cls,
        config: EvalConfig,
        folder: RunFolder,
        device: torch.device,
        progress: Progress,
        session: str,
    ) -> "MeasuredRun":
        """Raises UserError where the run or the scorer cannot be opened."""
        folder = RunFolder.open(folder.path)
        found = with_found_factors(plain(config.extension), folder.path)  # what a search has left
        extension = Extension.model_validate(found)
        weights = choose_weights(config.weights, folder.config, device)
        about = row_identity(extension, folder, device, weights, config.kv_cache)
        about |= compressed_identity(about, config.compress)
        if (ranks := ranks_here()).size > 1:
            about["ranks"] = ranks.size
        _report_code(folder)
        run = cls(
            config.model_copy(update={"extension": extension, "weights": weights}),
            *(folder, about, device, progress, session),
        )
        problem, reasons = run._refusals(config.task)
        if config.compress.by and not problem and not all(reasons.values()):
            scorer_of(config.compress.by, device.type)  # refused before anything is measured
        return run

    def record(self) -> Row:
        """What the report needs to know of the run itself."""
        return run_record(self.about, self.folder)

    def measure(self, tasks: dict[str, Task], fresh: bool) -> Iterator[Row | Begun]:
        """The rows of the run, each appended to `results.jsonl` unless it was found there.

        Before the model is opened and before each task comes what is measured next.

        What kept the run from being measured at all is in its run.json; such rows are not appended,
        but for those of a leak.
        """
        opened, (problem, reasons) = None, self._refusals(tasks)
        if not problem and not all(reasons.values()):
            reasons = {name: reasons[name] or why for name, why in self._inapplicable(tasks)}
        if not problem and all(reasons.values()):  # there is no need to open it
            for name, why in reasons.items():
                yield self.about | {"task": name} | failure_row(NotApplicableError(why))
            return
        if not problem:
            yield Begun(self.about, [*tasks])
            opened = run_guarded(self._opened)
            problem = {} if opened.ok else opened.row
        if problem or opened is None:
            for name in tasks:
                yield self._recorded(self.about | {"task": name} | problem, leaks_only=True)
            return
        leaks, left = Leaks(opened.value), [*tasks]
        for name, task in tasks.items():
            extended = self.config.extension.name != "none"
            named = self.about | {"task": name}
            if why := reasons[name]:
                yield named | failure_row(NotApplicableError(why))
                continue
            quantized = is_quantized(self.about["dtype"])
            shortens = self.config.compress.method is not None
            code = measured_by(self.folder.config, name, extended, quantized, shortens)
            named |= {"measured_by": code}
            yield Begun(named, [*left])
            left.remove(name)
            try:
                yield from self._answer(task, opened.value, named, leaks, fresh)
            except UserError as error:  # with this run: `check` has seen the settings
                self.refused.append(error)
                yield named | failure_row(error)
            except LeakError as leak:
                yield self._recorded(named | failure_row(leak) | {"audited": leaks.audited})
            except Exception as error:
                yield self._recorded(named | failure_row(error))

    def _refusals(self, tasks: Iterable[str]) -> tuple[Row, dict[str, str]]:
        """What keeps the run from being measured, and what each task, whatever its weights are."""
        info, trained = self.folder.info, self.folder.config
        problem = _not_done(info) or leaked_in_training(info)
        return problem, {name: unmeasurable(name, self.config, trained) for name in tasks}

    def _inapplicable(self, tasks: dict[str, Task]) -> Iterator[tuple[str, str]]:
        """Each task with why the run's model cannot be measured by it, whatever its weights and
        text are, or with nothing."""
        config, why, model = self.config, "", None
        try:
            sized = self.folder.info.get("sized")
            trained = self.folder.config
            model = without_weights(trained, config.extension, config.kv_cache, sized)
        except UserError as error:
            why = str(error)
        for name, task in tasks.items():
            outcome = run_guarded(partial(task.check_model, model)) if model is not None else None
            applies = outcome is None or outcome.row["status"] != "not_applicable"
            yield name, why if applies else str(outcome and outcome.row["reason"])

    def _answer(
        self, task: Task, context: EvalContext, named: Row, leaks: Leaks, fresh: bool
    ) -> Iterator[Row]:
        """The rows of one task: those that are measured now, then those that were known."""
        # The label may have been another then: it does not say what was measured.
        same = {name: value for name, value in named.items() if name not in LABELS}
        questions = [question | task.settings for question in task.questions(context)]
        rows = self.folder.rows()
        usable = [] if fresh or not task.still_valid(context) else rows
        usable = [row for row in usable if row["status"] == "ok" and agrees(row, same)]
        known, wanted, unaudited = [], [], []
        for question in questions:
            before = [row for row in usable if agrees(row, question)][-1:]
            for row in (row | named | {"question": sorted(question)} for row in before):
                (known if is_audited(row) else unaudited).append(row)
            wanted += [] if before else [question]
        weights = {name: value for name, value in self.about.items() if name not in LABELS}
        seen = lengths_read(row for row in rows if is_leak(row, weights))
        if needed := [*wanted, *unaudited, *seen]:
            leaks.check(needed)
        for question, outcome, found in _answers(task, context, wanted):
            answer = question | (outcome.value or {})
            row = leaks.judge(named | answer | outcome.row | found)
            if taken := sorted(name for name in answer.keys() & named if row[name] != named[name]):
                reason = f"{', '.join(taken)} of the task's rows is the run's own field"
                row |= named | {"status": "failed", "reason": reason}
            if row["status"] == "ok" and (names := lacking(task.declares, row)):
                row |= {"status": "failed", "reason": f"the task left out {', '.join(names)}"}
            if row["status"] == "ok" and (names := not_finite(task.declares, row)):
                row |= {"status": "failed", "reason": f"no finite number: {', '.join(names)}"}
            row |= {"question": sorted(question), "time": time_of_now(), "session": self.session}
            yield self._recorded(row | {"declares": task.declares.plain(row)})
        for row in map(leaks.judge, unaudited):
            known.append(self._recorded(row) if row["status"] == "ok" else row)
        task_name = {"task": named["task"]}
        self.requested.extend(task_name | question for question in questions)
        yield from (row | {"declares": task.declares.plain(row)} for row in known)

    def _recorded(self, row: Row, leaks_only: bool = False) -> Row:
        """The row, appended to the run's results."""
        if row["status"] == "leaks" or not leaks_only:
            self.folder.append_row({"time": time_of_now(), **row})
        return row

    def _opened(self) -> EvalContext:
        """The run's model and text, opened in all processes."""
        context = self.context()
        if self.ranks.size > 1:
            open_together(self.folder)
        return context

    def context(self) -> EvalContext:
        """The run's model and text; `about` takes the step of the weights.

        Raises UserError where the text is another one, NotApplicableError where the extension does
        not apply.
        """
        trained, info, config = self.folder.config, self.folder.info, self.config
        section = with_place(plain(trained)["data"], plain(config.data))
        data = open_data(Data.model_validate(section), trained.seq_len)
        if data.fingerprint != info.get("fingerprint"):
            known = info["fingerprint"][:8] if info.get("fingerprint") else "not known"
            raise UserError(
                f"data={data.name}: is not the text that the run was trained on (fingerprint "
                f"{data.fingerprint[:8]}, the run's is {known}). Say where that text is now: "
                "data.path=<folder>."
            )
        weights = self.config.weights or "float32"
        model = load(self.folder, self.device, loaded_in(weights))
        self.about.update(weights_of(self.folder))
        try:
            extend(model, config.extension, trained.seq_len)
            quantize_as(model, weights, config.kv_cache)
        except UserError as error:
            raise NotApplicableError(str(error)) from None
        compress = None
        if config.compress.method and isinstance(data, Corpus):
            by = config.compress.by
            scorer = scorer_of(by, self.device.type) if by else None
            cost = reading_cost(model)
            compress = Compressor(config.compress, scorer, data.tokenizer, cost)
        return EvalContext(
            model=model,
            data=data,
            folder=self.folder.path,
            train_length=trained.seq_len,
            split=config.split,
            extension=self.about["extension_settings"],
            compress=compress,
            device=self.device,
            precision=trained.trainer.precision,
            progress=self.progress,
            ranks=self.ranks,
        )


def _answers(
    task: Task, context: EvalContext, wanted: Sequence[Row]
) -> Iterator[tuple[Row, Outcome, Row]]:
    """The answers, each with what the model's layers found of their own accuracy."""
    with diagnosed(context.model) as found:
        for question, outcome in task.answers(context, wanted):
            if context.compress and not outcome.ok:
                _ = context.compress.row  # what it read and scored is no part of the next answer's
            yield question, outcome, found.fields() if outcome.ok else {}


def _not_done(info: Row) -> Row:
    """Status and reason of a run that cannot be measured, or nothing."""
    if info["status"] == "done":
        return {}
    status = "failed" if info["status"] == "failed" else "unfinished"
    stopped = f"training is {info['status']} at step {info.get('step', 0)}"
    return {"status": status, "reason": info.get("reason") or stopped}


def _report_code(folder: RunFolder) -> None:
    """Say where a run was trained by other code than is here to measure it."""
    if files := changed_code(folder, folder.config):
        more = f" and {len(files) - 3} more" * (len(files) > 3)
        log.warning(
            "%s: %s%s changed since it was trained. Train it by this code: train.py fresh=true.",
            *(folder, ", ".join(files[:3]), more),
        )
