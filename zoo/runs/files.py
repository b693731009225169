"""Writes that survive a kill, a full disk and a read-only folder: whole files, whole lines.

And reads that survive what such a file was altered to: a damaged one is a UserError of one line, a
damaged line is left out and said.
"""

import csv
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from zoo.errors import RunError, UserError

log = logging.getLogger("zoo")

LARGEST = 2**26  # bytes of a text file that is read whole; ours have a few thousand
CHECK = "check"  # the field that holds the hash of the others


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
    draft = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    try:
        with open(draft, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        if sys.platform != "win32":  # where a folder can be opened
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


def read_text(path: Path) -> str:
    """A file's text. UserError where it cannot be read, is not UTF-8 or is far too large."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is damaged: it has more than {LARGEST:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error


def parse_json(text: str) -> Any:
    """What JSON says, or ValueError: nesting too deep for Python is one too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def checked(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a hash of its fields, by which `altered` tells that one was changed."""
    fields = {key: value for key, value in record.items() if key != CHECK}
    return {**fields, CHECK: _hash(fields)}


def altered(record: dict[str, Any]) -> bool:
    """Take the hash out of a record; whether it says that another field was changed.

    Records without one, of before there was any, are taken as they stand.
    """
    return CHECK in record and record.pop(CHECK) != _hash(record)


def _hash(fields: Mapping[str, Any]) -> str:
    told = json.dumps(json.loads(json.dumps(fields)), sort_keys=True)  # as it will be read again
    return hashlib.sha256(told.encode()).hexdigest()[:16]


class Metrics:
    """Figures by step as CSV: the column `step`, then `columns`; empty where a row has none."""

    def __init__(self, path: Path, columns: Sequence[str], *, step: int = 0) -> None:
        self.path = path
        self.kept = kept = [row for row in read_metrics(path) if int(row["step"]) <= step]
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


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; none where there is no file.

    Left out: a last line without an end, which a kill cut, and in words lines that hold no row of
    figures under the header.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if not lines:
        return []
    header, bad, rows = _fields(lines[0]), [], []
    if not header or header[0] != "step" or len(set(header)) < len(header) or "" in header:
        log.warning("%s is damaged: it does not begin with the names of its columns", path)
        return []
    for number, line in enumerate(lines[1:], 2):
        fields = _fields(line)
        if len(fields) == len(header) and _step(fields[0]) and all(map(_figure, fields)):
            rows.append(dict(zip(header, fields, strict=True)))
        else:
            bad.append(number)
    if bad:
        log.warning(
            "%s: %d lines hold no figures and are left out (line %d)", path, len(bad), bad[0]
        )
    return rows


def _fields(line: bytes) -> list[str]:
    """What a line of CSV holds; nothing where it is no text."""
    try:
        return next(csv.reader([line.decode("ascii")]), []) if b"\0" not in line else []
    except (UnicodeDecodeError, csv.Error):
        return []


def _figure(text: str) -> bool:
    try:
        return not text or float(text) is not None
    except ValueError:
        return False


def _step(text: str) -> bool:
    return text.isdecimal() and len(text) < 19
