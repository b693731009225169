"""Measurements of trained models, and the driver that runs them over run folders.

A task is a function `measure(context, **settings)` that yields one row per measurement, as it is
made. `evaluate` adds who was measured, appends the rows to the run's `results.jsonl` and reports.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from zoo.config.groups import extensions
from zoo.config.schema import Data, EvalConfig, Extension
from zoo.config.stored import as_before
from zoo.config.tree import flat, within
from zoo.config.validate import plain
from zoo.devices import prepare
from zoo.errors import UserError
from zoo.measurement import agrees, question
from zoo.model.audit import AUTOCAST
from zoo.model.checkpoint import load
from zoo.model.device import device_name, pick_device
from zoo.model.extend import extend
from zoo.report import write_report
from zoo.report.page import pictures_folder, terminal
from zoo.report.rows import gather, in_words
from zoo.report.wandb import mirror
from zoo.runs.folder import RunFolder, trained_by
from zoo.runs.identity import identity
from zoo.runs.longrope import with_found
from zoo.runs.provenance import measured_by
from zoo.runs.resume import with_place
from zoo.tasks.context import (
    EvalContext,
    LeakError,
    Leaks,
    NotApplicableError,
    Row,
    failure_row,
    run_guarded,
)
from zoo.tasks.progress import Progress
from zoo.training.windows import open_data

log = logging.getLogger("zoo")

LABELS = ("arm", "extension_options")  # in words what `extension_settings` identifies
UNSHAPED = (  # options that leave a run's weights as they are; the text is known by its fingerprint
    *("data.path", "data.cache", "valid_every", "valid_windows", "save_every"),
)
PLACES = ("length", "protocol", "phase", "windows")  # which of a task's answers a row is
EXTENDED = (*LABELS, "extension", "extension_factor", "extension_settings")


def evaluate(
    config: EvalConfig,
    folders: Sequence[RunFolder],
    *,
    say: Callable[[str], None],
    progress: Progress | None = None,
    fresh: bool = False,
) -> int:
    """Measure every run with every task, write the report, `say` its table; returns the exit code.

    A measurement that a run's `results.jsonl` already holds, of the same checkpoint under the same
    settings, is not repeated unless `fresh`. What it holds of the same questions under other
    extensions, and of tasks that are not asked now, stands beside it in the report. The code is 0,
    or 1 where a run or a measurement failed or nothing was measured. Raises UserError for settings
    that fit no run, such as an extension that does not apply to the only one.

    Before anything of a run is measured its model is audited for leaks, under the extension. One
    that leaks is not measured: its row has the status `leaks` and the reason, and the code is 1.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.report and (folder := pictures_folder(Path(config.report))).is_file():
        told = f"report={config.report}: its pictures go to the folder {folder}, which is a file."
        raise UserError(f"{told} Name another file.")
    device, progress = pick_device(config.device), progress or Progress.on_stderr()
    if line := prepare(device.type):
        log.info("%s", line)
    rows, runs, statuses = [], [], set()
    for folder in folders:
        progress.run = folder.name
        try:
            folder = RunFolder.open(folder.path)
            extension = _found(config.extension, folder)
            about = _identity(extension, folder, device)
            _tell_code(folder)
            runs.append(about | folder.info | {"settings": _trained_settings(folder)})
        except UserError as error:  # a damaged one of several keeps its place
            if len(folders) == 1:
                raise
            bad = {"run": folder.name, "arm": folder.name, "status": "failed"}
            runs.append(bad | {"reason": str(error)})
            statuses.add("failed")
            log.warning("%s", error)
            continue
        settled = config.model_copy(update={"extension": extension})
        asked: list[Row] = []
        found = list(_measure_run(settled, folder, about, device, progress, fresh, asked))
        if len(folders) == 1 and all(row["status"] == "not_applicable" for row in found):
            raise UserError(found[0]["reason"])
        own = {row["status"] for row in found}
        statuses |= own
        rows += [*found, *(() if "leaks" in own else _known_besides(folder, about, asked))]
        progress.clear()
        without = [row for row in found if row["status"] in ("failed", "unfinished", "leaks")]
        for line in dict.fromkeys(f"{folder}: {in_words(row)}" for row in without):
            log.warning("%s", line)
    if config.report:
        say(write_report(rows, runs, Path(config.report)))
    else:
        say(terminal(gather(rows, runs)))
    if config.logger.name == "wandb":
        report = Path(config.report) if config.report else None
        about = {"project": config.logger.project, "config": plain(config), "report": report}
        mirror(rows, runs, Path(config.runs), config.logger.mode, **about)
    return int(bool({"failed", "leaks"} & statuses) or "ok" not in statuses)


def _measure_run(
    config: EvalConfig,
    folder: RunFolder,
    about: Row,
    device: torch.device,
    progress: Progress,
    fresh: bool,
    asked: list[Row],
) -> Iterator[Row]:
    """The rows of one run, each appended to `results.jsonl` unless it was found there.

    `asked` takes the questions, the fields that name a measurement. What kept the run from being
    measured at all is in its run.json; such rows are not appended, but for those of a leak.
    """
    why = _not_done(folder.info) or _leaked(folder.info)
    if not why:
        opened = run_guarded(lambda: _open(config, folder, device, progress, about))
        why = {} if opened.ok else opened.row
    if why:
        for task in config.task:
            row = about | {"task": task} | why
            if row["status"] == "leaks":
                folder.append_row(row)
            yield row
        return
    leaks = Leaks(opened.value)
    for task, part in config.task.items():
        named, reused = about | {"task": task} | _measured_by(config, folder, task), []
        # The label may have been another then: it does not say what was measured.
        same = {name: value for name, value in named.items() if name not in LABELS}
        known = [] if fresh else [row for row in folder.rows() if agrees(row, same)]
        keys: list[Row] = []

        def measured(key: Row, known=known, reused=reused, keys=keys, named=named) -> bool:
            keys.append(key)
            same = [row for row in known if row["status"] == "ok" and agrees(row, key)][-1:]
            if not same or "audit" not in same[0]:  # not measured, or before there were audits
                leaks.check(key)
            reused.extend(row | named | {"question": sorted(key)} for row in same)
            return bool(same)

        try:
            for found in part.load()(replace(opened.value, measured=measured)):
                now = datetime.now(UTC).isoformat(timespec="seconds")
                key = next((key for key in keys if agrees(found, key)), None)
                row = named | leaks.judge(found) | {"question": key and sorted(key), "time": now}
                folder.append_row(row)
                yield row
        except UserError:
            raise  # the settings': no other run would do better
        except LeakError as leak:
            row = named | failure_row(leak)
            folder.append_row(row)
            yield row
            continue
        except Exception as error:
            yield named | failure_row(error)
        asked.extend({"task": task} | key for key in keys)
        yield from reused


def _measured_by(config: EvalConfig, folder: RunFolder, task: str) -> Row:
    """The code that measures: what other code measured is measured again."""
    extended = config.extension.name != "none"
    return {"measured_by": measured_by(folder.config, task, extended)}


def _known_besides(folder: RunFolder, about: Row, asked: Sequence[Row]) -> Iterator[Row]:
    """The last answers of the same weights, by the code that is here, to what was not asked now.

    To the same questions under other extensions, and to the questions of the other tasks, whose
    settings are those of their latest answer.
    """
    alike = {name: value for name, value in about.items() if name not in EXTENDED}
    alike |= {"status": "ok"}
    rows = [
        row for row in folder.rows() if agrees(row, alike) and row.keys() >= {"task", *EXTENDED}
    ]
    kinds = {(row["task"], row["extension"] != "none") for row in rows}
    now = {kind: measured_by(folder.config, *kind) for kind in kinds}
    rows = [r for r in rows if r.get("measured_by") == now[r["task"], r["extension"] != "none"]]
    others: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: str(row.get("time"))):
        if row["task"] not in {key["task"] for key in asked}:
            others.setdefault(row["task"], []).append(row)
    for key in asked:
        same = {row["extension_settings"]: row for row in rows if agrees(row, key)}
        for name, row in same.items():
            if name != about["extension_settings"]:
                yield row | {"requested": False}
    for answers in others.values():
        yield from (row | {"requested": False} for row in answers if _alike(row, answers[-1]))


def _alike(row: Row, latest: Row) -> bool:
    """Whether two rows of a task were asked under the same settings, at whatever length."""
    one, other = question(row), question(latest)
    return all(one[name] == other[name] for name in one.keys() & other.keys() - set(PLACES))


def _not_done(info: Row) -> Row:
    """Status and reason of a run that cannot be measured, or nothing."""
    if info["status"] == "done":
        return {}
    status = "failed" if info["status"] == "failed" else "unfinished"
    stopped = f"training is {info['status']} at step {info.get('step', 0)}"
    return {"status": status, "reason": info.get("reason") or stopped}


def _tell_code(folder: RunFolder) -> None:
    """Say where a run was trained by other code than is here to measure it."""
    if files := folder.changed_code(folder.config):
        more = f" and {len(files) - 3} more" * (len(files) > 3)
        told = f"{', '.join(files[:3])}{more} changed since it was trained"
        log.warning("%s: %s: train.py with fresh=true trains it by this code", folder, told)


def _leaked(info: Row) -> Row:
    """Status and reason of a run whose model leaked when its training ended, or nothing."""
    found = info.get("audit")
    if not isinstance(found, dict) or found.get("ok") is not False:
        return {}
    return failure_row(LeakError(f"trained with a leak: {found.get('reason')}"))


def _open(
    config: EvalConfig, folder: RunFolder, device: torch.device, progress: Progress, about: Row
) -> EvalContext:
    """The run's model and text; `about` takes the step of the weights. UserError where either is
    gone, or the text is another one."""
    trained, info = folder.config, folder.info
    section = with_place(plain(trained)["data"], plain(config.data))
    data = open_data(Data.model_validate(section), trained.seq_len)
    if data.fingerprint != info.get("fingerprint"):
        known = f"the run's {info['fingerprint'][:8]}" if info.get("fingerprint") else "not known"
        raise UserError(
            f"data={data.name} is not the text the run was trained on: its fingerprint is "
            f"{data.fingerprint[:8]}, {known}. data.path=<folder> says where that text is now"
        )
    model = load(folder, device)
    about.update(_weights_of(folder))
    try:
        extend(model, config.extension, trained.seq_len)
    except UserError as error:
        raise NotApplicableError(str(error)) from None
    return EvalContext(
        model=model,
        data=data,
        folder=folder.path,
        train_length=trained.seq_len,
        split=config.split,
        extension=_settings(config.extension),
        device=device,
        precision=trained.trainer.precision,
        progress=progress,
    )


def _found(extension: Extension, folder: RunFolder) -> Extension:
    """The extension with what a search has found for this run."""
    return Extension.model_validate(with_found(plain(extension), folder))


def _identity(extension: Extension, folder: RunFolder, device: torch.device) -> Row:
    """The fields every row of a run shares: what was trained, how, and what measures it."""
    trained, info = folder.config, folder.info
    name = trained.model.name
    if trained.finetune or trained.extension.name != "none":
        how = "tuned" if trained.finetune else "trained"
        name += f" {how} with {_label(trained.extension)}"
    dtype = AUTOCAST.get(trained.trainer.precision, torch.float32)
    return {
        "run": folder.name,
        "arm": name if extension.name == "none" else f"{name} + {_label(extension)}",
        "model": trained.model.name,
        "size": trained.size.name,
        "seed": trained.seed,
        "extension": extension.name,
        "extension_factor": extension.factor,
        "extension_settings": _settings(extension),
        "extension_options": flat(plain(extension)),
        "parameters": info.get("parameters"),
        "flops_per_token": info.get("flops_per_token"),
        "train_length": trained.seq_len,
        **_weights_of(folder),
        "lr": trained.optim.lr,
        "match": trained.match,
        "state_passing": trained.state_passing,
        "data": trained.data.name,
        "fingerprint": info.get("fingerprint"),
        "tokenizer": info.get("tokenizer"),
        "sources": trained_by(info),
        "commit": info.get("commit"),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "audit": None,  # of a model that leaks, the reason
    }


def _weights_of(folder: RunFolder) -> Row:
    """What the weights have read that are measured: after damage, not the run's last."""
    info = folder.info
    try:
        last = next(folder.whole_checkpoints(), None)
    except UserError:
        last = None
    step = info["step"] if last is None or last.step is None else last.step
    tokens = info.get("tokens_seen")
    if step != info["step"]:
        tokens = step * info["tokens_per_step"] if info.get("tokens_per_step") else None
    return {"train_tokens": tokens, "train_steps": step}


def _label(extension: Extension) -> str:
    """Its name, under a remap that of the scaling beneath, and the factor."""
    name = extension.name
    if extension.scaling and extension.attention:
        targets = {
            tree["scaling"]["_target_"]: other
            for other, tree in extensions().items()
            if isinstance(tree["scaling"], dict)
            and not tree["attention"]
            and not tree.get("positions")
        }
        name += f" over {targets.get(extension.scaling.target, extension.scaling.target)}"
    return name + (f" x{extension.factor:g}" if extension.factor > 1 else "")


def _trained_settings(folder: RunFolder) -> dict[str, Any]:
    """Every option that shaped a run's weights but the seed: equal for runs that are its seeds.

    A fine-tuned run has its base's beside its own, in place of where the base lies.
    """
    config, base = folder.config, {}
    every = flat(identity(config))
    settings = {k: v for k, v in every.items() if not within(k, ("seed", *UNSHAPED))}
    if config.finetune and Path(config.finetune).is_dir():
        try:
            base = _trained_settings(RunFolder.open(config.finetune))
        except UserError:  # damaged since
            return settings
        del settings["finetune"]
    return settings | {f"base.{name}": value for name, value in base.items()}


def _settings(extension: Extension) -> str:
    """A name for the extension with all its settings, the same for the same ones."""
    if extension.name == "none":
        return "none"
    told = json.dumps(as_before({"extension": plain(extension)})["extension"], sort_keys=True)
    return f"{extension.name}-{hashlib.sha256(told.encode()).hexdigest()[:6]}"
