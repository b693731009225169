"""Token store: one split's tokens in a file that is mapped, never loaded, and never half-written.

A folder of

    tokens.bin       the tokens, documents one after another
    offsets.npy      where each document starts, and the end
    bytes.bin        the number of bytes of text of each token; absent where that is one each
    documents.json   the name of each document: its file, relative to the corpus's folder
    meta.json        sizes and hashes of the others, and a hash of itself

Stores are built next to their place and renamed, so that what is there is whole; a truncated or
altered one is recognised by size and by hash when opened. What makes a text this text and no other
is the hash of the first two files alone.
"""

import functools
import hashlib
import json
import logging
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.console import say
from zoo.errors import UserError, refuse_path
from zoo.locks import lock_file

FORMAT = 2  # stores of another format are built again
SECONDS_BETWEEN_LINES = 5.0  # of progress, while a store is built
Encoded = array | tuple[array, array]  # tokens, or tokens and the bytes of each


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
    sizes: np.ndarray | None = None  # (n,) uint16, bytes of text by token; None: one each

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> "TokenStore":
        """Map the store in `folder`; StoreError (a UserError) where it is missing or damaged.

        Sizes are always checked; the hash once per process, and not at all without `verify`.
        """
        altered = f"token store {folder} was altered: its hash is not the recorded"
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise StoreError(f"token store {folder} has format {meta['format']}, not {FORMAT}")
            if meta.pop("record") != _record_hash(meta):
                raise StoreError(altered)
            files = [folder / name for name in meta["sizes"]]
            if [file.stat().st_size for file in files] != list(meta["sizes"].values()):
                raise StoreError(f"token store {folder} is truncated")
            if verify and _digests_of(files) != (meta["sha256"], meta["whole"]):
                raise StoreError(altered)
            tokens = np.memmap(files[0], dtype=np.dtype(meta["dtype"]), mode="r")
            offsets = np.load(files[1], allow_pickle=False)
            sizes = folder / "bytes.bin"
            sizes = np.memmap(sizes, dtype=np.uint16, mode="r") if sizes in files else None
        except FileNotFoundError as error:
            raise StoreError(f"no token store in {folder}") from error
        except StoreError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise StoreError(f"token store {folder} is damaged: {error}") from error
        except RecursionError as error:
            raise StoreError(f"token store {folder} is damaged: meta.json is too deep") from error
        return cls(folder, tokens, offsets, meta["sha256"], meta, sizes)

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

    def bytes_of(self, start: int, stop: int) -> np.ndarray:
        """int64 (stop - start,): the bytes of text of each of tokens[start:stop].

        The bytes of a document's tokens add up to its own and one more, the end's. Of a character
        that several tokens share each counts its part.
        """
        if self.sizes is None:
            return np.ones(len(self.tokens[start:stop]), np.int64)
        return self.sizes[start:stop].astype(np.int64)

    @property
    def documents(self) -> list[str]:
        """The documents' names, in their order: files relative to the corpus's folder."""
        return json.loads((self.folder / "documents.json").read_text(encoding="utf-8"))

    @property
    def bytes_per_token(self) -> float:
        """Measured on this store; exactly 1 where tokens are bytes."""
        return self.source_bytes / len(self)

    def __reduce__(self) -> tuple[Callable[..., "TokenStore"], tuple[Path, str]]:
        """A worker process maps the same files again: nothing is copied, nothing hashed."""
        return _reopen, (self.folder, self.sha256)


def write_store(
    folder: Path,
    documents: Iterable[tuple[str, bytes]],
    encode: Callable[[bytes], Encoded],
    **meta: object,
) -> None:
    """Write the store of `documents`, (name, text) each, into a new folder; `meta` is kept with it.

    `encode` gives a document's tokens, and the number of bytes of each unless that is one;
    these sum to the document's length and 1, for its end. Raises UserError where there is no
    document, and where `encode` raises ValueError: the line names the document.
    """
    folder.mkdir(parents=True)
    offsets, source_bytes, dtype = array("q", [0]), 0, np.dtype(np.uint8)
    tokens_bin, bytes_bin = folder / "tokens.bin", folder / "bytes.bin"
    names_json = folder / "documents.json"
    progress = _Progress(folder.name)
    with (
        tokens_bin.open("wb") as file,
        bytes_bin.open("wb") as sizes_file,
        names_json.open("w", encoding="utf-8") as names_file,
    ):
        for name, document in documents:
            try:
                encoded = encode(document)
            except ValueError as error:
                raise UserError(f"{name} ({folder.name} split): {error}.") from error
            tokens, sizes = encoded if isinstance(encoded, tuple) else (encoded, None)
            dtype = np.dtype(tokens.typecode)
            tokens.tofile(file)
            if sizes is not None:
                sizes.tofile(sizes_file)
            names_file.write(f"{', ' if len(offsets) > 1 else '['}{json.dumps(name)}")
            offsets.append(offsets[-1] + len(tokens))
            source_bytes += len(document) + 1
            progress.update(len(offsets) - 1, source_bytes)
        names_file.write("]\n")
    if len(offsets) == 1:
        raise UserError(f"data: the {folder.name} split has no document. Give more text.")
    files = [tokens_bin, folder / "offsets.npy", bytes_bin, names_json]
    if not bytes_bin.stat().st_size:
        bytes_bin.unlink()
        files.remove(bytes_bin)
    np.save(files[1], np.array(offsets, dtype=np.int64), allow_pickle=False)
    sha256, whole = _digests_of(files)
    record = {
        "format": FORMAT,
        "dtype": dtype.str,
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "source_bytes": source_bytes,
        "bytes_per_token": source_bytes / offsets[-1],
        "sizes": {file.name: file.stat().st_size for file in files},
        "sha256": sha256,
        "whole": whole,
        **meta,
    }
    record["record"] = _record_hash(record)
    (folder / "meta.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class _Progress:
    """Prints how far a split is, every few seconds."""

    def __init__(self, split: str) -> None:
        self.split, self.shown_at = split, time.monotonic()

    def update(self, documents: int, source_bytes: int) -> None:
        """Print the numbers, unless that was a moment ago."""
        if time.monotonic() - self.shown_at > SECONDS_BETWEEN_LINES:
            self.shown_at, megabytes = time.monotonic(), source_bytes / 1e6
            say(f"data: {self.split} split, {documents:,} documents, {megabytes:,.0f} MB read")


def _record_hash(record: dict[str, Any]) -> str:
    """Of meta.json itself, so that an altered figure in it is found like an altered token."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


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
            raise StoreError(f"token store {folder} is of another source or version")
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
        refuse_path(
            folder,
            f"the token store cannot be written ({error.strerror})",
            "Free some space, or choose another folder with data.cache=<folder>",
        )


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
    with path.open("w", encoding="utf-8") as file:
        lock_file(file, wait=True)
        yield


def _digests_of(files: Iterable[Path]) -> tuple[str, str]:
    """sha256 over the first two files, and over all of them."""
    stats = [(file, file.stat()) for file in files]
    return _digests(tuple((file, s.st_ino, s.st_size, s.st_mtime_ns) for file, s in stats))


@functools.lru_cache(maxsize=64)
def _digests(files: tuple[tuple[Path, int, int, int], ...]) -> tuple[str, str]:
    """Over the contents of `files`; the rest of the key shows whether they changed."""
    digest, after = hashlib.sha256(), []
    for path, *_ in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        after.append(digest.hexdigest())
    return after[1], after[-1]


def _reopen(folder: Path, sha256: str) -> TokenStore:
    store = TokenStore.open(folder, verify=False)
    if store.sha256 != sha256:
        raise StoreError(f"token store {folder} was replaced while in use")
    return store
