"""Where text comes from: a corpus's documents, and the split each belongs to.

Needs only the standard library, so that `check_source` refuses a bad folder before anything heavy
is imported. Documents are split whole, and identical ones never stand in two splits.
"""

import codecs
import hashlib
import importlib
import importlib.util
import itertools
import json
import logging
import os
import stat
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from zoo.data.tokenizers import identify_tokenizer
from zoo.errors import UserError, choose

SPLITS = ("train", "valid", "test")
Spec = Mapping[str, Any]  # configs/data/*.yaml

HELD_OUT = 0.05  # share of the bytes for each of valid and test, where folders do not say
STDLIB_HELD_OUT = 400_000  # and at least so many bytes of the standard library
# Tests and vendored code, and generated files: near copies of each other on both sides of a split
# (encodings), one huge page (pydoc_data), this build's own paths (_sysconfigdata*).
STDLIB_EXCLUDED = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"),
    *("encodings", "pydoc_data"),
}

HEAD_BYTES, HEAD_FILES = 4096, 1000  # what the early check reads at most
PG19 = "emozilla/pg19"  # parquet; the original deepmind/pg19 is a script that no longer loads
PATIENCE = 2.0  # seconds for the hub to answer


# (name, text): the file relative to the corpus's folder, and its bytes, UTF-8 without NUL.
Documents = Iterable[tuple[str, bytes]]


class Source(NamedTuple):
    """A corpus before tokens: what tells that it changed, and its documents when asked for."""

    fingerprint: str
    documents: Callable[[], dict[str, "Documents"]]  # by split


def check_source(spec: Spec) -> None:
    """Refuse early, with one UserError line, what `open_corpus` would refuse at the build.

    Looks at existence, permissions and the first bytes of the files, not at all of them. For pg19:
    that the hub answers, unless the tokens stand in spec["cache"] already.
    """
    choose("data.eval_documents", spec["eval_documents"], ("whole", "joined"))
    identify_tokenizer(spec["tokenizer"])
    find_source(spec)
    if spec["name"] == "text":
        files = itertools.chain.from_iterable(_text_files(_text_root(spec)).values())
        for path in itertools.islice(files, HEAD_FILES):
            _checked(path, HEAD_BYTES)
    if spec["name"] == "pg19" and not store_folder(spec, spec.get("cache") or ".data").exists():
        _require_pg19()


def find_source(spec: Spec) -> Source:
    """The source a data configuration names; lists files, reads none. Raises UserError."""
    name = choose("data.name", spec["name"], ("stdlib", "text", "pg19"))
    if name == "pg19":
        count = spec.get("documents")
        if count is not None and (type(count) is not int or count < 1):
            raise UserError(f"data.documents must be a positive number or null, not {count!r}")
        return Source(_fingerprint([PG19, count]), lambda: _pg19_documents(count))
    if name == "stdlib":
        root = _stdlib_root()
        files = _stdlib_files(root)
        return Source(_stamp(root, files), lambda: _stdlib_documents(root, files))
    root = _text_root(spec)
    groups = _text_files(root)
    every = list(itertools.chain.from_iterable(groups.values()))
    return Source(_stamp(root, every), lambda: _text_documents(root, groups))


def store_folder(spec: Spec, cache: str | Path) -> Path:
    """Where the tokens of this corpus, place and tokeniser are kept."""
    place = {"stdlib": _stdlib_root, "text": lambda: _text_root(spec)}.get(spec["name"], str)()
    what = [str(place), identify_tokenizer(spec["tokenizer"]), spec.get("documents")]
    what += [] if spec.get("end_token") is None else [spec["end_token"]]
    return Path(cache) / f"{spec['name']}-{_fingerprint(what)[:12]}"


def split_files(root: Path, files: Iterable[Path], held_out: int = 0) -> dict[str, list[Path]]:
    """Whole files to splits, in the order of a hash of their names relative to `root`.

    Test, then valid take files until they hold 5 % of the bytes and at least `held_out`; each
    split gets one file or more. A file keeps its place when others come and go, but for the few
    at the edges. At least three files.
    """

    def name(path: Path) -> bytes:
        return os.fsencode(path.relative_to(root).as_posix())

    ranked = sorted(files, key=lambda path: hashlib.sha256(name(path)).digest())
    goal = max(held_out, HELD_OUT * sum(path.stat().st_size for path in ranked))
    splits: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for split, kept_back in (("test", 2), ("valid", 1)):  # one for each split still to be served
        size = 0
        while not splits[split] or (size < goal and len(ranked) > kept_back):
            splits[split].append(ranked.pop())
            size += splits[split][-1].stat().st_size
    splits["train"] = ranked
    return {split: sorted(paths) for split, paths in splits.items()}


def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"]).resolve()


def _stdlib_files(root: Path) -> list[Path]:
    files = _files(root, ".py", STDLIB_EXCLUDED)
    files = [path for path in files if not path.name.startswith("_sysconfigdata")]
    if len(files) < len(SPLITS):
        raise UserError(
            f"data=stdlib: this Python keeps no sources in {root}; use data=text data.path=<folder>"
        )
    return files


def _stdlib_documents(root: Path, files: list[Path]) -> dict[str, Documents]:
    sources = [path for path in files if _fault(_read(path)) is None]  # some test other encodings
    splits = split_files(root, _distinct(sources).values(), STDLIB_HELD_OUT)
    return {split: _named(root, paths) for split, paths in splits.items()}


def _text_root(spec: Spec) -> Path:
    if not spec.get("path"):
        raise UserError(
            "data=text needs data.path=<folder>: with .txt files, or with folders "
            "train, valid and test of them"
        )
    return Path(spec["path"]).expanduser().resolve()


def _text_files(root: Path) -> dict[str, list[Path]]:
    """The .txt files by split where `root` has its folders, else all of them under ""."""
    folders = [split for split in SPLITS if _folder_exists(root / split)]
    if not _folder_exists(root):
        state = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"data.path: {root} {state}")
    if folders and len(folders) < len(SPLITS):
        lacking = ", ".join(split for split in SPLITS if split not in folders)
        raise UserError(f"data.path: {root} has a folder {folders[0]} but lacks {lacking}")
    groups = {split: _files(root / split, ".txt") for split in folders or [""]}
    for split, files in groups.items():
        if not files:
            raise UserError(f"data.path: no .txt file in {root / split}")
    if not folders:
        _enough(root, groups[""])
    return groups


def _text_documents(root: Path, groups: dict[str, list[Path]]) -> dict[str, Documents]:
    distinct = {split: _distinct(files) for split, files in groups.items()}
    for split, files in distinct.items():
        if not files:
            raise UserError(f"data.path: every .txt file in {root / split} is empty")
    if "" in distinct:
        splits = split_files(root, _enough(root, distinct[""].values()))
    else:
        for one, other in itertools.combinations(SPLITS, 2):
            for twin in distinct[one].keys() & distinct[other].keys():
                raise UserError(
                    f"data.path: {distinct[one][twin]} and {distinct[other][twin]} are the same "
                    "text; a document may stand in one split only"
                )
        splits = {split: list(files.values()) for split, files in distinct.items()}
    return {split: _named(root, paths) for split, paths in splits.items()}


def _named(root: Path, files: Iterable[Path]) -> Documents:
    return ((path.relative_to(root).as_posix(), _checked(path)) for path in files)


def _enough(root: Path, files: Iterable[Path]) -> list[Path]:
    found = list(files)
    if len(found) < len(SPLITS):
        raise UserError(
            f"data.path: {root} has {len(found)} different .txt file(s); splitting by file "
            "needs at least 3 (or folders train, valid and test)"
        )
    return found


def _pg19_documents(count: int | None) -> dict[str, Documents]:
    _require_pg19()
    names = {"train": "train", "valid": "validation", "test": "test"}
    return {split: _pg19_stream(names[split], count) for split in SPLITS}


def _pg19_stream(split: str, count: int | None) -> Iterator[tuple[str, bytes]]:
    try:
        books = importlib.import_module("datasets").load_dataset(PG19, split=split, streaming=True)
        for number, book in enumerate(itertools.islice(books, count)):
            document = book["text"].encode()
            if document and _fault(document) is None:
                yield f"{split}/{number} {book.get('short_book_title', '')}".rstrip(), document
    except Exception as error:  # of the library, its file systems or the network
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"data=pg19: reading {PG19} ({split}) failed: {reason}") from error


def _require_pg19() -> None:
    """Raise UserError within `PATIENCE` seconds unless PG-19 can be streamed from here."""
    from urllib.request import urlopen  # a third of this module's import time, for this one corpus

    if importlib.util.find_spec("datasets") is None:
        raise UserError("data=pg19 needs the package datasets: pip install datasets")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise UserError(f"data=pg19 streams from the network, but {name} is set")
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/api/datasets/{PG19}"
    outcome: list[str] = []

    def ask() -> None:
        try:
            with urlopen(url, timeout=PATIENCE):
                outcome.append("")
        except (OSError, ValueError) as error:
            outcome.append(str(error))

    probe = threading.Thread(target=ask, daemon=True)  # name resolution knows no timeout of its own
    probe.start()
    probe.join(PATIENCE)
    if outcome != [""]:
        reason = outcome[0] if outcome else f"no answer in {PATIENCE:.0f} s"
        raise UserError(f"data=pg19 streams from the network, but {url} is out of reach: {reason}")


def _folder_exists(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        _unreadable(path, error)


def _files(root: Path, suffix: str, excluded: Iterable[str] = ()) -> list[Path]:
    """The regular files below `root` that end so, sorted; folders named in `excluded` left out."""

    def stop(error: OSError) -> NoReturn:
        _unreadable(error.filename, error)

    found = []
    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if name not in excluded]
        found += [Path(folder, name) for name in names if name.lower().endswith(suffix)]
    return sorted(path for path in found if stat.S_ISREG(_stat(path).st_mode))


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        _unreadable(path, error)


def _read(path: Path, limit: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        _unreadable(path, error)


def _checked(path: Path, limit: int = -1) -> bytes:
    """The file's bytes; raises UserError where they are not text, with the offset of the first."""
    data = _read(path, limit)
    fault = _fault(data, final=not 0 <= limit <= len(data))
    if fault is not None:
        at, what = fault
        raise UserError(f"data.path: {path} is not text: {what} at byte {at}")
    return data


def _fault(data: bytes, final: bool = True) -> tuple[int, str] | None:
    """Offset and kind of the first byte that no text has; `final`: the file ends with `data`."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, final)
        end = len(data)
    except UnicodeDecodeError as error:
        end = error.start
    null = data.find(b"\0", 0, end)
    if null >= 0:
        return null, "NUL"
    return (end, "not UTF-8") if end < len(data) else None


def _distinct(files: Iterable[Path]) -> dict[str, Path]:
    """The first file of each content, by content hash; empty files have none."""
    found: dict[str, Path] = {}
    repeats = []
    for path in files:
        if data := _checked(path):
            first = found.setdefault(hashlib.sha256(data).hexdigest(), path)
            if first is not path:
                repeats.append(str(path))
    if repeats:
        log = logging.getLogger("zoo")
        log.info("%d files repeat others and are left out: %s", len(repeats), ", ".join(repeats))
    return found


def _unreadable(path: object, error: OSError) -> NoReturn:
    raise UserError(f"data.path: {path} cannot be read: {error.strerror or error}") from error


def _stamp(root: Path, files: Iterable[Path]) -> str:
    """Changes when a file comes, goes or is written; reads none."""
    stats = [(path.relative_to(root).as_posix(), _stat(path)) for path in files]
    return _fingerprint([(name, status.st_size, status.st_mtime_ns) for name, status in stats])


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
