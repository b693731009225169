"""Documents are divided 90/5/5, whole and once, whatever holds them."""

import gzip
import itertools
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data import splits
from zoo.data.files import SPLITS, find_files
from zoo.data.splits import split_documents, split_one_file, without_copies
from zoo.errors import UserError

SIZES = st.lists(st.integers(1, 2000), min_size=3, max_size=60)


def numbered(sizes: list[int]) -> list[tuple[str, bytes]]:
    return [(f"{i}", f"{i} ".encode() * size) for i, size in enumerate(sizes)]


@given(SIZES)
@settings(deadline=None)
def test_documents_are_divided_whole_and_once(sizes):
    every = numbered(sizes)
    found = {split: list(part) for split, part in split_documents(lambda: every, "x").items()}
    assert sorted(itertools.chain(*found.values())) == sorted(every)
    assert all(found.values())
    size = {split: sum(len(text) for _, text in part) for split, part in found.items()}
    if len(found["train"]) > 1:  # otherwise there was no more to give
        assert min(size["valid"], size["test"]) >= 0.05 * sum(size.values())
    order = {split: [int(name) for name, _ in part] for split, part in found.items()}
    assert all(part == sorted(part) for part in order.values())


def test_a_document_stays_in_its_split_wherever_it_is_and_copies_count_once():
    every = numbered([5] * 200)

    def split_of(documents: list[tuple[str, bytes]]) -> dict[bytes, str]:
        found = split_documents(lambda: documents, "x")
        return {text: split for split, part in found.items() for _, text in part}

    first = split_of(every)
    assert split_of(every[::-1]) == first
    twice = [(f"copy of {name}", text) for name, text in every]
    parts = split_documents(lambda: every + twice, "x")
    names = [name for part in parts.values() for name, _ in part]
    assert len(names) == 200
    assert not any(name.startswith("copy") for name in names)


@pytest.mark.parametrize(("longest", "said"), [(10, False), (10_000, True)])
def test_it_is_said_where_one_document_leaves_little_to_train_on(longest, said, caplog):
    texts = [(str(i), str(i).encode() * 10) for i in range(40)]
    for last in range(64):  # wherever its hash puts it
        documents = [*texts, ("long", f"{last:02d}".encode() * longest)]
        caplog.clear()
        parts = split_documents(lambda documents=documents: iter(documents), "name")
        size = {split: sum(len(text) for _, text in part) for split, part in parts.items()}
        little = 2 * size["train"] < sum(size.values())
        assert little == any("are left to train on" in line for line in caplog.messages)
        if little == said:
            return
    pytest.fail("no such split")


@pytest.mark.parametrize("texts", [[], [b"a"], [b"a", b"b"], [b"a", b"b", b"a"]])
def test_too_few_documents_are_refused(texts):
    with pytest.raises(UserError, match=rf"x: has {len(set(texts))} different documents\. Give"):
        split_documents(lambda: [("", text) for text in texts], "x")


def test_training_documents_that_are_held_out_are_left_out():
    texts = {"train": (b"a", b"b"), "valid": (b"b",), "test": ()}
    reads = {split: lambda own=own: [("", text) for text in own] for split, own in texts.items()}
    assert list(without_copies(reads)["train"]) == [("", b"a")]


def test_given_splits_share_no_document():
    texts = {"train": (b"a", b"b", b"c"), "valid": (b"b", b"d"), "test": (b"b", b"c", b"e")}
    reads = {split: lambda own=own: [("", text) for text in own] for split, own in texts.items()}
    found = {split: [text for _, text in part] for split, part in without_copies(reads).items()}
    assert found == {"train": [b"a"], "valid": [b"b", b"d"], "test": [b"c", b"e"]}


def text_of(paragraphs: int) -> bytes:
    return b"\n\n".join(f"Paragraph {i}, é.\nIts second line.".encode() for i in range(paragraphs))


@pytest.mark.parametrize("name", ["book.md", "book.md.gz"])
@pytest.mark.parametrize("longest", [2**24, 500])
def test_one_file_is_cut_at_paragraphs_into_stretches(tmp_path, monkeypatch, name, longest):
    monkeypatch.setattr(splits, "MAX_DOCUMENT", longest)
    text, path = text_of(400), tmp_path / name
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    files = find_files(str(path), ".txt")
    found = {split: list(part) for split, part in split_one_file(files, path).items()}
    assert list(found) == list(SPLITS)
    everything = list(itertools.chain(*found.values()))
    assert b"".join(document for _, document in everything) == text
    assert all(document.startswith(b"Paragraph") for _, document in everything)
    for label, document in everything:
        start, stop = map(int, label.removeprefix(f"{name}[").removesuffix("]").split(":"))
        assert text[start:stop] == document
        assert len(document) < longest + 50
    held_out = sum(len(document) for split in SPLITS[1:] for _, document in found[split])
    assert held_out == pytest.approx(0.1 * len(text), abs=50)


@pytest.mark.parametrize("text", [b"x" * 300, "é".encode() * 300, b"a b " * 99, b"a\nb\n" * 99])
def test_without_paragraphs_it_is_cut_at_a_line_a_word_or_a_character(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text)
    files = find_files(str(path), ".txt")
    parts = [b"".join(d for _, d in part) for part in split_one_file(files, path).values()]
    assert b"".join(parts) == text
    assert all(part.decode() for part in parts)


def test_a_file_too_short_to_cut_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    files = find_files(str(tmp_path / "a.txt"), ".txt")
    with pytest.raises(UserError, match=r"a\.txt: has 2 bytes, too few to cut into three splits"):
        split_one_file(files, files.every()[0])


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(splits, "MAX_DOCUMENT", 2**20)
    path = tmp_path / "a.txt"
    path.write_bytes(text_of(30).ljust(2**10) * 2**15)  # 32 MiB
    files = find_files(str(path), ".txt")
    tracemalloc.start()
    for part in split_one_file(files, path).values():
        for _ in part:
            pass
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
