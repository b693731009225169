"""An exclusive lock on an open file, which goes with the process that holds it."""

import time
from typing import IO, Any

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
