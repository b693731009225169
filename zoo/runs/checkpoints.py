"""Recognises whole checkpoint files, and those of another run, without importing torch.

A checkpoint is torch's zip archive. Its end, where zip keeps a comment, holds a seal: the run's id,
the step, where tensors are written in parts a hash over the files of these, and a hash over every
byte before. Older files without a seal are checked by the CRC of each part, which does not cover
the archive's own directory.
"""

import functools
import hashlib
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from zoo.errors import refuse_path
from zoo.runs.files import as_it_is, file_hash

log = logging.getLogger("zoo")

SEAL = re.compile(
    rb"zoo run=([0-9a-f]{12}|-{12}) step=(\d{12})(?: shards=([0-9a-f]{64}))? sha256=([0-9a-f]{64})"
)
SEAL_BYTES = len("zoo run=") + 12 + len(" step=") + 12 + len(" sha256=") + 64
PART = "in the shards: "  # begins what is in the place of a tensor that is in parts
MOST_SEAL_BYTES = SEAL_BYTES + len(" shards=") + 64
BLOCK_BYTES = 1 << 20


class Checkpoint(NamedTuple):
    """A whole checkpoint file; `run` and `step` are None where a file without a seal lacks them."""

    path: Path
    run: str | None
    step: int | None
    content: str  # a hash: equal means the same weights


def shards_of(path: Path) -> Path:
    """The folder of the parts that a checkpoint's tensors are written in, if they are."""
    return path.with_suffix(".shards")


def seal(
    file: BinaryIO, run: str | None, step: int, shards: Mapping[str, str] | None = None
) -> None:
    """Append the seal to a whole archive in `file`, which is open for reading and writing.

    `shards` are the hashes of the files in the folder of its parts.
    """
    parts = f" shards={_together(shards)}" if shards else ""
    head = f"zoo run={run or '-' * 12} step={step:012d}{parts} sha256=".encode()
    size = len(head) + 64
    file.seek(-2, os.SEEK_END)
    if file.read(2) != b"\0\0":
        raise ValueError("the archive has a comment already")
    file.seek(-2, os.SEEK_END)
    file.write(size.to_bytes(2, "little"))  # the comment's length, which ends the archive
    file.seek(0)
    digest = _hash(file, file.seek(0, os.SEEK_END))
    digest.update(head)
    file.seek(0, os.SEEK_END)
    file.write(head + digest.hexdigest().encode())


def read(path: Path) -> Checkpoint | None:
    """Return the checkpoint in a file, None where it is damaged. UserError where unreadable."""
    try:
        files = _with_parts(path)
        return None if files in _rejected else _read(files)
    except PermissionError as error:
        refuse_path(path, f"cannot be read ({error.strerror})", "Change its permissions")
    except OSError:
        return None


def reject(path: Path) -> None:
    """Treat a file as damaged from now on, because PyTorch could not read it."""
    with suppress(OSError):
        _rejected.add(_with_parts(path))


Files = tuple[tuple[Path, int, int, int], ...]
_rejected: set[Files] = set()


def _with_parts(path: Path) -> Files:
    """A checkpoint's file and those of its parts, as they are."""
    return tuple(map(as_it_is, (path, *_files_of(shards_of(path)))))


def _files_of(shards: Path) -> list[Path]:
    return [*shards.glob("__*.distcp"), *shards.glob(".metadata")]


@functools.lru_cache(maxsize=64)
def _read(files: Files) -> Checkpoint | None:
    (path, *_), *parts = files
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MOST_SEAL_BYTES))
        end = file.read()
        sealed = SEAL.fullmatch(end) or SEAL.fullmatch(end[-SEAL_BYTES:])
        if not sealed:
            return _unsealed(path)
        digest = _hash(file, size - len(sealed[0]))
        digest.update(sealed[0][:-64])
        if digest.hexdigest() != sealed[4].decode():
            return None
    if sealed[3] and _together({p.name: file_hash(p) for p, *_ in parts}).encode() != sealed[3]:
        return None
    if not sealed[3] and not parts and _names_parts(path):
        return None
    run = None if sealed[1].startswith(b"-") else sealed[1].decode()
    return Checkpoint(path, run, int(sealed[2]), sealed[4].decode())


def _names_parts(path: Path) -> bool:
    """Whether the tensors of a checkpoint are in parts; earlier seals did not say so."""
    with zipfile.ZipFile(path) as archive:
        names = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return any(PART.encode() in archive.read(name) for name in names)


def _together(hashes: Mapping[str, str]) -> str:
    """One hash over the hashes of several files and their names."""
    lines = (f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash(file: BinaryIO, size: int) -> "hashlib._Hash":
    """sha256 over the first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(BLOCK_BYTES, size))):
        digest.update(block)
        size -= len(block)
    return digest


def _unsealed(path: Path) -> Checkpoint | None:
    """Return the checkpoint in a file without a seal, None where it is damaged."""
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
    return max(_recency(file)[1], default=0) if file else 0


def find_whole(folder: Path, *, run_id: str | None, steps: int) -> Iterator[Checkpoint]:
    """The whole checkpoints of a run folder, the last first.

    A warning names those passed over: damaged ones, and those of another run than `run_id`. Another
    says where the last of `steps` steps are lost. UserError where files exist but none is whole.
    """
    damaged, foreign, found = [], [], 0
    files = (folder / "checkpoints").glob("*.ckpt")
    for file in sorted(files, key=_recency, reverse=True):
        whole = read(file)
        if whole is None:
            damaged.append(file.name)
        elif whole.run and run_id and whole.run != run_id:
            foreign.append(file.name)
        else:
            if bad := _passed_over(damaged, foreign):
                _warn_once(folder, f"{bad}, {file.name} is whole")
            elif not found and whole.run and (whole.step or 0) < steps:
                _warn_once(folder, f"the last of its {steps} steps are gone, {file.name} is left")
            damaged, foreign = [], []
            found += 1
            yield whole
    if not found and (bad := _passed_over(damaged, foreign)):
        advice = "Restore one, or train a new run with fresh=true"
        refuse_path(folder, f"has no whole checkpoint ({bad})", advice)


def _recency(file: Path) -> tuple[bool, list[int]]:
    """Sorts last.ckpt last, the others by the numbers in the name (step=000200.ckpt)."""
    return file.stem == "last", [int(number) for number in re.findall(r"\d+", file.stem)]


def _passed_over(damaged: Sequence[str], foreign: Sequence[str]) -> str:
    words = [f"{', '.join(damaged)} damaged"] if damaged else []
    return ", ".join([*words, *(f"{name} is another run's" for name in foreign)])


def _warn_once(folder: Path, message: str) -> None:
    """Log a warning once in this process: checkpoints are looked for several times."""
    if (said := (folder.resolve(), message)) not in _warned:
        _warned.add(said)
        log.warning("%s: %s", folder, message)


_warned: set[tuple[Path, str]] = set()
