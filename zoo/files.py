"""Writes that survive a kill, a full disk and a read-only folder: whole files, whole lines."""

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from zoo.errors import RunError, UserError


def one_line(error: BaseException) -> str:
    """What went wrong, for people: without the class's name where the text speaks for itself."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text, name = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, ValueError | RunError | KeyboardInterrupt):
        return text or name
    return f"{name}: {text}" if text else name


def cannot_write(path: Path, error: BaseException) -> UserError | None:
    """The line for a full disk or a read-only folder, if one is what lies behind `error`."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause and UserError(f"cannot write {path}: {cause.strerror or cause}")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write `path` whole or not at all: into a neighbour, to the disk, then renamed.

    UserError where the disk is full or the folder read-only; what was there stays.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk
        os.fsync(folder)
        os.close(folder)
    except Exception as error:
        with suppress(OSError):
            draft.unlink()
        if isinstance(error, UserError) or not (told := cannot_write(path, error)):
            raise
        raise told from error


def check_writable(option: str, path: str) -> None:
    """Refuse a file that could not be written. Nothing is left behind.

    UserError names `option`.
    """
    file, told = Path(path), f"{option}={path}: cannot be written"
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if file.is_dir():
        raise UserError(
            f"{told}, it is a folder. Name a file in it, such as {file / 'report.html'}."
        )
    try:
        if file.exists():
            open(file, "ab").close()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{told} ({folder}: {error.strerror}). Name a file elsewhere.") from None


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def append_line(path: Path, line: str) -> None:
    """Add one line in one write, whatever a kill left behind the last whole line."""
    try:
        with open(path, "a+b") as file:
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) or error from error


class Metrics:
    """Figures by step as CSV: the column `step`, then `columns`; empty where a row has none."""

    def __init__(self, path: Path, columns: Sequence[str], *, step: int = 0) -> None:
        self.path = path
        kept = [row for row in _read_metrics(path) if int(row["step"]) <= step]
        older = [key for row in kept for key in row]
        self.columns = list(dict.fromkeys(["step", *columns, *older]))
        write_text(path, self._csv(kept, header=True))

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the figures of one step; ValueError for a column not declared."""
        append_line(self.path, self._csv([row]).rstrip("\n"))

    def _csv(self, rows: Iterable[Mapping[str, Any]], header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows whose line ends: a kill may have cut the last one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))
