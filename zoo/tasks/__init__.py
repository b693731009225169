"""Measurements of trained models, and the driver that runs them over run folders.

A task is a function `measure(subject, **settings)` that yields one row per measurement, as it is
made. `evaluate` adds who was measured, appends the rows to the run's `results.jsonl` and reports.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from zoo.config import plain
from zoo.data.corpora import open_corpus
from zoo.errors import UserError
from zoo.extend import extend
from zoo.learner import device_name, load, pick_device
from zoo.report import write_report
from zoo.report.rows import gather
from zoo.report.text import as_text
from zoo.report.wandb import mirror
from zoo.run import RunFolder, with_found
from zoo.schema import EvalConfig, Extension
from zoo.tasks.progress import Progress
from zoo.tasks.score import AUTOCAST, NotApplicableError, Row, Subject, attempt, told

EXTENDED = ("arm", "extension", "extension_factor", "extension_settings")  # what tells them apart


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
    extensions stands beside it in the report. The code is 0, or 1 where a run or a measurement
    failed or nothing was measured. Raises UserError for settings that fit no run, such as an
    extension that does not apply to the only one.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device, progress = pick_device(config.device), progress or Progress.on_stderr()
    rows, runs, statuses = [], [], set()
    for folder in folders:
        progress.run = folder.name
        extension = _found(config.extension, folder)
        about = _identity(extension, folder, device)
        runs.append(about | folder.info)
        settled = config.model_copy(update={"extension": extension})
        asked: list[Row] = []
        found = list(_measure_run(settled, folder, about, device, progress, fresh, asked))
        if len(folders) == 1 and all(row["status"] == "not_applicable" for row in found):
            raise UserError(found[0]["reason"])
        statuses |= {row["status"] for row in found}
        rows += [*found, *_under_others(folder, about, asked)]
        progress.clear()
    if config.report:
        page = Path(config.report)
        say(write_report(rows, runs, page, page.parent / "report"))
    else:
        say(as_text(gather(rows, runs)))
    if config.logger.name == "wandb":
        mirror(rows, runs, Path(config.runs), config.logger.mode, project=config.logger.project)
    return int("failed" in statuses or "ok" not in statuses)


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
    measured at all is in its run.json; such rows are not appended.
    """
    why = _not_done(folder.info)
    if not why:
        opened = attempt(lambda: _open(config, folder, device, progress))
        why = {} if opened.ok else opened.row
    if why:
        yield from (about | {"task": task} | why for task in config.task)
        return
    for task, part in config.task.items():
        named, reused = about | {"task": task}, []
        known = [] if fresh else [row for row in folder.rows() if _holds(row, named)]

        def measured(key: Row, known=known, reused=reused, task=task) -> bool:
            asked.append({"task": task} | key)
            same = [row for row in known if row["status"] == "ok" and _holds(row, key)]
            reused.extend(same[-1:])
            return bool(same)

        try:
            for found in part.load()(replace(opened.value, measured=measured)):
                now = datetime.now(UTC).isoformat(timespec="seconds")
                row = named | found | {"time": now}
                folder.append_row(row)
                yield row
        except UserError:
            raise  # the settings': no other run would do better
        except Exception as error:
            yield named | told(error)
        yield from reused


def _under_others(folder: RunFolder, about: Row, asked: Sequence[Row]) -> Iterator[Row]:
    """The last answers to the same questions by the same weights under other extensions."""
    alike = {name: value for name, value in about.items() if name not in EXTENDED}
    rows = [row for row in folder.rows() if row["status"] == "ok" and _holds(row, alike)]
    for key in asked:
        same = {row["extension_settings"]: row for row in rows if _holds(row, key)}
        yield from (row for name, row in same.items() if name != about["extension_settings"])


def _not_done(info: Row) -> Row:
    """Status and reason of a run that cannot be measured, or nothing."""
    if info["status"] == "done":
        return {}
    status = "failed" if info["status"] == "failed" else "unfinished"
    stopped = f"training is {info['status']} at step {info.get('step', 0)}"
    return {"status": status, "reason": info.get("reason") or stopped}


def _open(
    config: EvalConfig, folder: RunFolder, device: torch.device, progress: Progress
) -> Subject:
    """The run's model and text. UserError where either is gone, or the text is another one."""
    trained, info = folder.config, folder.info
    data = plain(trained)["data"]
    corpus = open_corpus(data, Path(data["cache"]))
    if corpus.fingerprint != info["fingerprint"]:
        raise UserError(
            f"data={corpus.name} is not the text the run was trained on: its fingerprint is "
            f"{corpus.fingerprint[:8]}, the run's {info['fingerprint'][:8]}"
        )
    model = load(folder, device)
    try:
        extend(model, config.extension, trained.seq_len)
    except UserError as error:
        raise NotApplicableError(str(error)) from None
    return Subject(
        model=model,
        corpus=corpus,
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
        "parameters": info.get("parameters"),
        "flops_per_token": info.get("flops_per_token"),
        "train_length": trained.seq_len,
        "train_tokens": info.get("tokens_seen"),
        "train_steps": info.get("step"),
        "lr": trained.optim.lr,
        "match": trained.match,
        "state_passing": trained.state_passing,
        "data": trained.data.name,
        "fingerprint": info.get("fingerprint"),
        "tokenizer": info.get("tokenizer"),
        "commit": info.get("commit"),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _label(extension: Extension) -> str:
    return extension.name + (f" x{extension.factor:g}" if extension.factor > 1 else "")


def _settings(extension: Extension) -> str:
    """A name for the extension with all its settings, the same for the same ones."""
    if extension.name == "none":
        return "none"
    told = json.dumps(plain(extension), sort_keys=True)
    return f"{extension.name}-{hashlib.sha256(told.encode()).hexdigest()[:6]}"


def _holds(row: Row, part: Row) -> bool:
    """Whether the row has these fields, as JSON would have written them."""
    return all(row.get(name) == json.loads(json.dumps(value)) for name, value in part.items())
