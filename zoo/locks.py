"""An exclusive lock on an open file, which goes with the process that holds it."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
def alone_on_machine() -> Iterator[None]:
    """Wait until no other process of this machine is in here; on Windows, for none.

    What is locked is the folder of temporary files, so that nothing is left behind. UserError where
    its file system has no locks.
    """
    if fcntl is None:
        yield
        return
    path, folder = tempfile.gettempdir(), -1
    try:
        try:
            folder = os.open(path, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:
            rule = f"must be a folder that can be locked ({error.strerror})"
            refuse("TMPDIR", path, rule, "Use one of this machine's own file systems")
        yield
    finally:
        if folder >= 0:
            os.close(folder)


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
