"""The run folder: the one record of a training run, and what train, eval and report meet through.

    config.yaml      the resolved configuration
    run.json         status (running | done | failed | stopped), reason, step, versions, commit ...
    metrics.csv      training and validation figures by step
    checkpoints/     last.ckpt and those before it
    results.jsonl    one measurement per line; a later line replaces an earlier one
    documents.json   which files of the corpus went into which split

Files are replaced whole or grow by whole lines, so a kill at any moment leaves a readable folder.
What was altered since it was written is told: config.yaml, checkpoints and rows hold hashes of
themselves and, the first two, the id of their run, so that another run's file is told as well.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import textwrap
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from zoo.config.schema import TrainConfig
from zoo.config.stored import as_now, row_as_now
from zoo.config.validate import plain, validate
from zoo.errors import UserError
from zoo.locks import lock_file
from zoo.measurement import replaces
from zoo.runs import checkpoints
from zoo.runs.checkpoints import Checkpoint
from zoo.runs.drafts import remove_drafts
from zoo.runs.files import (
    Metrics,
    altered,
    append_line,
    cannot_write,
    checked,
    one_line,
    parse_json,
    read_metrics,
    read_text,
    write_text,
)
from zoo.runs.files import replacing as replacing  # part of what a run folder offers
from zoo.runs.identity import identity, run_name
from zoo.runs.provenance import changed, digest, provenance, sources

log = logging.getLogger("zoo")

STATUSES = ("running", "done", "failed", "stopped")
# What else run.json may hold is shown, not reckoned with.
WORDS = ("reason", "fingerprint", "tokenizer", "device", "id", "sources", "commit")
COUNTS = ("tokens_seen", "tokens_per_step", "parameters")
TOLD = 300  # characters of what a damaged file holds
HEADER = "# sha256 "


class RunFolder:
    """One run's folder; get it from `create`, `open`, `claim` or `find_runs`."""

    def __init__(self, path: Path, *, created: bool = False) -> None:
        self.path = path
        self.created = created  # by this process

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def create(cls, path: Path, config: TrainConfig, info: Mapping[str, Any]) -> "RunFolder":
        """A new folder, which appears whole; the existing one where another process was first."""
        draft = cls(path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp"))
        try:
            remove_drafts(path.parent)
            (draft.path / "checkpoints").mkdir(parents=True)
            start = {"status": "running", "reason": None, "step": 0, "tokens_seen": 0}
            draft._write_info({**start, **info})
            draft.save_config(config)
            os.rename(draft.path, path)
        except (OSError, UserError) as error:
            shutil.rmtree(draft.path, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return cls.open(path)
            raise cannot_write(path, error) or error from error
        return cls(path, created=True)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing folder, its configuration and run.json read once to see that they are whole.

        UserError where it is no run folder or damaged.
        """
        folder = cls(Path(path))
        if not folder.path.is_dir():
            raise UserError(f"there is no run folder {folder}")
        for name in ("config.yaml", "run.json"):
            if not (folder.path / name).is_file():
                raise UserError(f"{folder} is not a run folder: it has no {name}")
        _ = folder.config
        if altered(folder._read_info()):
            told = "was altered since it was written: its figures are taken as they stand"
            log.warning("%s %s", folder.path / "run.json", told)
        return folder

    @classmethod
    def claim(cls, config: TrainConfig) -> "RunFolder":
        """The folder this configuration trains in: the one to resume, the one the same command
        left before, or a new one."""
        if config.resume:
            return cls.open(config.resume)
        path = base = Path(config.runs) / run_name(config)
        number = 1
        while config.fresh and path.exists():
            number += 1
            path = base.with_name(f"{base.name}-{number}")
        base = _base(config)
        if not path.exists():
            files = sources(config)
            made = {"id": uuid.uuid4().hex[:12], **provenance(), **base}
            return cls.create(path, config, {**made, "sources": digest(files), "files": files})
        folder = cls.open(path)
        theirs, ours = identity(folder.config), identity(config)
        if differ := [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]:
            told = f"{folder} holds another run, which differs in {', '.join(differ)}"
            raise UserError(f"{told}: choose another name= or fresh=true")
        before = folder.info.get("base")
        if base and isinstance(before, dict) and before.get("weights") != base["base"]["weights"]:
            told = f"{folder} was fine-tuned from other weights than {config.finetune} now holds"
            raise UserError(f"{told}: fresh=true fine-tunes these, in a new run")
        return folder

    @contextmanager
    def going_on(self, config: TrainConfig) -> Iterator[None]:
        """Record a configuration and the code it runs by while the caller trains under them.

        A UserError before the first step of it puts back what was recorded.
        """
        before, info = self.config, self.info
        self.save_config(config)
        self.record_code(config)
        try:
            yield
        except UserError:
            if self.path.exists() and self.info["step"] == info["step"]:
                self.save_config(before)
                kept = {name: info.get(name) for name in ("sources", "files", "earlier_sources")}
                self.update(**{name: value for name, value in kept.items() if value is not None})
            raise

    def changed_code(self, config: TrainConfig) -> list[str] | None:
        """The files behind the run's numbers that changed since it was trained.

        None where that is not known: the run is older than the record, or has no step yet.
        """
        info = self.info
        if not info["step"] or not info.get("sources"):
            return None
        files, before = sources(config), info.get("files")
        if digest(files) == info["sources"]:
            return []
        return changed(before, files) if isinstance(before, dict) else ["files not recorded"]

    def record_code(self, config: TrainConfig) -> None:
        """Note in run.json the code that trains the run from now on, and what it was before."""
        info, files = self.info, sources(config)
        now, before = digest(files), info.get("sources")
        if info["step"] and not before:
            return  # its first steps were taken by code that nobody knows
        earlier = list(info.get("earlier_sources") or [])
        if info["step"] and before != now:
            earlier.append({"sources": before, "until_step": info["step"]})
        self.update(sources=now, files=files, earlier_sources=earlier)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> TrainConfig:
        """The resolved configuration. UserError where it was altered since it was written."""
        file = self.path / "config.yaml"
        text = read_text(file)
        header, _, rest = text.partition("\n")
        if header.startswith(HEADER) and header.split()[2] != self._config_hash(rest):
            told = "was altered since the run began, or is another run's: put it back, or remove"
            raise UserError(f"{file} {told} its first line to have it taken as it stands")
        try:
            tree = yaml.safe_load(text)
            if not isinstance(tree, dict):
                raise UserError("it holds no options")
            return validate(TrainConfig, as_now(tree))
        except RecursionError:
            raise UserError(f"{file} is damaged: it is nested too deeply") from None
        except UserError as error:
            told = textwrap.shorten(str(error), TOLD)
            raise UserError(f"{file} is damaged or of another version: {told}") from error
        except (ValueError, yaml.YAMLError) as error:
            told = textwrap.shorten(one_line(error), TOLD)
            raise UserError(f"{file} is damaged: {told}") from error

    def save_config(self, config: TrainConfig) -> None:
        """Replace config.yaml; the folder is what `resume` names, so its copy does not.

        Nor does it say `changed_code`, which is a word for one time.
        """
        tree = {**plain(config), "resume": None, "fresh": False}
        tree.pop("changed_code", None)
        text = yaml.safe_dump(tree, sort_keys=False)
        header = f"{HEADER}{self._config_hash(text)} of what follows"
        write_text(self.path / "config.yaml", f"{header}\n{text}")

    def _config_hash(self, text: str) -> str:
        told = f"{self.info.get('id')}\n{text}"
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def info(self) -> dict[str, Any]:
        """run.json, read anew."""
        info = self._read_info()
        altered(info)
        return info

    def _read_info(self) -> dict[str, Any]:
        """run.json with the hash in it. UserError where its fields are not what they must be."""
        file = self.path / "run.json"
        try:
            info = parse_json(read_text(file))
            if not isinstance(info, dict):
                raise ValueError("it holds no fields")
            if (status := info.get("status")) not in STATUSES:
                raise ValueError(f"status={status!r} must be one of {', '.join(STATUSES)}")
            if not _is_count(info.get("step")):
                raise ValueError(f"step={info.get('step')!r} must be a number of steps")
            for name in COUNTS:
                if info.get(name) is not None and not _is_count(info[name]):
                    raise ValueError(f"{name}={info[name]!r} must be a whole number or null")
            for name in WORDS:
                if info.get(name) is not None and not isinstance(info[name], str):
                    raise ValueError(f"{name}={info[name]!r} must be text or null")
        except ValueError as error:
            told = textwrap.shorten(one_line(error).removeprefix(f"{file} is damaged: "), TOLD)
            raise UserError(f"{file} is damaged: {told}") from error
        return info

    def update(self, **changes: Any) -> None:
        """Change fields of run.json."""
        self._write_info({**self.info, **changes})

    def _write_info(self, info: Mapping[str, Any]) -> None:
        write_text(self.path / "run.json", json.dumps(checked(info), indent=2))

    def stopped(self, reason: str) -> None:
        """Record that the work in it was stopped."""
        self.update(status="stopped", reason=reason)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against other processes; the lock goes with the process that has it.

        UserError where a live process trains in it. What a killed one left half-written goes.
        """
        try:
            lock = self.path / ".lock"
            file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 (held while the caller works)
            lock_file(file, wait=False)
        except BlockingIOError:
            holder = (self.path / ".lock").read_text(encoding="utf-8", errors="replace").strip()
            raise UserError(f"{self} is already being trained by process {holder}") from None
        except OSError as error:
            raise cannot_write(self.path / ".lock", error) or error from error
        with file:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            for leftover in self.path.rglob(".*.tmp"):
                leftover.unlink()
            (self.path / "checkpoints").mkdir(exist_ok=True)
            yield

    @contextmanager
    def training(self, *, keep: bool) -> Iterator[None]:
        """Lock the folder and record what ends the work in it: `failed` or `stopped`, and why.

        What the configuration is to blame for becomes a UserError. Before the first step it
        takes the folder with it if that is new, unless the record is to be kept (`keep`). A run
        that had steps and is refused more of them stays what it was.
        """
        with self.lock():
            before = self.info
            self.update(status="running", reason=None)
            try:
                yield
            except BaseException as error:
                early = not self.info.get("step")
                if early and self.created and not keep and isinstance(error, ValueError):
                    shutil.rmtree(self.path)
                    with suppress(OSError):
                        self.path.parent.rmdir()  # if this run was the first
                else:
                    ended = "failed" if isinstance(error, Exception) else "stopped"
                    reason = one_line(error)
                    refused = isinstance(error, UserError) and before["status"] != "running"
                    if refused and before["step"] and self.info["step"] == before["step"]:
                        ended, reason = before["status"], before["reason"]
                    with suppress(UserError):  # a full disk must not hide what happened
                        self.update(status=ended, reason=reason)
                if isinstance(error, OSError) or (early and isinstance(error, ValueError)):
                    raise UserError(one_line(error)) from error
                raise

    def checkpoint(self) -> Path | None:
        """The last whole checkpoint; None before the first. UserError where all are damaged."""
        last = next(self.whole_checkpoints(), None)
        return last and last.path

    def whole_checkpoints(self) -> Iterator[Checkpoint]:
        """The checkpoints of this run that have every byte they were written with, last first.

        Those passed over are named in a warning. UserError where there are files and none is good.
        """
        info, damaged, foreign, found = self.info, [], [], 0
        files = (self.path / "checkpoints").glob("*.ckpt")
        for file in sorted(files, key=checkpoints.recency, reverse=True):
            whole = checkpoints.read(file)
            if whole is None:
                damaged.append(file.name)
            elif whole.run and info.get("id") and whole.run != info["id"]:
                foreign.append(file.name)
            else:
                if bad := _passed_over(damaged, foreign):
                    self._warn(f"{bad}, {file.name} is whole")
                elif not found and whole.run and (whole.step or 0) < info["step"]:
                    self._warn(
                        f"the last of its {info['step']} steps are gone, {file.name} is left"
                    )
                damaged, foreign = [], []
                found += 1
                yield whole
        if not found and (bad := _passed_over(damaged, foreign)):
            raise UserError(f"{self} has no whole checkpoint: {bad}")

    def _warn(self, message: str) -> None:
        """Say it once in this process: a checkpoint is looked for several times."""
        if (said := (self.path.resolve(), message)) not in _said:
            _said.add(said)
            log.warning("%s: %s", self, message)

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add one measurement to results.jsonl."""
        append_line(self.path / "results.jsonl", json.dumps(checked(row)))

    def rows(self) -> list[dict[str, Any]]:
        """The measurements; of several that answer one question, and of several checkpoints'
        rows those of the last."""
        file = self.path / "results.jsonl"
        try:
            lines = file.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {file}: {one_line(error)}") from error
        groups: dict[str, list[dict[str, Any]]] = {}
        weights = None
        for number, line in enumerate(lines, 1):
            if not line and number == len(lines):
                continue
            row = _row(line)
            if isinstance(row, str):
                log.warning("%s: line %d %s and is left out", file, number, row)
                continue
            key = json.dumps([row.get(name) for name in ("task", "protocol", "phase", "length")])
            same = groups.setdefault(key, [])
            same[:] = [other for other in same if not replaces(row, other)] + [row]
            weights = row.get("train_steps")
        rows = [row for same in groups.values() for row in same]
        return [row for row in rows if row.get("train_steps") == weights]

    def last_figure(self, column: str) -> float | None:
        """The last figure in a column of metrics.csv; None where there is none."""
        found = [row[column] for row in read_metrics(self.path / "metrics.csv") if row.get(column)]
        return float(found[-1]) if found else None

    def metrics(self, columns: Sequence[str], *, step: int = 0) -> Metrics:
        """The writer of metrics.csv for a run that continues after `step`."""
        return Metrics(self.path / "metrics.csv", columns, step=step)


_said: set[tuple[Path, str]] = set()


def _passed_over(damaged: Sequence[str], foreign: Sequence[str]) -> str:
    told = [f"{', '.join(damaged)} damaged"] if damaged else []
    return ", ".join([*told, *(f"{name} is another run's" for name in foreign)])


def _base(config: TrainConfig) -> dict[str, Any]:
    """What run.json says of the run that this one fine-tunes: which weights, made by what code."""
    if not config.finetune:
        return {}
    folder = RunFolder.open(config.finetune)
    weights = next(folder.whole_checkpoints(), None)
    info = {"run": config.finetune, "weights": weights and weights.content}
    return {"base": {**info, "sources": trained_by(folder.info)}}


def trained_by(info: Mapping[str, Any]) -> str | None:
    """One name for all code that made a run's weights: its base's, before a resume, and since.

    None for a run that is older than the record; a part of it may be `unknown`.
    """
    base, earlier = info.get("base"), info.get("earlier_sources")
    parts = [base.get("sources") or "unknown"] if isinstance(base, dict) else []
    parts += [str(part["sources"]) for part in earlier] if isinstance(earlier, list) else []
    parts += [info.get("sources") or "unknown"]
    told = "+".join(dict.fromkeys(parts))
    return None if told == "unknown" else told


def _row(line: bytes) -> dict[str, Any] | str:
    """The measurement in a line of results.jsonl, or what is wrong with it."""
    try:
        row = parse_json(line.decode("utf-8"))
    except ValueError:
        return "was not written whole"
    if not isinstance(row, dict) or not row:
        return "holds no measurement"
    if altered(row):
        return "was altered since it was written"
    asked = row.get("question") or []
    if not isinstance(row.get("task", ""), str) or not isinstance(asked, list):
        return "holds no measurement"
    if not all(isinstance(name, str) for name in asked):
        return "holds no measurement"
    return row_as_now(row)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
