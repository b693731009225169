"""An exclusive lock on an open file, which goes with the process that holds it."""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from zoo.errors import refuse

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# On Windows a locked byte cannot be read by others: one that no file of ours is long enough for.
LOCKED_BYTE = 0x7FFF0000
PAUSE = 0.1  # seconds between two tries where the system cannot wait by itself


def lock_file(file: IO, *, wait: bool) -> None:
    """Take the lock; `wait` for whoever has it. Raises `BlockingIOError` where another has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    while not _lock_byte(file):
        if not wait:
            raise BlockingIOError(f"{file.name} is locked")
        time.sleep(PAUSE)


@contextmanager
def alone_on_machine(group: Path) -> Iterator[None]:
    """Wait until no other process of this machine is in here for the same group; on Windows, for
    none.

    What is locked is a file of the group in the folder of temporary files, which goes with the last
    process: the group itself, a run's folder, may lie on a file system of several machines.
    UserError where there are no locks.
    """
    if fcntl is None:
        yield
        return
    name = hashlib.sha256(str(group.resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"zoo-{name}.lock"
    held = -1
    try:
        try:
            held = _locked(path)
        except OSError as error:
            rule = f"must be a folder that can be locked ({error.strerror})"
            refuse("TMPDIR", path.parent, rule, "Use one of this machine's own file systems")
        yield
    finally:
        if held >= 0:
            path.unlink(missing_ok=True)  # while it is locked
            os.close(held)


def _locked(path: Path) -> int:
    """A descriptor of the file at a path, which is there and locked."""
    assert fcntl is not None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # whoever had it has removed it: the next one makes another


def _lock_byte(file: IO) -> bool:
    import msvcrt

    system: Any = msvcrt
    at = file.tell()
    file.seek(LOCKED_BYTE)
    try:
        system.locking(file.fileno(), system.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        file.seek(at)
    return True
