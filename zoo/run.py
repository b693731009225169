"""The run folder: the one record of a training run, and what train, eval and report meet through.

    config.yaml      the resolved configuration
    run.json         status (running | done | failed | stopped), reason, step, versions, commit ...
    metrics.csv      training and validation figures by step
    checkpoints/     last.ckpt and those before it
    results.jsonl    one measurement per line; a later line replaces an earlier one

Files are replaced whole or grow by whole lines, so a kill at any moment leaves a readable folder.
"""

import errno
import fcntl
import glob
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from zoo.config import TrainConfig, identity, plain, run_name, validate
from zoo.errors import UserError
from zoo.files import Metrics, append_line, cannot_write, one_line, write_text
from zoo.files import replacing as replacing  # part of what a run folder offers
from zoo.measurement import replaces
from zoo.options import ROOT, within
from zoo.schema import as_now

log = logging.getLogger("zoo")

# What a run that goes on may change; all else makes it another run.
RESUMABLE = ("trainer.max_steps", "trainer.devices", "logger", "workers", "threads")


def provenance() -> dict[str, Any]:
    """What produced a run: commit and dirty flag (null outside a checkout), versions, time."""
    return {**_checkout(), "versions": _versions(), "created": datetime.now(UTC).isoformat()}


def _checkout() -> dict[str, Any]:
    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT:
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        pass
    return {"commit": None, "dirty": None}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("zoo", "torch", "lightning"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


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
        draft = cls(path.with_name(f".{path.name}.{os.getpid()}.tmp"))
        try:
            (draft.path / "checkpoints").mkdir(parents=True)
            draft.save_config(config)
            start = {"status": "running", "reason": None, "step": 0, "tokens_seen": 0}
            write_text(draft.path / "run.json", json.dumps({**start, **info}, indent=2))
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
        _ = folder.config, folder.info
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
        if not path.exists():
            return cls.create(path, config, provenance())
        folder = cls.open(path)
        theirs, ours = identity(folder.config), identity(config)
        if differ := [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]:
            told = f"{folder} holds another run, which differs in {', '.join(differ)}"
            raise UserError(f"{told}: choose another name= or fresh=true")
        return folder

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> TrainConfig:
        """The resolved configuration."""
        file = self.path / "config.yaml"
        try:
            tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{file} is damaged: {one_line(error)}") from error
        try:
            return validate(TrainConfig, as_now(tree))
        except UserError as error:
            raise UserError(f"{file} is damaged or of another version: {error}") from error

    def save_config(self, config: TrainConfig) -> None:
        """Replace config.yaml; the folder is what `resume` names, so its copy does not."""
        tree = {**plain(config), "resume": None, "fresh": False}
        write_text(self.path / "config.yaml", yaml.safe_dump(tree, sort_keys=False))

    @property
    def info(self) -> dict[str, Any]:
        """run.json, read anew."""
        file = self.path / "run.json"
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is damaged: {one_line(error)}") from error
        if not isinstance(info, dict) or "status" not in info:
            raise UserError(f"{file} is damaged: it holds no status")
        return info

    def update(self, **changes: Any) -> None:
        """Change fields of run.json."""
        write_text(self.path / "run.json", json.dumps({**self.info, **changes}, indent=2))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against other processes; the lock goes with the process that has it.

        UserError where a live process trains in it. What a killed one left half-written goes.
        """
        try:
            file = open(self.path / ".lock", "a+")  # noqa: SIM115 (held while the caller works)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (self.path / ".lock").read_text().strip()
            raise UserError(f"{self} is already being trained by process {holder}") from None
        except OSError as error:
            raise cannot_write(self.path / ".lock", error) or error from error
        with file:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            for leftover in self.path.rglob(".*.tmp"):
                leftover.unlink()
            yield

    @contextmanager
    def training(self, *, keep: bool) -> Iterator[None]:
        """Lock the folder and record what ends the work in it: `failed` or `stopped`, and why.

        What the configuration is to blame for becomes a UserError. Before the first step it
        takes the folder with it if that is new, unless the record is to be kept (`keep`).
        """
        with self.lock():
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
                    with suppress(UserError):  # a full disk must not hide what happened
                        self.update(status=ended, reason=one_line(error))
                if isinstance(error, OSError) or (early and isinstance(error, ValueError)):
                    raise UserError(one_line(error)) from error
                raise

    def checkpoint(self) -> Path | None:
        """The last whole checkpoint; None before the first. UserError where all are damaged."""
        damaged: list[str] = []
        files = (self.path / "checkpoints").glob("*.ckpt")
        for file in sorted(files, key=_recency, reverse=True):
            if _is_whole(file):
                if damaged:
                    log.warning("%s: %s damaged, %s is whole", self, ", ".join(damaged), file.name)
                return file
            damaged.append(file.name)
        if damaged:
            raise UserError(f"{self} has no whole checkpoint: {', '.join(damaged)} damaged")
        return None

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add one measurement to results.jsonl."""
        append_line(self.path / "results.jsonl", json.dumps(dict(row)))

    def rows(self) -> list[dict[str, Any]]:
        """The measurements; of several that answer one question, and of several checkpoints'
        rows those of the last."""
        file = self.path / "results.jsonl"
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        weights = None
        for number, line in enumerate(file.read_text().splitlines() if file.exists() else (), 1):
            try:
                row = json.loads(line)
            except ValueError:
                log.warning("%s: line %d was not written whole and is left out", file, number)
                continue
            same = groups.setdefault(
                tuple(map(row.get, ("task", "protocol", "phase", "length"))), []
            )
            same[:] = [other for other in same if not replaces(row, other)] + [row]
            weights = row.get("train_steps")
        rows = [row for same in groups.values() for row in same]
        return [row for row in rows if row.get("train_steps") == weights]

    def metrics(self, columns: Sequence[str], *, step: int = 0) -> Metrics:
        """The writer of metrics.csv for a run that continues after `step`."""
        return Metrics(self.path / "metrics.csv", columns, step=step)


def _recency(file: Path) -> tuple[bool, list[int]]:
    """last.ckpt first, then by the numbers in the name (step=000200.ckpt)."""
    return file.stem == "last", [int(number) for number in re.findall(r"\d+", file.stem)]


def _is_whole(file: Path) -> bool:
    """Whether a torch checkpoint (a zip archive) has every byte it was written with."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except PermissionError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except Exception:  # a damaged archive fails in a dozen ways
        return False


def find_runs(patterns: str | Sequence[str], runs: str) -> list[RunFolder]:
    """The run folders that `patterns` name, as paths or within `runs`.

    UserError where one names none.
    """
    found: dict[Path, RunFolder] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        places = [pattern, os.path.join(runs, pattern)]
        if glob.has_magic(pattern):
            matches = [match for place in places for match in glob.glob(place, recursive=True)]
            paths = [match for match in sorted(matches) if Path(match, "run.json").is_file()]
        else:
            paths = [place for place in places if os.path.exists(place)][:1] or [pattern]
        if not paths:
            raise UserError(f"no run folder matches {pattern!r}")
        found |= {Path(path).resolve(): RunFolder.open(path) for path in paths}
    return list(found.values())


def resumed(tree: Mapping[str, Any], given: Sequence[str]) -> TrainConfig:
    """The configuration of the run `tree["resume"]`, with those of the options `given` that may
    change. UserError for any other, and where there is no whole run to resume."""
    folder = RunFolder.open(str(tree["resume"]))
    changes = [key for key in given if key != "resume"]
    if fixed := [key for key in changes if not within(key, RESUMABLE)]:
        told = (
            f"resume={folder} goes on with the run's own options: {', '.join(fixed)} cannot change"
        )
        raise UserError(f"{told} ({', '.join(RESUMABLE)} can)")
    folder.checkpoint()
    config = plain(folder.config)
    for key in changes:
        section, _, last = ("", "", "logger") if key.startswith("logger") else key.rpartition(".")
        (config[section] if section else config)[last] = (tree[section] if section else tree)[last]
    return validate(TrainConfig, {**config, "resume": str(folder)})


def with_found(extension: Mapping[str, Any], folder: RunFolder) -> dict[str, Any]:
    """The extension with the LongRoPE factors that a search has left in the run's folder.

    UserError where that search was of other settings.
    """
    scaling, file = extension["scaling"], folder.path / found_file(extension["factor"])
    if not isinstance(scaling, dict) or not file.is_file():
        return {**extension}
    if scaling.get("long_factors", ...) is not None:  # no LongRoPE, or its factors are given
        return {**extension}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["found"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged: {one_line(error)}") from error
    if scaling.get("magnitude") != found["magnitude"]:
        told = f"{file} was searched under extension.scaling.magnitude={found['magnitude']}"
        raise UserError(f"{told}, not {scaling.get('magnitude')}")
    return {**extension, "scaling": {**scaling, **found}}


def found_file(factor: float) -> str:
    """Where in a run's folder a LongRoPE search keeps itself and what it found."""
    return f"longrope-x{factor:g}.json"


def finetuned(tree: Mapping[str, Any], given: Sequence[str]) -> TrainConfig:
    """The configuration that trains the run `tree["finetune"]` further, under an extension.

    What was trained, on what and with which seed comes from that run, unless `given`. So does the
    window, times the extension's factor unless it places tokens. UserError where there is no whole
    run to start from.
    """
    folder = RunFolder.open(str(tree["finetune"]))
    folder.checkpoint()
    base = plain(folder.config)
    if fixed := [key for key in given if within(key, ("model", "size", "match", "objective"))]:
        raise UserError(f"finetune={folder} keeps its model: {', '.join(fixed)} cannot change")
    if base["extension"]["name"] != "none":
        raise UserError(f"finetune={folder} was fine-tuned itself: start from the run it came from")
    kept = {key: base[key] for key in ("model", "size", "match", "objective")}
    for section in ("data", "seed"):
        if not any(within(key, (section,)) for key in given):
            kept[section] = base[section]
    extension = with_found(tree["extension"], folder)
    extension["original_length"] = extension.get("original_length") or base["seq_len"]
    if "seq_len" not in given:
        longer = 1 if extension.get("positions") else extension["factor"]
        kept["seq_len"] = int(base["seq_len"] * longer)
    tree = {**tree, **kept, "extension": extension, "finetune": str(folder)}
    return validate(TrainConfig, tree)
