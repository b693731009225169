"""The run folder: the record of a training run, through which train, eval and report meet.

    config.yaml      the resolved configuration
    run.json         status (running | done | failed | stopped), reason, step, versions, commit ...
    metrics.csv      training and validation figures by step
    checkpoints/     step=<number>.ckpt, the last two
    results.jsonl    one measurement per line; a later line replaces an earlier one
    documents.json   which documents of the corpus went into which split

Files are replaced whole or grow by whole lines, so a kill at any moment leaves a readable folder.
config.yaml, run.json, checkpoints and rows hold hashes of themselves, and config.yaml and the
checkpoints the id of their run: altered files and those of another run are recognised.
"""

import errno
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zoo.config.schema.train import TrainConfig
from zoo.errors import UserError, refuse_path
from zoo.locks import lock_file
from zoo.runs import checkpoints, rows
from zoo.runs.checkpoints import Checkpoint
from zoo.runs.files import altered, cannot_write, drafted, one_line
from zoo.runs.metrics import MetricsFile, last_metric
from zoo.runs.record import read_config, read_info, write_config, write_info

log = logging.getLogger("zoo")


class RunFolder:
    """One run's folder; get it from `create`, `open`, `zoo.runs.claim` or `zoo.runs.find`."""

    def __init__(self, path: Path, *, created: bool = False) -> None:
        self.path = path
        self.created = created  # by this process

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def create(
        cls,
        path: Path,
        config: TrainConfig,
        info: Mapping[str, Any],
        fill: Callable[["RunFolder"], object] = lambda _: None,
    ) -> "RunFolder":
        """Create a folder, which appears whole; the existing one if another process was first.

        `fill` writes what it holds from the start. Raises UserError where it cannot be written.
        """
        draft = cls(path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp"))
        try:
            _remove_drafts(path.parent)
            with drafted(draft.path):
                (draft.path / "checkpoints").mkdir()
                start = {"status": "running", "reason": None, "step": 0, "tokens_seen": 0}
                write_info(draft.path / "run.json", {**start, **info})
                draft.save_config(config)
                fill(draft)
                os.rename(draft.path, path)
        except (OSError, UserError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return cls.open(path)
            raise cannot_write(path, error) or error from error
        return cls(path, created=True)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open an existing folder and read its configuration and run.json once.

        Raises UserError where it is no run folder or one of the two is damaged.
        """
        folder = cls(Path(path))
        advice = "Give a run folder, such as runs/<name>"
        if not os.path.isdir(path):  # False for what no folder can be called
            refuse_path(path, "there is no such run folder", advice)
        for name in ("config.yaml", "run.json"):
            if not (folder.path / name).is_file():
                refuse_path(path, f"is not a run folder, it has no {name}", advice)
        _ = folder.config
        if altered(read_info(folder.path / "run.json")):
            log.warning(
                "%s was altered since it was written: its figures are used as they are",
                folder.path / "run.json",
            )
        return folder

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> TrainConfig:
        """The resolved configuration. UserError where it was altered since it was written."""
        return read_config(self.path / "config.yaml", self.info.get("id"))

    def save_config(self, config: TrainConfig) -> None:
        """Replace config.yaml."""
        write_config(self.path / "config.yaml", config, self.info.get("id"))

    @property
    def info(self) -> dict[str, Any]:
        """run.json, read anew, without its hash. UserError where it is damaged."""
        info = read_info(self.path / "run.json")
        altered(info)
        return info

    def update(self, **changes: Any) -> None:
        """Change fields of run.json."""
        write_info(self.path / "run.json", {**self.info, **changes})

    @property
    def step(self) -> int:
        """The steps that it has: a kill may come between a checkpoint and its note in run.json.

        UserError where there are checkpoints and none is whole.
        """
        last = next(self.whole_checkpoints(), None)
        return max(self.info["step"], (last and last.step) or 0)

    def record_stop(self, reason: str) -> None:
        """Record in run.json that the run was stopped, and why."""
        self.update(status="stopped", reason=reason)

    def is_trained(self, config: TrainConfig) -> bool:
        """Whether the run has all the steps of `config`: not where the last of them are lost.

        UserError where there are checkpoints and none is whole.
        """
        info, steps = self.info, config.trainer.max_steps
        if info["status"] != "done" or info["step"] < steps:
            return False
        last = next(self.whole_checkpoints(), None)
        return last is None or last.step is None or last.step >= min(steps, info["step"])

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against other processes; the lock goes with the process that has it.

        Half-written files of a killed process are removed. UserError where a live process has it.
        """
        path = self.path / ".lock"
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held while the caller works)
            lock_file(file, wait=False)
        except BlockingIOError:
            holder = path.read_text(encoding="utf-8", errors="replace").strip()
            refuse_path(
                self.path,
                f"is already being trained by process {holder}",
                "Wait until it has ended, or stop it",
            )
        except OSError as error:
            raise cannot_write(path, error) or error from error
        with file:
            try:
                file.truncate(0)
                os.write(file.fileno(), str(os.getpid()).encode())
                for leftover in self.path.rglob(".*.tmp"):
                    leftover.unlink()
                (self.path / "checkpoints").mkdir(exist_ok=True)
            except OSError as error:
                raise cannot_write(self.path, error) or error from error
            yield

    @contextmanager
    def training(self, *, keep: bool) -> Iterator[None]:
        """Lock the folder while the caller trains, and record how that ends and why.

        A ValueError before the first step is the configuration's fault: it becomes a UserError and
        removes a folder that this process created, unless `keep`. A run that already had steps and
        is refused more of them keeps its status.
        """
        with self.lock():
            before = self.info
            self.update(status="running", reason=None)
            try:
                yield
            except BaseException as error:
                early = not self.info.get("step") and isinstance(error, ValueError)
                if early and self.created and not keep:
                    shutil.rmtree(self.path)
                    with suppress(OSError):
                        self.path.parent.rmdir()  # if this run was the first
                else:
                    with suppress(UserError):  # a full disk must not hide what happened
                        self._record_end(error, before)
                if isinstance(error, OSError) or early:
                    raise UserError(one_line(error)) from error
                raise

    def _record_end(self, error: BaseException, before: Mapping[str, Any]) -> None:
        """Record the error that ended the training in a folder whose run.json was `before`."""
        status = "failed" if isinstance(error, Exception) else "stopped"
        reason = one_line(error)
        refused = isinstance(error, UserError) and before["status"] != "running"
        if refused and before["step"] and self.info["step"] == before["step"]:
            status, reason = before["status"], before["reason"]
        self.update(status=status, reason=reason)

    def checkpoint(self) -> Path | None:
        """The last whole checkpoint; None before the first. UserError where all are damaged."""
        last = next(self.whole_checkpoints(), None)
        return last and last.path

    def whole_checkpoints(self) -> Iterator[Checkpoint]:
        """The undamaged checkpoints of this run, the last first.

        Those passed over are named in a warning. UserError where there are files but none is whole.
        """
        info = self.info
        return checkpoints.find_whole(self.path, run_id=info.get("id"), steps=info["step"])

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add one measurement to results.jsonl."""
        rows.append_row(self.path / "results.jsonl", row)

    def rows(self) -> list[dict[str, Any]]:
        """The measurements in results.jsonl, see `zoo.runs.rows.read_rows`."""
        return rows.read_rows(self.path / "results.jsonl")

    def last_metric(self, column: str) -> float | None:
        """The last figure in a column of metrics.csv; None where there is none."""
        return last_metric(self.path / "metrics.csv", column)

    def metrics(self, columns: Sequence[str], *, step: int = 0) -> MetricsFile:
        """The writer of metrics.csv for a run that continues after `step`."""
        return MetricsFile(self.path / "metrics.csv", columns, step=step)


def _remove_drafts(runs: Path) -> None:
    """Remove the drafts of processes that died in `create`: `.<name>.<host>.<pid>.tmp`."""
    for draft in runs.glob(".*.tmp"):
        _, *rest, pid, _ = draft.name.split(".")
        here = draft.name.endswith(f".{platform.node()}.{pid}.tmp") or len(rest) < 2
        if here and pid.isdecimal() and draft.is_dir() and not _is_alive(int(pid)):
            shutil.rmtree(draft, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True
