"""Corpora: what is read, what is refused in which words, and that no document is in two splits."""

import builtins
import contextlib
import importlib.machinery
import importlib.util
import itertools
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.data import corpora, files, hub, sources
from zoo.data.corpora import open_corpus
from zoo.data.sources import SPLITS, check_source, split_files
from zoo.data.tokenizers import bytes_by_token, open_tokenizer
from zoo.errors import UserError

STDLIB = {"name": "stdlib", "tokenizer": "bytes", "eval_documents": "joined"}
PG19 = {"name": "pg19", "tokenizer": "bytes", "eval_documents": "whole", "documents": 3}


def text(path: Path | str | None, **changes) -> dict:
    spec = {"name": "text", "path": path and str(path), "tokenizer": "bytes"}
    return spec | {"eval_documents": "whole"} | changes


def write(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / f"{name}.txt").write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


@pytest.fixture
def flat(tmp_path) -> Path:
    return write(tmp_path / "flat", a="alpha", b="bravo", c="charlie", d="delta")


@pytest.fixture
def split(tmp_path) -> Path:
    for name in SPLITS:
        write(tmp_path / "split" / name, one=f"first {name}", two=f"second {name} é")
    return tmp_path / "split"


def documents(store) -> list[bytes]:
    return bytes(store.tokens).split(b"\0")[:-1]


def stores(corpus) -> list:
    return [corpus.train, corpus.valid, corpus.test]


def test_folders_say_the_split(split, tmp_path):
    corpus = open_corpus(text(split), tmp_path / "cache")
    for store in stores(corpus):
        expected = [f"first {store.name}".encode(), f"second {store.name} é".encode()]
        assert documents(store) == expected
    assert (corpus.vocab_size, corpus.tokenizer.name, corpus.bytes_per_token) == (256, "bytes", 1.0)


def test_a_flat_folder_is_split_by_file(flat, tmp_path):
    found = [documents(store) for store in stores(open_corpus(text(flat), tmp_path / "cache"))]
    assert sorted(itertools.chain(*found)) == [b"alpha", b"bravo", b"charlie", b"delta"]
    assert all(found)


def test_which_file_went_into_which_split_is_recorded(flat, split, tmp_path):
    corpus = open_corpus(text(split), tmp_path / "cache")
    for store in stores(corpus):
        assert store.documents == [f"{store.name}/one.txt", f"{store.name}/two.txt"]
    corpus = open_corpus(text(flat), tmp_path / "cache")
    for store in stores(corpus):
        assert [(flat / name).read_bytes() for name in store.documents] == documents(store)
    held_out = corpus.summary["test"]
    assert (held_out["documents"], held_out["tokens"], held_out["bytes"]) == (1, 6, 6)


def test_folders_within_folders_are_read(flat, tmp_path):
    write(flat / "deep" / "deeper", e="echo")
    corpus = open_corpus(text(flat), tmp_path / "cache")
    assert b"echo" in itertools.chain(*map(documents, stores(corpus)))


@given(sizes=st.lists(st.integers(1, 4000), min_size=3, max_size=40), held_out=st.integers(0, 9000))
def test_splits_are_whole_disjoint_and_as_large_as_requested(tmp_path_factory, sizes, held_out):
    root = tmp_path_factory.mktemp("files")
    for i, size in enumerate(sizes):
        (root / f"{i}").write_bytes(b"x" * size)
    files = list(root.iterdir())
    splits = split_files(root, files, held_out)
    assert sorted(itertools.chain(*splits.values())) == sorted(files)
    assert all(splits.values())
    size = {name: sum(path.stat().st_size for path in splits[name]) for name in SPLITS}
    if len(splits["train"]) > 1:  # otherwise there was no more to give
        assert min(size["valid"], size["test"]) >= max(held_out, 0.05 * sum(sizes))
    assert splits == split_files(root, reversed(files), held_out)


def test_identical_files_count_once_when_split_by_file(flat, tmp_path):
    write(flat, twin="alpha")
    corpus = open_corpus(text(flat), tmp_path / "cache")
    assert sorted(itertools.chain(*map(documents, stores(corpus)))).count(b"alpha") == 1


def test_identical_files_in_two_splits_are_refused(split, tmp_path):
    write(split / "test", leak="first train")
    with pytest.raises(UserError, match=r"train/one\.txt: is the same text as .*test/leak\.txt"):
        open_corpus(text(split), tmp_path / "cache")


def test_the_standard_library_is_split_by_file(tmp_path):
    corpus = open_corpus(STDLIB, tmp_path)
    found = [documents(store) for store in stores(corpus)]
    every = list(itertools.chain(*found))
    assert len(set(every)) == len(every)  # so no document is in two splits
    assert min(len(store) for store in stores(corpus)) >= 400_000
    assert len(corpus.train) > 0.8 * sum(map(len, stores(corpus)))
    names = {path.name for path in sources._stdlib_files().every()}
    assert {"argparse.py", "dataclasses.py"} < names
    assert not {"test_argparse.py", "idlelib.py", "cp437.py"} & names


def test_tokens_follow_their_source(flat, tmp_path):
    first = open_corpus(text(flat), tmp_path / "cache")
    assert open_corpus(text(flat), tmp_path / "cache").fingerprint == first.fingerprint
    write(flat, a="another alpha")
    second = open_corpus(text(flat), tmp_path / "cache")
    assert second.fingerprint != first.fingerprint
    assert b"another alpha" in itertools.chain(*map(documents, stores(second)))


@pytest.mark.parametrize("left", [0.9, 1.1])
@pytest.mark.parametrize("kind", ["one.txt", "flat", "split", "records.jsonl"])
def test_files_that_change_while_they_are_read_are_refused(
    kind, left, flat, split, tmp_path, monkeypatch
):
    """What was read of them as one split's could be read again as another's."""
    lines = [f'{{"text": "line {number}"}}\n' for number in range(100)]
    for name in ("one.txt", "records.jsonl"):
        (tmp_path / name).write_text("".join(lines))
    place = tmp_path / kind
    file = place if place.is_file() else min(place.rglob("*.txt"))
    whole, write_store = file.read_bytes(), corpora.write_store

    def change(*words, **options):
        write_store(*words, **options)
        file.write_bytes((whole * 2)[: int(left * len(whole))])

    name = "jsonl" if kind.endswith("jsonl") else "text"
    spec = text(place, name=name, field="text")
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "write_store", change)
        with pytest.raises(UserError, match=r"while (it|the text) was read|is no JSON object"):
            open_corpus(spec, tmp_path / "cache")
    file.write_bytes(whole)
    assert all(map(documents, stores(open_corpus(spec, tmp_path / "cache"))))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *itertools.product(
            ["one.txt", "flat", "split", "records.jsonl"], ["none", "touched each time"]
        ),
        ("one.txt", "a letter"),
        ("split", "a letter"),
    ],
)
def test_a_file_that_is_touched_while_it_is_read_is_as_it_was_or_is_named(
    change, kind, flat, split, tmp_path, monkeypatch
):
    for name in ("one.txt", "records.jsonl"):
        (tmp_path / name).write_text('{"text": "a line"}\n{"text": "b"}\n{"text": "other"}\n' * 9)
    place = tmp_path / kind
    file = place if place.is_file() else max(place.rglob("*.txt"))
    file = place / "train/one.txt" if kind == "split" else file  # which is read first
    spec = text(place, name="jsonl" if kind.endswith("jsonl") else "text", field="text")
    expected = open_corpus(spec, tmp_path / "expected").fingerprint
    calls, write_store = [], corpora.write_store

    def touch(*words, **options):
        write_store(*words, **options)
        calls.append(1)
        if len(calls) == 1 or change == "touched each time":
            if change == "a letter":
                file.write_bytes(file.read_bytes().replace(b"i", b"j"))
            os.utime(file, (len(calls), len(calls)))

    monkeypatch.setattr(corpora, "write_store", touch)
    if change == "none":
        assert open_corpus(spec, tmp_path / "cache").fingerprint == expected
        assert len(calls) == 6
        open_corpus(spec, tmp_path / "cache")
        assert len(calls) == 6  # the store is of the file as it is now
        return
    with pytest.raises(UserError) as error:
        open_corpus(spec, tmp_path / "cache")
    root = place if place.is_dir() else tmp_path
    said = f"{file.relative_to(root)} changed while the text was read. Use the same command again."
    assert str(error.value) == f"data={spec['name']}: {said}"


def test_the_tokens_that_an_earlier_version_drew_are_built_again(split, tmp_path, monkeypatch):
    """BPE dropout is off; the stores of before it was have the source alone."""
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "fi"])}
    for dropout in (0.5, 0.0, None):
        made = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocabulary, [("f", "i")], dropout=dropout)
        )
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        file = tmp_path / f"{dropout}.json"
        made.save(str(file))
        spec, built = text(split, tokenizer=str(file)), []
        for prints in (lambda source, _: source.fingerprint, corpora._fingerprint):
            build = corpora._build
            with monkeypatch.context() as patch:
                patch.setattr(corpora, "_fingerprint", prints)
                patch.setattr(corpora, "_build", lambda *w, b=build, n=built: n.append(1) or b(*w))
                open_corpus(spec, tmp_path / "cache")
        assert len(built) == (2 if dropout else 1)


@pytest.mark.parametrize("name", SPLITS)
def test_the_fingerprint_covers_every_split(split, tmp_path, name):
    first = open_corpus(text(split), tmp_path / "cache")
    write(split / name, three="more")
    assert open_corpus(text(split), tmp_path / "cache").fingerprint != first.fingerprint


def test_the_fingerprint_is_of_the_text_not_of_its_place(flat, tmp_path):
    copy = write(tmp_path / "copy", **{p.stem: p.read_bytes() for p in flat.iterdir()})
    one = open_corpus(text(flat), tmp_path / "cache")
    other = open_corpus(text(copy), tmp_path / "cache")
    assert one.train.folder != other.train.folder
    assert one.fingerprint == other.fingerprint


def test_a_damaged_store_is_built_again_from_its_source(flat, tmp_path):
    corpus = open_corpus(text(flat), tmp_path / "cache")
    tokens = corpus.test.folder / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    assert open_corpus(text(flat), tmp_path / "cache").fingerprint == corpus.fingerprint


def refused(spec: dict, match: str, cache: Path, early: bool = True) -> None:
    """One line, from the early check (where it can know) and from the build; nothing is left."""
    calls = [lambda: open_corpus(spec, cache)] + [lambda: check_source(spec)] * early
    for call in calls:
        with pytest.raises(UserError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    left = [path.name for path in cache.iterdir()] if cache.exists() else []
    assert not [name for name in left if not name.endswith(".lock")]


def test_no_path_is_refused(tmp_path):
    refused(text(None), "data.path=null: must be a folder with .txt files", tmp_path / "cache")


def test_a_missing_folder_is_refused(tmp_path):
    refused(text(tmp_path / "nowhere"), "nowhere: does not exist", tmp_path / "cache")


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "page.html").write_text("html")
    refused(text(tmp_path / "empty"), r"empty: has no \.txt file", tmp_path / "cache")


def test_a_split_without_text_is_refused(split, tmp_path):
    for path in (split / "valid").iterdir():
        path.unlink()
    refused(text(split), r"valid: has no \.txt file", tmp_path / "cache")


def test_a_missing_split_is_refused(split, tmp_path):
    (split / "valid").rename(split / "validation")
    refused(text(split), "split: has a folder train but lacks valid", tmp_path / "cache")


def test_two_files_are_too_few_to_split(flat, tmp_path):
    (flat / "a.txt").unlink()
    (flat / "b.txt").unlink()
    refused(text(flat), "flat: has 2 files", tmp_path / "cache")


def test_three_files_of_which_two_are_the_same_are_too_few(flat, tmp_path):
    (flat / "a.txt").unlink()
    write(flat, b="charlie")
    refused(text(flat), "flat: has 2 different", tmp_path / "cache", early=False)


def test_empty_files_are_no_documents(split, tmp_path):
    write(split / "train", empty="")
    assert len(documents(open_corpus(text(split), tmp_path / "cache").train)) == 2
    write(split / "valid", one="", two="")
    refused(text(split), "valid: every file is empty", tmp_path / "other", early=False)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"abc\0def", "NUL at byte 3"),
        (b"caf\xe9", "not UTF-8 at byte 3"),
        (b"\xc3", "not UTF-8 at byte 0"),
        ("é".encode() * 3000 + b"\xff", "not UTF-8 at byte 6000"),
        (b"x\0\xff", "NUL at byte 1"),
        (b"x\xff\0", "not UTF-8 at byte 1"),
    ],
)
def test_binary_files_are_refused_by_name_and_offset(flat, tmp_path, data, what):
    write(flat, bad=data)
    match = rf"bad\.txt: is not text \({what}"
    refused(text(flat), match, tmp_path / "cache", early=len(data) < files.HEAD_BYTES)


def test_a_character_across_the_end_of_the_head_is_text(flat):
    write(flat, long=b"x" * (files.HEAD_BYTES - 1) + "é".encode())
    check_source(text(flat))


def test_an_unreadable_file_is_refused(flat, tmp_path, monkeypatch):
    real = builtins.open

    def guarded(path, *arguments, **options):
        if str(path).endswith("b.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", guarded)
    refused(text(flat), r"b\.txt: cannot be read \(Permission denied", tmp_path / "cache")


def test_an_unreadable_folder_is_refused(flat, tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files.os, "scandir", closed)
    refused(text(flat), r"flat: cannot be read \(Permission denied", tmp_path / "cache")


@pytest.mark.parametrize(
    ("texts", "said"), [(["x"], "1 different file,"), (["x", "y"], "2 different files,")]
)
def test_only_different_files_are_counted_as_such(texts, said, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(texts[i % len(texts)])
    refused(text(tmp_path), f"has {said} too few to split", tmp_path / "cache", early=False)
    for i in (2, 3):
        (tmp_path / f"{i}.txt").unlink()
    refused(text(tmp_path), "has 2 files, too few to split", tmp_path / "cache")


def test_a_dangling_link_is_refused(flat, tmp_path):
    (flat / "link.txt").symlink_to(tmp_path / "nowhere")
    refused(text(flat), r"link\.txt: cannot be read \(No such file", tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "txet"}, "data.name=txet: unknown name. Did you mean 'text'"),
        ({"eval_documents": "hole"}, "Did you mean 'whole'"),
        ({"tokenizer": "gpt2"}, "must be bytes or a tokenizers JSON file.*Nothing is downl"),
    ],
)
def test_unknown_choices_are_refused(flat, tmp_path, changes, match):
    refused(text(flat) | changes, match, tmp_path / "cache")


@pytest.mark.parametrize("spec", [STDLIB, "flat"])
def test_the_early_check_needs_neither_numpy_nor_time(flat, spec):
    spec = text(flat) if spec == "flat" else spec
    code = (
        "import sys, time; from zoo.data.sources import check_source; start = time.time();"
        f"check_source({spec!r}); print(time.time() - start); assert 'numpy' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 1


@pytest.fixture
def library_of_tokenizers():
    return pytest.importorskip("tokenizers")


@pytest.fixture
def words(tmp_path, library_of_tokenizers) -> str:
    """Byte-level BPE: every byte is a token, and so are "al" and "pha"."""
    library = library_of_tokenizers
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "al", "ph", "pha"])}
    merges = [("a", "l"), ("p", "h"), ("ph", "a")]
    tokenizer = library.Tokenizer(library.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(tmp_path / "words.json"))
    return str(tmp_path / "words.json")


def test_a_tokenizer_file_gives_its_tokens_and_one_that_ends(split, tmp_path, words):
    write(split / "train", one="alpha", two="alalpha")
    store = open_corpus(text(split, tokenizer=words), tmp_path / "cache").train
    al, pha, end = 256, 258, 259
    assert store.tokens.tolist() == [al, pha, end, al, al, pha, end]
    assert store.tokens.dtype == np.uint16
    # text and, as for bytes, one per document for its end: bits per byte compare
    assert store.bytes_per_token == (len("alpha") + len("alalpha") + 2) / 7
    assert store.bytes_of(0, 7).tolist() == [2, 3, 1, 2, 2, 3, 1]
    corpus = open_corpus(text(split, tokenizer=words), tmp_path / "cache")
    assert corpus.vocab_size == 260
    assert corpus.tokenizer.name.startswith("words.json@")


@given(
    st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_bytes_of_a_document_are_those_of_its_tokens(words, documents):
    tokenizer = open_tokenizer(words)
    for document in documents:
        tokens, sizes = tokenizer.encode_checked(document.encode())
        assert tokens == tokenizer.encode(document.encode())
        assert len(tokens) == len(sizes)
        assert sum(sizes) == len(document.encode()) + 1
        assert min(sizes) > 0  # a character of four bytes is four tokens, each of them one
        single = tokenizer.encode_checked(("x" + document).encode())[1]
        assert single[0] == 1


def test_bytes_that_a_tokenizer_leaves_out_count_with_the_token_after_them():
    spans = [(0, 3), (5, 7), (7, 8), (7, 8), (7, 8), (9, 9)]
    assert bytes_by_token("one  tw€oé", spans) == [3, 4, 1, 1, 1, 1, 3]


def lossy(library, kind: str):
    """Tokenisers that do not give back what they were given."""
    if kind == "unknown words":
        model = library.models.WordLevel({"alpha": 0, "?": 1}, unk_token="?")
        tokenizer = library.Tokenizer(model)
        tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
        return tokenizer
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = library.Tokenizer(library.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    if kind == "no decoder":
        tokenizer.decoder = library.decoders.Fuse()
    elif kind == "a space before":
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        tokenizer.normalizer = getattr(library.normalizers, kind)()
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "given_text"),
    [
        ("unknown words", "alpha beta"),
        ("no decoder", "alpha beta"),
        ("a space before", "alpha beta"),
        ("Lowercase", "Alpha"),
        ("NFC", "e\u0301"),
        ("NFKC", "\ufb01"),
        ("Strip", " alpha"),
        ("StripAccents", "e\u0301"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused_by_document_and_place(
    split, tmp_path, library_of_tokenizers, kind, given_text
):
    lossy(library_of_tokenizers, kind).save(str(tmp_path / "lossy.json"))
    write(split / "valid", late=f"{given_text}")
    for kept in (split / "train", split / "test"):  # these come back
        for file in kept.iterdir():
            file.unlink()
        write(kept, fine=f"alpha{' alpha' * (kept.name == 'test')}")
    for file in (split / "valid").glob("[ot]*.txt"):
        file.unlink()
    where = "train/fine" if kind == "a space before" else "valid/late"
    match = rf"{where}\.txt .*lossy\.json: text must come back .* at character \d.*lossless"
    spec = text(split, tokenizer=str(tmp_path / "lossy.json"))
    refused(spec, match, tmp_path / "cache", early=False)


def test_another_tokenizer_has_other_tokens_and_another_fingerprint(flat, tmp_path, words):
    one = open_corpus(text(flat), tmp_path / "cache")
    other = open_corpus(text(flat, tokenizer=words), tmp_path / "cache")
    assert other.summary["train"]["bytes"] == one.summary["train"]["bytes"]
    assert other.summary["train"]["tokens"] < one.summary["train"]["tokens"]
    assert one.fingerprint != other.fingerprint
    assert open_corpus(text(flat), tmp_path / "cache").fingerprint == one.fingerprint


def test_a_file_that_is_no_tokenizer_is_refused(flat, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "bad.json").write_text("{}")
    spec = text(flat, tokenizer=str(tmp_path / "bad.json"))
    refused(spec, r"bad\.json: is no tokenizers JSON", tmp_path / "cache", early=False)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_tokenizer_that_is_no_regular_file_is_not_waited_for(flat, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(
        text(flat, tokenizer=str(tmp_path / "pipe")), r"\(no regular file\)", tmp_path / "cache"
    )


@pytest.mark.parametrize("name", ["text", "jsonl", "hf"])
def test_the_home_of_nobody_is_refused(name, tmp_path):
    place, none = "~nobody-of-this-name/x", {"field": "text", "documents": None}
    spec = text(place, name=name, dataset=place, cache=str(tmp_path), **none)
    with pytest.raises(UserError):
        check_source(spec)


def test_a_missing_tokenizers_package_is_reported(flat, tmp_path, words, monkeypatch):
    missing(monkeypatch, "tokenizers")
    refused(text(flat, tokenizer=words), "pip install tokenizers", tmp_path / "cache")


def missing(monkeypatch, package: str) -> None:
    real = importlib.util.find_spec
    found = lambda name, *rest: None if name == package else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)


@pytest.fixture
def library(monkeypatch):
    """A stand-in for `datasets` and for a network that answers; its books can be changed."""
    spec = importlib.machinery.ModuleSpec("datasets", None)
    module = types.SimpleNamespace(__spec__=spec)
    module.books = lambda split: ({"text": f"{split} book {i}"} for i in itertools.count())
    module.load_dataset = lambda name, split, streaming: module.books(split)
    monkeypatch.setitem(sys.modules, "datasets", module)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: contextlib.nullcontext())
    return module


def test_pg19_takes_so_many_books_of_each_split(library, tmp_path):
    corpus = open_corpus(PG19, tmp_path)
    assert documents(corpus.train) == [b"train book 0", b"train book 1", b"train book 2"]
    assert documents(corpus.valid)[0] == b"validation book 0"


def test_pg19_once_built_needs_no_network(library, tmp_path, monkeypatch):
    first = open_corpus(PG19, tmp_path)
    missing(monkeypatch, "datasets")
    check_source(PG19 | {"cache": str(tmp_path)})
    assert open_corpus(PG19, tmp_path).fingerprint == first.fingerprint


def test_pg19_without_its_package_is_refused(tmp_path, monkeypatch):
    missing(monkeypatch, "datasets")
    refused(PG19 | {"cache": str(tmp_path)}, "pip install datasets", tmp_path)


def test_pg19_offline_is_refused(library, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(PG19 | {"cache": str(tmp_path)}, "but HF_HUB_OFFLINE is set", tmp_path)


@pytest.mark.parametrize("answer", ["refused", "silence"])
def test_pg19_without_a_network_is_refused_at_once(library, tmp_path, monkeypatch, answer):
    def unreachable(url, timeout):
        if answer == "silence":
            time.sleep(1)
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    start = time.monotonic()
    why = "no route to host" if answer == "refused" else "no answer"
    refused(PG19 | {"cache": str(tmp_path)}, rf"out of reach \({why}", tmp_path)
    assert time.monotonic() - start < 1


def test_pg19_that_breaks_off_leaves_nothing(library, tmp_path):
    def broken(split):
        yield {"text": "a book"}
        raise RuntimeError("connection reset\nby peer")

    library.books = broken
    refused(PG19, r"\(train\) failed: RuntimeError: connection reset", tmp_path, early=False)


@pytest.mark.parametrize("count", [0, -1, "many", 2.5, True])
def test_a_number_of_documents_that_is_none_is_refused(tmp_path, count):
    refused(PG19 | {"documents": count}, "data.documents=.*: must be", tmp_path)
