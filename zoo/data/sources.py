"""Where a corpus comes from: its documents, and the split that each belongs to.

Needs only the standard library, so that `check_source` refuses bad data before anything heavy is
imported. A document is in one split only, and so are its copies.
"""

import hashlib
import itertools
import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zoo.data import hub
from zoo.data.files import (
    HEAD_BYTES,
    HEAD_FILES,
    SPLITS,
    Documents,
    Files,
    Stamps,
    file_stamps,
    find_files,
    list_files,
    read_text,
    text_fault,
)
from zoo.data.records import SUFFIXES, check_records, split_records
from zoo.data.splits import split_files, split_one_file
from zoo.data.tokenizers import identify_tokenizer
from zoo.errors import choose, refuse, refuse_path

NAMES = ("stdlib", "text", "jsonl", "parquet", "hf", "pg19")
HUB = ("hf", "pg19")
Spec = Mapping[str, Any]  # configs/data/*.yaml

STDLIB_HELD_OUT = 400_000  # bytes, at least, of the standard library for each of valid and test
# Tests and vendored code, and generated files: near copies of each other on both sides of a split
# (encodings), one huge page (pydoc_data), this build's own paths (_sysconfigdata*).
STDLIB_EXCLUDED = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"),
    *("encodings", "pydoc_data"),
}

log = logging.getLogger("zoo")


class Source(NamedTuple):
    """A corpus before it becomes tokens."""

    fingerprint: str  # changes when the corpus does
    documents: Callable[[], dict[str, Documents]]  # by split
    stamps: Stamps = ()  # of its files, where they are the user's own


def check_source(spec: Spec) -> None:
    """Refuse early, with one UserError line, what `open_corpus` would refuse at the build.

    Looks at existence, permissions and the first bytes or records of files, not at all of them; for
    a data set of the hub, that the hub answers, unless the tokens are already in spec["cache"].
    """
    choose("data.eval_documents", spec["eval_documents"], ("whole", "joined"))
    identify_tokenizer(spec["tokenizer"])
    name = spec["name"]
    if name in HUB:  # what is missing to read them comes before what they hold
        _check_hub(spec)
        if not store_folder(spec, spec.get("cache") or ".data").exists():
            if name == "pg19":
                hub.require_hub(name, hub.PG19)
            else:
                hub.check_dataset(spec["dataset"])
    find_source(spec)
    if name == "text":
        for path in itertools.islice(_text_files(spec).every(), HEAD_FILES):
            read_text(path, HEAD_BYTES)
    elif name in SUFFIXES:
        check_records(name, find_files(spec["path"], SUFFIXES[name]), spec["field"])


def find_source(spec: Spec) -> Source:
    """The source that a data configuration names; lists files, reads none. Raises UserError."""
    name = choose("data.name", spec["name"], NAMES)
    if name in HUB:
        return _hub_source(spec)
    if name == "stdlib":
        files = _stdlib_files()
        stamps = file_stamps(files)
        return Source(_fingerprint(stamps), lambda: _stdlib_documents(files), stamps)
    if name == "text":
        files = _text_files(spec)
        stamps = file_stamps(files)
        return Source(_fingerprint(stamps), lambda: _text_documents(files), stamps)
    files = find_files(spec["path"], SUFFIXES[name])
    field, stamps = spec["field"], file_stamps(files)
    return Source(_fingerprint([stamps, field]), lambda: split_records(name, files, field), stamps)


def store_folder(spec: Spec, cache: str | Path) -> Path:
    """Where the tokens of this corpus, place and tokeniser are kept."""
    name = spec["name"]
    if name == "stdlib":
        place = str(_stdlib_root())
    elif "path" in spec:
        place = str(Path(os.path.expanduser(spec["path"] or "")).resolve())
    else:
        place = spec.get("dataset") or ""
    what = [place, identify_tokenizer(spec["tokenizer"]), spec.get("documents")]
    what += [spec[name] for name in ("end_token", "field") if spec.get(name) is not None]
    return Path(cache) / f"{name}-{_fingerprint(what)[:12]}"


def _check_hub(spec: Spec) -> None:
    count = spec.get("documents")
    if count is not None and (type(count) is not int or count < 1):
        refuse("data.documents", count, "must be a positive number or null")
    if spec["name"] == "hf" and not spec["dataset"]:
        rule = "must be a folder or the name of a data set on the hub"
        refuse("data.dataset", spec["dataset"], rule)


def _hub_source(spec: Spec) -> Source:
    _check_hub(spec)
    count = spec.get("documents")
    if spec["name"] == "pg19":
        return Source(_fingerprint([hub.PG19, count]), lambda: hub.pg19_documents(count))
    dataset, field = spec["dataset"], spec["field"]
    folder, stamps = Path(os.path.expanduser(dataset)).resolve(), []
    if folder.is_dir():
        kept = Path(spec.get("cache") or ".data").resolve()  # what is written there is not its own
        inside = kept != folder and kept.is_relative_to(folder)
        found = list_files(folder, "")
        own = [path for path in found if not (inside and path.resolve().is_relative_to(kept))]
        stamps = file_stamps(Files(folder, {"": own}))
    what = [dataset, field, count, stamps]
    return Source(_fingerprint(what), lambda: hub.dataset_documents(dataset, field, count))


def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"]).resolve()


def _stdlib_files() -> Files:
    root = _stdlib_root()
    files = [
        path for path in list_files(root, ".py", STDLIB_EXCLUDED) if path.suffix.lower() == ".py"
    ]
    files = [path for path in files if not path.name.startswith("_sysconfigdata")]
    if len(files) < len(SPLITS):
        rule = f"this Python keeps no sources in {root}"
        refuse("data", "stdlib", rule, "Use data=text data.path=<folder>")
    return Files(root, {"": files})


def _stdlib_documents(files: Files) -> dict[str, Documents]:
    sources = [
        p for p in files.every() if text_fault(p.read_bytes()) is None
    ]  # some test encodings
    splits = split_files(files.root, _distinct(sources).values(), STDLIB_HELD_OUT)
    return {split: _named(files, paths) for split, paths in splits.items()}


def _text_files(spec: Spec) -> Files:
    files = find_files(spec["path"], ".txt")
    if "" in files.groups and len(files.every()) > 1:
        _enough(files.root, files.every(), "")
    return files


def _text_documents(files: Files) -> dict[str, Documents]:
    every = files.every()
    if "" in files.groups and len(every) == 1:
        return split_one_file(files, every[0])
    distinct = {split: _distinct(group) for split, group in files.groups.items()}
    for split, found in distinct.items():
        if not found:
            refuse_path(files.root / split, "every file is empty", "Add text to it")
    if "" in distinct:
        splits = split_files(files.root, _enough(files.root, distinct[""].values(), "different "))
    else:
        for one, other in itertools.combinations(SPLITS, 2):
            for twin in distinct[one].keys() & distinct[other].keys():
                refuse_path(
                    distinct[one][twin],
                    f"is the same text as {distinct[other][twin]}, in another split",
                    "Remove one of them",
                )
        splits = {split: list(found.values()) for split, found in distinct.items()}
    return {split: _named(files, paths) for split, paths in splits.items()}


def _named(files: Files, paths: Iterable[Path]) -> Documents:
    return ((files.name(path), read_text(path)) for path in paths)


def _enough(root: Path, files: Iterable[Path], kind: str) -> list[Path]:
    """The files, of which there are enough; `kind` says which are counted."""
    found = list(files)
    if len(found) < len(SPLITS):
        advice = "Give at least 3, folders train, valid and test, or a single file"
        refuse_path(
            root, f"has {len(found)} {kind}file{'s' * (len(found) != 1)}, too few to split", advice
        )
    return found


def _distinct(files: Iterable[Path]) -> dict[str, Path]:
    """The first file of each content, by content hash; empty files have none."""
    found: dict[str, Path] = {}
    repeats = []
    for path in files:
        if data := read_text(path):
            first = found.setdefault(hashlib.sha256(data).hexdigest(), path)
            if first is not path:
                repeats.append(str(path))
    if repeats:
        log.info("%d files repeat others and are left out: %s", len(repeats), ", ".join(repeats))
    return found


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
