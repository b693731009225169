"""Writes files and lines whole, whatever a kill or a full disk does, and reads damaged ones safely.

Every failure is a UserError of one line.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from zoo.errors import RunError, UserError, refuse, refuse_path, sentence

MAX_TEXT_BYTES = 2**26  # of a file that is read whole; ours have a few thousand
CHECK = "check"  # the field that holds the hash of the others
# Fields that came with it: the records of runs have the first, and so have rows.
CHECKED = ("sources", "measured_by")


def one_line(error: BaseException) -> str:
    """An error as one line, with its class's name where the text alone would not explain it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text, name = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, ValueError | RunError | KeyboardInterrupt):
        return text or name
    return f"{name}: {text}" if text else name


def cannot_write(path: Path, error: BaseException) -> UserError | None:
    """The UserError for a full disk or a read-only folder; None where `error` has another cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    rule = f"cannot be written ({cause.strerror or cause})"
    return UserError(sentence(str(path), rule, "Free some space, or choose another folder"))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write `path` whole or not at all: into a draft beside it, to the disk, then renamed.

    UserError where the disk is full or the folder read-only; the earlier file stays, as it does
    where a stop by signal comes between.
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
    except BaseException as error:
        with suppress(OSError):
            draft.unlink()
        known = isinstance(error, UserError) or not isinstance(error, Exception)
        if known or not (refusal := cannot_write(path, error)):
            raise
        raise refusal from error


@contextmanager
def drafted(draft: Path) -> Iterator[None]:
    """Make a folder and those above it that are missing; where what follows fails, none is left."""
    missing = [folder for folder in draft.parents if not folder.exists()]
    try:
        draft.mkdir(parents=True)
        yield
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


def check_path(option: str, path: str) -> None:
    """Refuse what can be no path, as the value of `option`."""
    if "\0" in path:
        refuse(option, path, "must be a path, and this has a byte of zero")


REPORT = b'<meta name="pictures"'  # every page that reports write has it


ROWS = b'{"format":'  # so begins every file of published rows


def check_report(option: str, path: str) -> None:
    """Refuse a file for a report; see `check_file`."""
    check_file(option, path, REPORT, "report", "report.html")


def check_file(option: str, path: str, mark: bytes, what: str, name: str) -> None:
    """Refuse a file, as the value of `option`, that cannot be written or is another's.

    One of before, which has the `mark` of `what` it is, may be replaced. Nothing is left behind.
    """
    check_path(option, path)
    file, theirs = Path(path), False
    if os.path.isdir(file):
        advice = f"Name a file in it, such as {file / name}"
        refuse(option, path, "cannot be written, it is a folder", advice)
    if os.path.exists(file) and not os.path.isfile(file):  # a pipe, a device: waited for, for ever
        refuse(option, path, "is no regular file", f"Name a file, such as {name}")
    try:
        if file.exists():
            open(file, "ab").close()
            theirs = mark not in file.read_bytes()
    except OSError as error:
        refuse(option, path, f"cannot be written ({error.strerror})", "Name a file elsewhere")
    check_place(option, path)
    if theirs:
        refuse(option, path, f"is there already and is no {what}", "Name a new file, or remove it")


def check_place(option: str, path: str) -> None:
    """Refuse a new file or folder, as the value of `option`, that cannot be made where it would be.

    Nothing is left behind.
    """
    check_path(option, path)
    whole = Path(path).absolute()
    folder = next(one for one in (*whole.parents, whole) if os.path.exists(one))  # / has no parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        rule = f"cannot be written ({folder}: {error.strerror})"
        refuse(option, path, rule, "Name one elsewhere")


def write_text(path: Path, text: str) -> None:
    """Replace a file's text, whole or not at all. UserError where it cannot be written."""
    with replacing(path) as file:
        file.write(text.encode())


def append_line(path: Path, line: str) -> None:
    """Add one line in a single write, on a new line even where a kill cut the last one.

    UserError where the file cannot be written.
    """
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
    """Read a file's text. UserError where it cannot be read, is not UTF-8 or is far too large."""
    reason = f"it has more than {MAX_TEXT_BYTES:,} bytes"
    try:
        if path.stat().st_size <= MAX_TEXT_BYTES:
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = one_line(error)
    refuse_path(path, f"is damaged ({reason})", "Restore it, or train a new run with fresh=true")


def parse_json(text: str) -> Any:
    """Parse JSON. ValueError where it is none, or is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def checked(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a hash of its fields, from which `altered` sees that one was changed."""
    fields = {key: value for key, value in record.items() if key != CHECK}
    return {**fields, CHECK: _hash(fields)}


def altered(record: dict[str, Any]) -> bool:
    """Remove the hash from a record and return whether another field was changed since.

    A record without a hash is unaltered where it is older than hashes: it has no field of CHECKED.
    """
    if CHECK not in record:
        return any(name in record for name in CHECKED)
    return record.pop(CHECK) != _hash(record)


def file_hash(file: Path) -> str:
    """The sha256 of a file's contents."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def as_it_is(file: Path) -> tuple[Path, int, int, int]:
    """A file with what changes when it is written to: the key of what was read of it."""
    status = file.stat()
    return file, status.st_mtime_ns, status.st_size, status.st_ino


def _hash(fields: Mapping[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(fields)), sort_keys=True)  # as it will be read again
    return hashlib.sha256(text.encode()).hexdigest()[:16]
