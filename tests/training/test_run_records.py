"""What a run's folder records of its text."""

import json
from types import SimpleNamespace

import pytest

from zoo.training import records


@pytest.mark.parametrize(
    ("names", "recorded"),
    [
        (["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"], {"a.jsonl": 2, "b.jsonl": 1}),
        (["a.txt", "b/c.txt", "War: a novel"], ["a.txt", "b/c.txt", "War: a novel"]),
    ],
)
def test_very_many_documents_are_counted_by_file_where_files_hold_several(
    names, recorded, tmp_path, monkeypatch
):
    monkeypatch.setattr(records, "MAX_NAMES", 2)
    stores = {split: SimpleNamespace(name=split, documents=names) for split in ("train", "valid")}
    few = SimpleNamespace(name="test", documents=["x:1", "x:2"])
    corpus = SimpleNamespace(**stores, test=few)
    records.record_documents(corpus, SimpleNamespace(path=tmp_path))
    found = json.loads((tmp_path / "documents.json").read_text())
    assert found == {"train": recorded, "valid": recorded, "test": ["x:1", "x:2"]}
