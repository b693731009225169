"""Files with many documents, one a record: JSON Lines and Parquet."""

import importlib
import importlib.util
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from zoo.data.files import COMPRESSED, HEAD_FILES, SPLITS, Documents, Files, opened, text_fault
from zoo.data.splits import split_documents, without_copies
from zoo.errors import UserError, refuse, refuse_path

SUFFIXES = {"jsonl": ".jsonl", "parquet": ".parquet"}
BATCH_ROWS = 64  # of Parquet that are in memory at once

Records = Iterator[tuple[int, Mapping[str, Any]]]  # number in the file, fields


def check_records(kind: str, files: Files, field: str) -> None:
    """Refuse, from the first record of each file, what the build would refuse."""
    if kind == "parquet":
        require_package("pyarrow", "data=parquet")
    for path in files.every()[:HEAD_FILES]:
        for number, record in read_records(kind, path, [field]):
            document_of(record, field, f"{path}:{number}")
            break


def split_records(kind: str, files: Files, field: str) -> dict[str, Documents]:
    """The documents of each split: by folder where there are folders, else by content."""
    if "" in files.groups:
        every = files.every()
        name = str(every[0] if len(every) == 1 else files.root)
        return split_documents(lambda: _documents(kind, files, "", field), name)
    return without_copies({s: partial(_documents, kind, files, s, field) for s in SPLITS})


def _documents(kind: str, files: Files, split: str, field: str) -> Documents:
    for path in files.groups[split]:
        for number, record in read_records(kind, path, [field]):
            if document := document_of(record, field, f"{path}:{number}"):
                yield f"{files.name(path)}:{number}", document


def read_records(kind: str, path: Path, fields: list[str]) -> Records:
    """The records of a file with their numbers, of Parquet with these fields alone where it has
    one. UserError where the file is damaged or cannot be read."""
    return _read_jsonl(path, fields) if kind == "jsonl" else _read_parquet(path, fields)


class _Repeated(dict[str, Any]):
    """A JSON object that has a name more than once; the last value counts."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = {name for name, count in Counter(n for n, _ in pairs).items() if count > 1}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeated(pairs)


def _read_jsonl(path: Path, fields: list[str]) -> Records:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if fault := text_fault(line):
                rule = f"is not text ({fault[1]} at byte {fault[0]} of the line)"
                refuse_path(f"{path}:{number}", rule, "Write UTF-8, without NUL bytes")
            try:
                record = json.loads(line, object_pairs_hook=_object)
            except (json.JSONDecodeError, RecursionError):
                record = None
            except ValueError:  # the one other: Python reads no longer integers
                rule = f"has an integer of more than {sys.get_int_max_str_digits():,} digits"
                refuse_path(f"{path}:{number}", rule, "Write it as text, or leave it out")
            if not isinstance(record, dict):
                refuse_path(f"{path}:{number}", "is no JSON object", "Write one object per line")
            if isinstance(record, _Repeated):
                for name in [name for name in fields if name in record.repeated]:
                    refuse_path(f"{path}:{number}", f"has {name} more than once", "Keep one")
            yield number, record


def _read_parquet(path: Path, fields: list[str]) -> Records:
    require_package("pyarrow", "data=parquet")
    with opened(path) as stream, _any_part(path, stream) as file:
        table = importlib.import_module("pyarrow.parquet").ParquetFile(file)
        names = table.schema_arrow.names
        known = [name for name in fields if name in names]
        for name in known:
            if names.count(name) > 1:
                rule = f"has {names.count(name)} columns {name}"
                refuse_path(path, rule, "Rename all but one of them")
        number = 0
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=known or names):
            for record in batch.to_pylist():
                number += 1
                yield number, record


@contextmanager
def _any_part(path: Path, stream: BinaryIO) -> Iterator[Any]:
    """A stream that can be read in any order: a copy of a compressed one, in a file of its own."""
    if path.suffix.lower() not in COMPRESSED:
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        yield copy


def document_of(record: Mapping[str, Any], field: str, place: str) -> bytes:
    """The text of a record. UserError where the field is missing or is no text."""
    if field not in record:
        names = ", ".join(name for name, value in record.items() if isinstance(value, str))
        advice = f"Use one of: {names}" if names else "Give records that have a text field"
        refuse("data.field", field, f"{place} has no such field", advice)
    text = record[field]
    if not isinstance(text, str):
        advice = "Give a field that is text in every record"
        refuse("data.field", field, f"it is no text in {place}", advice)
    return encoded(text, place)


def encoded(text: str, place: str) -> bytes:
    """The bytes of a text. UserError where UTF-8 has none for it, or NUL is among them."""
    try:
        document = text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        refuse_path(place, f"is not text (character {error.start})", "Correct or remove the record")
    if fault := text_fault(document):
        advice = "Correct or remove the record"
        refuse_path(place, f"is not text ({fault[1]} at byte {fault[0]})", advice)
    return document


def require_package(package: str, option: str) -> None:
    """Raise UserError unless an optional package is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{option}: needs the package {package}. Run pip install {package}.")
