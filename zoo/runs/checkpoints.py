"""Checkpoint files: told whole from damaged, and this run's from another's, without torch.

A checkpoint is torch's zip archive. Its end, where zip keeps a comment, holds a seal: the run's id,
the step, and a hash over every byte before. Files of before the seal are checked by the CRC of
each part, which does not cover the archive's own directory.
"""

import functools
import hashlib
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from zoo.errors import UserError

SEAL = re.compile(rb"zoo run=([0-9a-f]{12}|-{12}) step=(\d{12}) sha256=([0-9a-f]{64})")
SEAL_BYTES = len("zoo run=") + 12 + len(" step=") + 12 + len(" sha256=") + 64
BLOCK = 1 << 20


class Checkpoint(NamedTuple):
    """What a whole checkpoint file says of itself; None where one of before the seal cannot."""

    path: Path
    run: str | None
    step: int | None
    content: str  # a hash: equal means the same weights


def seal(file: BinaryIO, run: str | None, step: int) -> None:
    """Write the seal behind an archive that `file`, open for reading too, holds whole."""
    head = f"zoo run={run or '-' * 12} step={step:012d} sha256=".encode()
    file.seek(-2, os.SEEK_END)
    if file.read(2) != b"\0\0":
        raise ValueError("the archive has a comment already")
    file.seek(-2, os.SEEK_END)
    file.write(SEAL_BYTES.to_bytes(2, "little"))  # the comment's length, which ends the archive
    file.seek(0)
    digest = _hash(file, file.seek(0, os.SEEK_END))
    digest.update(head)
    file.seek(0, os.SEEK_END)
    file.write(head + digest.hexdigest().encode())


def read(path: Path) -> Checkpoint | None:
    """The checkpoint in a file, or None where the file is damaged. UserError where unreadable."""
    try:
        status = path.stat()
        file = (path, status.st_mtime_ns, status.st_size, status.st_ino)
        return None if file in _rejected else _read(*file)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except OSError:
        return None


def reject(path: Path) -> None:
    """Count a file as damaged from now on: PyTorch could not read what seemed whole."""
    with suppress(OSError):
        status = path.stat()
        _rejected.add((path, status.st_mtime_ns, status.st_size, status.st_ino))


_rejected: set[tuple[Path, int, int, int]] = set()


@functools.lru_cache(maxsize=64)
def _read(path: Path, *_: int) -> Checkpoint | None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SEAL_BYTES))
        sealed = SEAL.fullmatch(file.read())
        if not sealed:
            return _unsealed(path)
        digest = _hash(file, size - SEAL_BYTES)
        digest.update(sealed[0][:-64])
        if digest.hexdigest() != sealed[3].decode():
            return None
        run = None if sealed[1].startswith(b"-") else sealed[1].decode()
        return Checkpoint(path, run, int(sealed[2]), sealed[3].decode())


def _hash(file: BinaryIO, size: int) -> "hashlib._Hash":
    """Over the first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(BLOCK, size))):
        digest.update(block)
        size -= len(block)
    return digest


def _unsealed(path: Path) -> Checkpoint | None:
    """A file of before the seal, or of another program."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
            parts = [(part.filename, part.CRC, part.file_size) for part in archive.infolist()]
    except OSError:
        raise
    except Exception:  # a damaged archive fails in a dozen ways
        return None
    number = re.fullmatch(r"step=(\d+)", path.stem)
    content = hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()
    return Checkpoint(path, None, int(number[1]) if number else None, content)


def step_of(file: Path | None) -> int:
    """The step after which a checkpoint was written, from its name; 0 for none."""
    return max(recency(file)[1], default=0) if file else 0


def recency(file: Path) -> tuple[bool, list[int]]:
    """last.ckpt first, then by the numbers in the name (step=000200.ckpt)."""
    return file.stem == "last", [int(number) for number in re.findall(r"\d+", file.stem)]
