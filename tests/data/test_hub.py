"""Data sets by the package datasets: their splits or ours, and no network that is not requested."""

import contextlib
import importlib.machinery
import importlib.util
import sys
import types

import pytest

from zoo.data.corpora import open_corpus
from zoo.data.sources import check_source, find_source
from zoo.errors import UserError

TEXTS = [f"document {i} " * (i % 5 + 1) for i in range(60)]


def spec(dataset, **changes) -> dict:
    fixed = {"name": "hf", "dataset": dataset and str(dataset), "field": "text", "documents": None}
    return fixed | {"tokenizer": "bytes", "eval_documents": "whole"} | changes


@pytest.fixture
def library(monkeypatch):
    """A stand-in for datasets: `splits` of every data set; what was loaded in `requested`."""
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.requested, module.splits = [], {"train": [{"text": text} for text in TEXTS]}

    def load_dataset(name, streaming):
        assert streaming
        module.requested.append(name)
        return module.splits

    def load_from_disk(folder):
        module.requested.append(f"disk {folder}")
        return module.splits if len(module.splits) > 1 else module.splits["train"]

    module.load_dataset, module.load_from_disk = load_dataset, load_from_disk
    monkeypatch.setitem(sys.modules, "datasets", module)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def no_network(monkeypatch):
    def fail(url, timeout):
        raise AssertionError("the network was used")

    monkeypatch.setattr("urllib.request.urlopen", fail)


def documents(corpus, split: str) -> list[str]:
    return bytes(corpus.text(split)).decode().split("\0")[:-1]


@pytest.mark.parametrize("saved", [False, True])
def test_a_folder_is_read_without_a_network_and_split_by_content(
    library, no_network, tmp_path, saved
):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / ("state.json" if saved else "a.csv")).write_text("")
    check_source(spec(folder))
    corpus = open_corpus(spec(folder), tmp_path / "cache")
    found = [d for split in ("train", "valid", "test") for d in documents(corpus, split)]
    assert sorted(found) == sorted(TEXTS)
    assert set(library.requested) == {f"disk {folder}" if saved else str(folder)}
    count = len(library.requested)
    again = open_corpus(spec(folder), tmp_path / "cache")
    assert (again.fingerprint, len(library.requested)) == (corpus.fingerprint, count)


def test_tokens_that_are_kept_in_its_folder_are_none_of_its_files(library, no_network, tmp_path):
    (tmp_path / "a.csv").write_text("")
    kept = tmp_path / "cache"
    open_corpus(spec(tmp_path, cache=str(kept)), kept)
    count = len(library.requested)
    open_corpus(spec(tmp_path, cache=str(kept)), kept)
    assert len(library.requested) == count
    (tmp_path / "b.csv").write_text("")
    open_corpus(spec(tmp_path, cache=str(kept)), kept)
    assert len(library.requested) > count


def test_a_data_set_below_the_cache_has_files_of_its_own(library, no_network, tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "a.csv").write_text("one")
    before = find_source(spec(place, cache=str(tmp_path))).fingerprint
    (place / "a.csv").write_text("another")
    assert find_source(spec(place, cache=str(tmp_path))).fingerprint != before


def test_its_own_three_splits_are_ours(library, no_network, tmp_path):
    names = ("train", "validation", "test")
    library.splits = {n: [{"text": f"{n} {i}"} for i in range(5)] for n in names}
    corpus = open_corpus(spec(tmp_path, documents=2), tmp_path / "cache")
    assert documents(corpus, "valid") == ["validation 0", "validation 1"]
    assert documents(corpus, "train") == ["train 0", "train 1"]


def test_its_own_splits_share_no_document(library, no_network, tmp_path):
    names = ("train", "validation", "test")
    library.splits = {
        n: [{"text": f"{n} {i}"} for i in range(5)] + [{"text": "same"}] for n in names
    }
    corpus = open_corpus(spec(tmp_path), tmp_path / "cache")
    holding = [split for split in ("train", "valid", "test") if "same" in documents(corpus, split)]
    assert holding == ["valid"]


def test_a_name_on_the_hub_needs_the_network_first(library, tmp_path, monkeypatch):
    requested = []

    def answer(url, timeout):
        requested.append(url)
        return contextlib.nullcontext()

    monkeypatch.setattr("urllib.request.urlopen", answer)
    check_source(spec("someone/books", cache=str(tmp_path)))
    assert requested == ["https://huggingface.co/api/datasets/someone/books"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"data=hf: streams from the network, but HF_HUB_OFFLINE"):
        check_source(spec("someone/books", cache=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": None}, r"data\.dataset=null: must be a folder or the name"),
        ({"field": "body"}, r"data\.field=body: .* train:0 has no such field\. Use one of: text"),
        ({"documents": 0}, r"data\.documents=0: must be a positive number or null"),
    ],
)
def test_what_cannot_be_read_is_refused(library, no_network, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        open_corpus(spec(tmp_path) | changes, tmp_path / "cache")


def test_a_data_set_that_breaks_off_is_one_line(library, no_network, tmp_path):
    def rows():
        yield {"text": "one"}
        raise RuntimeError("connection reset\nby peer")

    class Broken:
        def __iter__(self):
            return rows()

    library.splits = {"train": Broken()}
    message = r"reading train failed: RuntimeError: connection reset\. Try again"
    with pytest.raises(UserError, match=message):
        open_corpus(spec(tmp_path), tmp_path / "cache")


def test_without_its_package_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package datasets\. Run pip install datasets"):
        check_source(spec(tmp_path))


@pytest.mark.parametrize("name", ["hf", "pg19"])
def test_a_package_that_is_missing_is_named_before_what_the_files_are(name, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="needs the package datasets"):
        check_source(spec(tmp_path, name=name, cache=str(tmp_path / "cache")))
