"""Which files data.path names, and what is read from them, compressed or not."""

import gzip
import importlib
import os
import random
from pathlib import Path

import pytest

from zoo.data.files import SPLITS, find_files, opened, read_text
from zoo.errors import UserError


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Files of several kinds; the working directory is their folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("docs/a.md", "docs/deep/b.md", "docs/c.txt", "d.py", "[x]/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("docs", ["c.txt"]),
        ("docs/**/*.md", ["a.md", "deep/b.md"]),
        ("docs/*.md", ["a.md"]),
        ("**/*.py", ["d.py"]),
        ("d.py", ["d.py"]),
        ("docs/c.txt", ["c.txt"]),
        ("docs/[ac].*", ["a.md", "c.txt"]),
        ("[x]", ["e.txt"]),  # a folder of this name
    ],
)
def test_a_path_names_a_folder_a_file_or_a_pattern(place, path, names):
    for given in (path, str(place / path)):
        files = find_files(given, ".txt")
        assert [files.name(file) for file in files.every()] == names
        assert list(files.groups) == [""]


def test_folders_named_by_splits_are_the_splits_of_a_pattern_too(place):
    for split in SPLITS:
        (place / "book" / split).mkdir(parents=True)
        (place / "book" / split / "a.md").write_text(split)
    files = find_files("book/**/*.md", ".txt")
    assert {s: [files.name(f) for f in group] for s, group in files.groups.items()} == {
        split: [f"{split}/a.md"] for split in SPLITS
    }
    (place / "book/valid/a.md").unlink()
    with pytest.raises(UserError, match=r"book: has a folder train but lacks valid\. Add it"):
        find_files("book/**/*.md", ".txt")


@pytest.mark.parametrize("path", ["docs/*.rst", "nowhere/*/x"])
def test_a_pattern_that_matches_no_file_is_refused(place, path):
    with pytest.raises(UserError, match=r"^data\.path=.*: no file matches\. Give "):
        find_files(path, ".txt")


def test_a_relative_pattern_is_found_below_a_folder_named_like_one(tmp_path, monkeypatch):
    folder = tmp_path / "[proj]" / "docs"
    folder.mkdir(parents=True)
    (folder / "a.md").write_text("text")
    monkeypatch.chdir(folder.parent)
    assert find_files("docs/*.md", ".txt").every() == [folder / "a.md"]


def compress(path: Path, text: bytes) -> Path:
    if path.suffix == ".zst":
        for name in ("compression.zstd", "zstandard"):
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            with module.open(path, "wb") as file:
                file.write(text)
            return path
        pytest.skip("no package for .zst")
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_compressed_file_reads_as_the_plain_one(tmp_path, name):
    text = "é and more\n".encode() * 1000
    path = compress(tmp_path / name, text)
    assert find_files(str(tmp_path), ".txt").every() == [path]
    assert read_text(path) == text
    assert read_text(path, 11) == text[:11]
    with opened(path) as file:
        file.seek(5000)
        assert file.read(20) == text[5000:5020]


def test_frames_of_a_compressed_file_follow_one_another(tmp_path):
    one, two = b"alpha\n" * 50_000, b"beta\n" * 50_000
    parts = [
        compress(tmp_path / f"{n}.zst", text).read_bytes() for n, text in enumerate((one, two))
    ]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(parts))
    assert read_text(path) == one + two
    with opened(path) as file:
        file.seek(len(one) + 5)
        assert (file.readline(), file.tell()) == (b"beta\n", len(one) + 10)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("size", [200, 10**6], ids=["one block", "many"])
def test_a_compressed_file_cut_anywhere_is_one_line_and_never_a_shorter_text(tmp_path, name, size):
    text = random.Random(size).randbytes(size // 2).hex().encode()
    whole = compress(tmp_path / name, text).read_bytes()
    path = tmp_path / name
    shares = (0.001, 0.2, 0.5, 0.9, 0.99999)
    for end in sorted({max(1, int(len(whole) * share)) for share in shares} | {len(whole) - 1}):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(.*\)\. Check") as caught:
            read_text(path)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole + whole[:end])  # in a second frame
        with pytest.raises(UserError, match="cannot be read"):
            read_text(path)


def test_linked_folders_are_read_once_wherever_they_lead(tmp_path):
    for place in ("text/own", "other"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.txt").write_text(place)
    plain = [path.name for path in find_files(str(tmp_path / "text"), ".txt").every()]
    (tmp_path / "text/again").symlink_to(tmp_path / "text/own")
    (tmp_path / "text/loop").symlink_to(tmp_path / "text")
    (tmp_path / "other/back").symlink_to(tmp_path / "text")
    (tmp_path / "text/inside").mkdir()
    (tmp_path / "text/inside/link").symlink_to(tmp_path / "text/own")
    assert [path.name for path in find_files(str(tmp_path / "text"), ".txt").every()] == plain
    (tmp_path / "text/more").symlink_to(tmp_path / "other")
    found = find_files(str(tmp_path / "text"), ".txt").every()
    assert {path.relative_to(tmp_path).as_posix() for path in found} == {
        "text/own/a.txt", "text/more/a.txt"
    }  # fmt: skip


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt: is no regular file"):
        find_files(str(tmp_path / "pipe.txt"), ".txt")


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:20], lambda b: b"no archive"])
def test_a_damaged_archive_is_one_line(tmp_path, damage):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(damage(gzip.compress(os.urandom(1000).hex().encode())))
    with pytest.raises(UserError, match=r"a\.txt\.gz: cannot be read \(.*\)\. Check") as caught:
        read_text(path)
    assert "\n" not in str(caught.value)


def test_zst_without_its_package_is_refused(tmp_path, monkeypatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.txt\.zst: needs the package zstandard\. Run pip"):
        read_text(tmp_path / "a.txt.zst")
