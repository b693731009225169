"""Token store: one split's tokens in a file that is mapped, never loaded, and never half-written.

A folder of `tokens.bin` (the tokens, documents one after another), `offsets.npy` (where each
document starts, and the end) and `meta.json`. Stores are built next to their place and renamed, so
that what stands there is whole; a truncated or altered one is told by size and by hash when opened.
"""

import fcntl
import functools
import hashlib
import json
import logging
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import UserError

FORMAT = 1  # stores of another format are built again


class StoreError(UserError):
    """There is no store here, or it is not what was written."""


@dataclass(frozen=True, eq=False)
class TokenStore:
    """One split: `tokens` (n,) uint8, uint16 or uint32, mapped read-only; `offsets` (documents+1,).

    Document i is tokens[offsets[i]:offsets[i + 1]], its last token the end-of-document token.
    """

    folder: Path
    tokens: np.ndarray
    offsets: np.ndarray  # int64
    sha256: str  # over both files
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> "TokenStore":
        """Map the store in `folder`; StoreError (a UserError) where it is missing or damaged.

        Sizes are always checked; the hash once per process, and not at all without `verify`.
        """
        files = folder / "tokens.bin", folder / "offsets.npy"
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if meta["format"] != FORMAT:
                raise StoreError(f"token store {folder} has format {meta['format']}, not {FORMAT}")
            if [file.stat().st_size for file in files] != meta["sizes"]:
                raise StoreError(f"token store {folder} is truncated")
            if verify and _digest_of(files) != meta["sha256"]:
                raise StoreError(f"token store {folder} was altered: its hash is not the recorded")
            tokens = np.memmap(files[0], dtype=np.dtype(meta["dtype"]), mode="r")
            offsets = np.load(files[1], allow_pickle=False)
        except FileNotFoundError as error:
            raise StoreError(f"no token store in {folder}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"token store {folder} is damaged: {error}") from error
        return cls(folder, tokens, offsets, meta["sha256"], meta)

    def __len__(self) -> int:
        """Tokens, those that end documents included."""
        return len(self.tokens)

    @property
    def name(self) -> str:
        """The split."""
        return self.folder.name

    @property
    def source_bytes(self) -> int:
        """Bytes of text behind the tokens, one more per document for its end."""
        return self.meta["source_bytes"]

    @property
    def bytes_per_token(self) -> float:
        """Measured on this store; exactly 1 where tokens are bytes."""
        return self.source_bytes / len(self)

    def __reduce__(self) -> tuple[Callable[..., "TokenStore"], tuple[Path, str]]:
        """A worker process maps the same files again: nothing is copied, nothing hashed."""
        return _reopen, (self.folder, self.sha256)


def write_store(
    folder: Path,
    documents: Iterable[bytes],
    encode: Callable[[bytes], array],
    **meta: object,
) -> None:
    """Write the store of `documents` into a new folder; `meta` is kept beside it.

    Raises UserError where there is no document.
    """
    folder.mkdir(parents=True)
    offsets, source_bytes, dtype = [0], 0, np.dtype(np.uint8)
    files = folder / "tokens.bin", folder / "offsets.npy"
    with files[0].open("wb") as file:
        for document in documents:
            tokens = encode(document)
            dtype = np.dtype(tokens.typecode)
            tokens.tofile(file)
            offsets.append(offsets[-1] + len(tokens))
            source_bytes += len(document) + 1
    if len(offsets) == 1:
        raise UserError(f"the {folder.name} split has no document")
    np.save(files[1], np.array(offsets, dtype=np.int64), allow_pickle=False)
    record = {
        "format": FORMAT,
        "dtype": dtype.str,
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "source_bytes": source_bytes,
        "bytes_per_token": source_bytes / offsets[-1],
        "sizes": [file.stat().st_size for file in files],
        "sha256": _digest_of(files),
        **meta,
    }
    (folder / "meta.json").write_text(json.dumps(record, indent=2) + "\n")


def open_or_build(
    folder: Path, names: Sequence[str], source: str, build: Callable[[Path], None]
) -> list[TokenStore]:
    """The stores `names` in `folder`, made by `build(empty folder)` where they are not good.

    Good: whole, and written from a source with the fingerprint `source`. Processes that come at
    once wait for the first; one that dies leaves nothing that counts. Raises what `build` raises,
    and UserError where the folder cannot be written.
    """

    def stores() -> list[TokenStore]:
        found = [TokenStore.open(folder / name) for name in names]
        if any(store.meta.get("source") != source for store in found):
            raise StoreError(f"token store {folder} is older than its source")
        return found

    try:
        return stores()
    except StoreError:
        pass
    try:
        with _locked(folder.with_name(f"{folder.name}.lock")):
            try:
                return stores()  # another process has built it meanwhile
            except StoreError as error:
                if folder.exists():
                    logging.getLogger("zoo").warning("%s; building it again", error)
            _replace(folder, build)
            return stores()
    except OSError as error:
        raise UserError(f"cannot write the token store {folder}: {error.strerror}") from error


def _replace(folder: Path, build: Callable[[Path], None]) -> None:
    """Build beside `folder` and rename; the caller holds the lock."""
    new, old = (folder.with_name(f"{folder.name}.{end}") for end in ("new", "old"))
    for left in (new, old):  # by a process that died
        shutil.rmtree(left, ignore_errors=True)
    try:
        new.mkdir()
        build(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest_of(files: Iterable[Path]) -> str:
    stats = [(file, file.stat()) for file in files]
    return _digest(tuple((file, s.st_ino, s.st_size, s.st_mtime_ns) for file, s in stats))


@functools.lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """Over the contents of `files`; the rest of the key tells that they are as they were."""
    digest = hashlib.sha256()
    for path, *_ in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _reopen(folder: Path, sha256: str) -> TokenStore:
    store = TokenStore.open(folder, verify=False)
    if store.sha256 != sha256:
        raise StoreError(f"token store {folder} was replaced while in use")
    return store
