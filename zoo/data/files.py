"""Files of a corpus: found by folder, name or pattern; read whole or as a stream, also compressed.

Needs only the standard library; `.zst` files need the package zstandard before Python 3.14.
"""

import codecs
import contextlib
import glob
import gzip
import importlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from zoo.errors import UserError, refuse, refuse_path

SPLITS = ("train", "valid", "test")
COMPRESSED = (".gz", ".zst")
HEAD_BYTES, HEAD_FILES = 4096, 1000  # the early check reads no more
READ_BYTES = 2**15  # of a compressed file at once

Documents = Iterable[tuple[str, bytes]]  # name and text, UTF-8 without NUL
Stamps = Sequence[tuple[str, int, int]]  # name, size and time of files


class Files(NamedTuple):
    """The files of a corpus by split, or all of them under ""; names are relative to `root`."""

    root: Path
    groups: dict[str, list[Path]]

    def every(self) -> list[Path]:
        return [path for group in self.groups.values() for path in group]

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def find_files(path: str | None, suffix: str) -> Files:
    """The files that data.path names: a file, a pattern, or a folder's files that end in `suffix`.

    Folders train, valid and test give the splits. Reads no file. Raises UserError.
    """
    if not path:
        refuse(
            "data.path",
            path,
            f"must be a folder with {suffix} files (or with folders train, valid and test of "
            "them), a file, or a pattern such as 'docs/**/*.md'",
        )
    place = Path(os.path.expanduser(path))  # as it is where there is no such user
    if glob.has_magic(path) and not os.path.lexists(place):
        return _by_pattern(place)
    root = place.resolve()
    if not _is_folder(root):
        if not root.exists():
            refuse_path(root, "does not exist", "Give data.path=<folder, file or pattern>")
        if not stat.S_ISREG(_stat(root).st_mode):  # a pipe, a device: read once, or for ever
            refuse_path(root, "is no regular file", "Give data.path=<folder, file or pattern>")
        return Files(root.parent, {"": [root]})
    folders = [split for split in SPLITS if _is_folder(root / split)]
    _require_all_splits(root, folders)
    groups = {split: list_files(root / split, suffix) for split in folders or [""]}
    for split, files in groups.items():
        if not files:
            advice = "Add some, or give data.path=<folder, file or pattern>"
            refuse_path(root / split, f"has no {suffix} file", advice)
    return Files(root, groups)


def _by_pattern(place: Path) -> Files:
    """The files that match a pattern; folders train, valid and test below its start are splits."""
    plain = list(place.parts[: _first_magic(place)])
    root = Path(*plain).resolve() if plain else Path.cwd()
    pattern = str(Path(*place.parts[len(plain) :]))
    matches = [root / match for match in glob.glob(pattern, root_dir=root, recursive=True)]
    files = sorted(path for path in matches if stat.S_ISREG(_stat(path).st_mode))
    if not files:
        refuse("data.path", place, "no file matches", "Give a folder, a file or another pattern")
    first = {path.relative_to(root).parts[0] for path in files}
    if not first <= set(SPLITS):
        return Files(root, {"": files})
    _require_all_splits(root, [split for split in SPLITS if split in first])
    by_split = {split: [p for p in files if p.is_relative_to(root / split)] for split in SPLITS}
    return Files(root, by_split)


def _first_magic(place: Path) -> int:
    return next(i for i, part in enumerate(place.parts) if glob.has_magic(part))


def _require_all_splits(root: Path, found: list[str]) -> None:
    if found and len(found) < len(SPLITS):
        lacking = ", ".join(split for split in SPLITS if split not in found)
        advice = "Add it, or put all files into one folder of another name"
        refuse_path(root, f"has a folder {found[0]} but lacks {lacking}", advice)


def list_files(root: Path, suffix: str, excluded: Iterable[str] = ()) -> list[Path]:
    """The regular files below `root` that end in `suffix`, perhaps compressed, sorted.

    Folders named in `excluded` are left out. A link to a folder is followed, once.
    """

    def stop(error: OSError) -> NoReturn:
        refuse_unreadable(error.filename, error)

    found, ends = [], (suffix, *(suffix + end for end in COMPRESSED))
    seen: set[tuple[int, int]] = set()
    places = [str(root)]
    for start in places:  # what is linked comes after all that is not: a link renames no file
        links = []
        for folder, folders, names in os.walk(start, onerror=stop):
            place = _stat(Path(folder))
            if (place.st_dev, place.st_ino) in seen:
                folders.clear()
                continue
            seen.add((place.st_dev, place.st_ino))
            folders[:] = [name for name in folders if name not in excluded]
            links += [f"{folder}/{name}" for name in folders if os.path.islink(f"{folder}/{name}")]
            found += [Path(folder, name) for name in names if name.lower().endswith(ends)]
        places += sorted(links)
    return sorted(path for path in found if stat.S_ISREG(_stat(path).st_mode))


def file_stamps(files: Files) -> Stamps:
    """Name, size and time of each file: they change when one comes, goes or is written."""
    stats = [(files.name(path), _stat(path)) for path in files.every()]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in stats]


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        refuse_unreadable(path, error)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        refuse_unreadable(path, error)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file as a stream; seeking forward is supported.

    UserError for whatever fails in reading it.
    """
    try:
        with _open(path) as file:
            yield file
    except UserError:
        raise
    except Exception as error:  # each compressor has errors of its own
        refuse_unreadable(path, error)


class _Frames(io.RawIOBase):
    """The decompressed bytes of a .zst file, by the package zstandard.

    The package's own stream takes a file that was cut short for a whole one, and does not seek.
    """

    def __init__(self, path: Path, frame: Callable[[], Any]) -> None:
        self.file = open(path, "rb")  # noqa: SIM115, closed below
        self.frame, self.new_frame = frame(), frame
        self.begun, self.left, self.at = False, b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self.left:
            data = self.frame.unused_data or self.file.read(READ_BYTES)
            if not data:
                if self.begun and not self.frame.eof:
                    raise EOFError("it ends within compressed data")
                return 0
            if self.frame.eof:
                self.frame = self.new_frame()
            self.begun, self.left = True, self.frame.decompress(data)
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        self.at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        end = offset + (self.at if whence == io.SEEK_CUR else 0)
        if whence == io.SEEK_END or end < self.at:
            raise io.UnsupportedOperation("only forward")
        while self.at < end and self.read(min(end - self.at, READ_BYTES)):
            pass
        return self.at

    def tell(self) -> int:
        return self.at

    def close(self) -> None:
        self.file.close()
        super().close()


def _open(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() != ".zst":
        return open(path, "rb")
    with contextlib.suppress(ImportError):
        return importlib.import_module("compression.zstd").open(path, "rb")
    with contextlib.suppress(ImportError):
        package = importlib.import_module("zstandard")
        return io.BufferedReader(_Frames(path, package.ZstdDecompressor().decompressobj))
    refuse_path(path, "needs the package zstandard", "Run pip install zstandard, or use .gz")


def read_text(path: Path, limit: int = -1) -> bytes:
    """Read a file's text, at most `limit` bytes. UserError with the offset of what is no text."""
    with opened(path) as file:
        data = file.read(limit)
    check_text(path, data, final=not 0 <= limit <= len(data))
    return data


def check_text(path: Path, data: bytes, *, start: int = 0, final: bool = True) -> None:
    """Refuse bytes at offset `start` of a file that are no text; `final`: the text ends there."""
    fault = text_fault(data, final)
    if fault is not None:
        at, what = fault
        advice = "Give UTF-8 without NUL bytes, or leave the file out"
        refuse_path(path, f"is not text ({what} at byte {start + at})", advice)


def text_fault(data: bytes, final: bool = True) -> tuple[int, str] | None:
    """Offset and kind of the first byte that no text has; `final`: the text ends with `data`."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, final)
        end = len(data)
    except UnicodeDecodeError as error:
        end = error.start
    null = data.find(b"\0", 0, end)
    if null >= 0:
        return null, "NUL"
    return (end, "not UTF-8") if end < len(data) else None


def refuse_unreadable(path: object, error: Exception) -> NoReturn:
    """Raise the UserError for a file or folder that cannot be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    advice = "Check its permissions and that it is whole"
    refuse_path(str(path), f"cannot be read ({reason or type(error).__name__})", advice)
