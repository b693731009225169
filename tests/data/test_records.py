"""JSON Lines and Parquet: a document a record, split without a leak, refused in one line."""

import gzip
import importlib
import json
import sys
import types
from pathlib import Path

import pytest

from zoo.data import records
from zoo.data.corpora import open_corpus
from zoo.data.files import SPLITS
from zoo.data.sources import check_source
from zoo.errors import UserError

TEXTS = [f"document {i} " * (i % 7 + 1) for i in range(60)]


def spec(path: Path | str | None, kind: str = "jsonl", **changes) -> dict:
    fixed = {"name": kind, "path": path and str(path), "field": "text", "tokenizer": "bytes"}
    return fixed | {"eval_documents": "whole"} | changes


def lines(texts: list[str]) -> str:
    return "".join(f"{json.dumps({'id': i, 'text': text})}\n" for i, text in enumerate(texts))


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return pytest.importorskip("zstandard").compress(data)
    return gzip.compress(data) if suffix == ".gz" else data


def write(path: Path, texts: list[str]) -> Path:
    """The texts as records, in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".parquet" in path.name:
        arrow = pytest.importorskip("pyarrow")
        table = arrow.table({"id": list(range(len(texts))), "text": texts})
        plain = path.parent / "plain"
        importlib.import_module("pyarrow.parquet").write_table(table, plain, row_group_size=7)
        path.write_bytes(compressed(plain.read_bytes(), path.suffix))
        plain.unlink()
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines(texts).encode()))
    else:
        path.write_text(lines(texts))
    return path


def documents(corpus, split: str) -> list[str]:
    return bytes(corpus.text(split)).decode().split("\0")[:-1]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.parquet.gz", "a.parquet.zst"]
)
def test_every_record_is_a_document_of_one_split(tmp_path, name):
    path = write(tmp_path / name, [*TEXTS, TEXTS[3], ""])  # a copy, and an empty one
    kind = "parquet" if ".parquet" in name else "jsonl"
    check_source(spec(path, kind))
    corpus = open_corpus(spec(path, kind), tmp_path / "cache")
    found = [document for split in SPLITS for document in documents(corpus, split)]
    assert sorted(found) == sorted(TEXTS)
    for store in (corpus.train, corpus.valid, corpus.test):
        numbers = [int(name.partition(":")[2]) for name in store.documents]
        assert [name.partition(":")[0] for name in store.documents] == [name] * len(numbers)
        assert [TEXTS[number - 1] for number in numbers] == documents(corpus, store.name)


def test_the_format_and_the_number_of_files_change_nothing(tmp_path):
    one = write(tmp_path / "one/a.jsonl", TEXTS)
    write(tmp_path / "many/a.jsonl", TEXTS[:20])
    write(tmp_path / "many/b.jsonl.gz", TEXTS[20:])
    whole, parts = (
        open_corpus(spec(path), tmp_path / "cache") for path in (one, tmp_path / "many")
    )
    assert whole.fingerprint == parts.fingerprint
    pattern = open_corpus(spec(tmp_path / "many/*.jsonl*"), tmp_path / "cache")
    assert pattern.fingerprint == whole.fingerprint
    assert open_corpus(spec(one), tmp_path / "other").fingerprint == whole.fingerprint


def test_folders_say_the_split_and_training_keeps_nothing_of_the_others(tmp_path):
    for split, start in zip(SPLITS, (0, 20, 40), strict=True):
        write(tmp_path / split / "a.jsonl", [*TEXTS[start : start + 20], TEXTS[25]])
    corpus = open_corpus(spec(tmp_path), tmp_path / "cache")
    assert documents(corpus, "train") == TEXTS[:20]
    assert documents(corpus, "valid") == [*TEXTS[20:40], TEXTS[25]]
    assert documents(corpus, "test") == TEXTS[40:]


BAD = {
    "7": r"a\.jsonl:1: is no JSON object\. Write one object per line",
    "{": r"a\.jsonl:1: is no JSON object",
    "[" * 10**5: r"a\.jsonl:1: is no JSON object",
    f'{{"text": "x", "n": {"7" * 5000}}}': r"a\.jsonl:1: has an integer of more than 4,300 digits",
    r'{"text": "x", "te\u0078t": "y"}': r"a\.jsonl:1: has text more than once\. Keep one",
    '{"txet": "x", "n": 1}': r"data\.field=text: .*a\.jsonl:1 has no such field\. Use one of: txet",
    "{}": r"has no such field\. Give records that have a text field",
    '{"text": 7}': r"data\.field=text: it is no text in .*a\.jsonl:1",
    r'{"text": "\ud800"}': r"a\.jsonl:1: is not text \(character 0",
    r'{"text": "a\u0000"}': r"a\.jsonl:1: is not text \(NUL at byte 1",
}


@pytest.mark.parametrize("line", BAD)
@pytest.mark.parametrize("late", [False, True])
def test_a_record_that_is_no_document_is_refused_in_one_line(tmp_path, line, late):
    path = tmp_path / "a.jsonl"
    path.write_text((lines(TEXTS) if late else "") + line + "\n")
    expected = BAD[line].replace("jsonl:1", "jsonl:61" if late else "jsonl:1")
    calls = [lambda: open_corpus(spec(path), tmp_path / "cache")]
    for call in calls if late else [*calls, lambda: check_source(spec(path))]:
        with pytest.raises(UserError, match=expected) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_field_that_is_not_read_may_be_there_twice(tmp_path):
    path = tmp_path / "a.jsonl"
    twice = ['{"n": 1, "n": 2, "text": "x"}\n', '{"n": {"text": 1, "text": 2}, "text": "y"}\n']
    path.write_text(lines(TEXTS) + "".join(twice))
    corpus = open_corpus(spec(path), tmp_path / "cache")
    found = [document for split in SPLITS for document in documents(corpus, split)]
    assert sorted(found) == sorted([*TEXTS, "x", "y"])


def test_two_columns_of_the_name_that_is_read_are_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    columns = [[str(i) for i in range(60)], TEXTS, TEXTS]
    path = tmp_path / "a.parquet"
    for names in (["id", "id", "text"], ["id", "text", "text"]):
        table = arrow.Table.from_arrays([arrow.array(each) for each in columns], names=names)
        importlib.import_module("pyarrow.parquet").write_table(table, path)
        if names.count("text") == 1:
            check_source(spec(path, "parquet"))
    for call in (check_source, lambda one: open_corpus(one, tmp_path / "cache")):
        with pytest.raises(UserError, match=r"a\.parquet: has 2 columns text\. Rename all but one"):
            call(spec(path, "parquet"))


@pytest.mark.parametrize("line", [b'{"text": "\xff"}', b'{"text": "a\0"}'])
def test_bytes_that_are_no_text_are_named_as_such(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS).encode() + line + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl:61: is not text \(.* at byte 1\d of the line\)"):
        open_corpus(spec(path), tmp_path / "cache")


def test_a_file_of_too_few_documents_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS[:2])
    with pytest.raises(UserError, match=r"a\.jsonl: has 2 different documents"):
        open_corpus(spec(path), tmp_path / "cache")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_no_path_is_refused(kind, tmp_path):
    message = rf"data\.path=null: must be a folder with \.{kind} files"
    with pytest.raises(UserError, match=message):
        check_source(spec(None, kind))
    with pytest.raises(UserError, match=rf"has no \.{kind} file"):
        check_source(spec(tmp_path, kind))


def test_parquet_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"data=parquet: needs the package pyarrow\. Run pip"):
        check_source(spec(tmp_path, "parquet"))


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    """By a stand-in for pyarrow, which need not be installed."""
    requested = {}

    class ParquetFile:
        def __init__(self, file):
            self.schema_arrow = types.SimpleNamespace(names=["id", "text"])

        def iter_batches(self, batch_size, columns):
            requested.update(batch_size=batch_size, columns=columns)
            for start in range(0, len(TEXTS), batch_size):
                rows = [{"text": text} for text in TEXTS[start : start + batch_size]]
                yield types.SimpleNamespace(to_pylist=lambda rows=rows: rows)

    monkeypatch.setattr(records, "BATCH_ROWS", 7)
    monkeypatch.setattr(records, "require_package", lambda *_: None)
    module = types.SimpleNamespace(ParquetFile=ParquetFile)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    (tmp_path / "a.parquet").write_bytes(b"")
    corpus = open_corpus(spec(tmp_path, "parquet"), tmp_path / "cache")
    assert requested == {"batch_size": 7, "columns": ["text"]}
    assert sorted(d for split in SPLITS for d in documents(corpus, split)) == sorted(TEXTS)
    monkeypatch.setattr(ParquetFile, "iter_batches", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read \(division by zero\)"):
        check_source(spec(tmp_path, "parquet"))
