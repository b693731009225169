"""A token store is whole or it is not there, and says so."""

import json
import multiprocessing
import pickle
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.data import store as store_module
from zoo.data.store import StoreError, TokenStore, open_or_build, write_store
from zoo.errors import UserError

DOCUMENTS = [("1", b"one"), ("2", b"two and two"), ("3", b"three" * 100)]


def encode(document: bytes) -> tuple[array, array]:
    """A token for each byte, which stands for two where it is a `t`."""
    sizes = [1 + (byte == ord("t")) for byte in document]
    return array("B", document + b"\0"), array("H", [*sizes, 1])


def build(folder: Path) -> None:
    for name in ("a", "b"):
        write_store(folder / name, DOCUMENTS, encode, source="s")


def opened(folder: Path, build=build, source: str = "s") -> list[TokenStore]:
    return open_or_build(folder, ["a", "b"], source, build)


def forbidden(folder: Path) -> None:
    raise AssertionError("built again")


@pytest.fixture
def folder(tmp_path) -> Path:
    opened(tmp_path / "corpus")
    store_module._digests.cache_clear()  # as a new process
    return tmp_path / "corpus"


@given(st.lists(st.binary(max_size=20), min_size=1), st.sampled_from("BHI"))
def test_documents_come_back_as_written(tmp_path_factory, documents, code):
    folder = tmp_path_factory.mktemp("store") / "split"
    names = [f"{number}.txt" for number in range(len(documents))]
    write_store(folder, zip(names, documents, strict=True), lambda d: array(code, [*d, 0]))
    store = TokenStore.open(folder)
    pieces = [store.tokens[a:b] for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
    assert [piece.tolist() for piece in pieces] == [[*document, 0] for document in documents]
    assert store.tokens.dtype == np.dtype(code)
    assert len(store) == store.offsets[-1]
    assert store.bytes_per_token == 1.0
    assert store.bytes_of(0, len(store)).tolist() == [1] * len(store)
    assert store.documents == names


def test_tokens_cannot_be_written(folder):
    with pytest.raises(ValueError, match="read-only"):
        opened(folder)[0].tokens[0] = 1


def test_a_good_store_is_not_built_again(folder):
    assert [store.name for store in opened(folder, forbidden)] == ["a", "b"]


def test_a_changed_source_is_built_again(folder):
    with pytest.raises(AssertionError, match="built again"):
        opened(folder, forbidden, source="other")


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def alter(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "file", ["tokens.bin", "offsets.npy", "bytes.bin", "documents.json", "meta.json"]
)
@pytest.mark.parametrize("damage", [shorten, alter, Path.unlink])
def test_damage_is_reported_and_mended(folder, file, damage):
    if file == "meta.json" and damage is shorten:
        (folder / "a" / file).write_text("{")
    else:
        damage(folder / "a" / file)
    with pytest.raises(StoreError, match=r"truncated|altered|damaged|no token store"):
        TokenStore.open(folder / "a")
    with pytest.raises(AssertionError, match="built again"):
        opened(folder, forbidden)
    store, _ = opened(folder)
    assert bytes(store.tokens[:4]) == b"one\0"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["corpus", "corpus.lock"]


def test_truncation_is_reported_without_a_hash(folder):
    shorten(folder / "a" / "tokens.bin")
    with pytest.raises(StoreError, match="is truncated"):
        TokenStore.open(folder / "a", verify=False)


@pytest.mark.parametrize("field", ["source_bytes", "tokens", "dtype", "tokenizer", "source"])
def test_an_altered_figure_beside_the_tokens_is_reported(folder, field):
    meta = folder / "a" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {field: 7}))
    with pytest.raises(StoreError, match="was altered"):
        TokenStore.open(folder / "a")


@pytest.mark.parametrize("text", ["[]", "7", '"a"', "null", "{}", "[" * 100_000, "\0", "\udcff"])
def test_a_record_of_another_kind_is_reported(folder, text):
    (folder / "a" / "meta.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StoreError, match="is damaged"):
        TokenStore.open(folder / "a")


def test_the_bytes_behind_tokens_are_those_of_any_stretch(folder):
    store, _ = opened(folder)
    assert store.bytes_of(0, 4).tolist() == [1, 1, 1, 1]
    assert store.bytes_of(4, 16).sum() == len("two and two") + 2 + 1  # two t's, and the end
    assert store.bytes_of(0, 1).dtype == np.int64
    assert store.bytes_of(5, 5).tolist() == []


def test_the_bytes_behind_tokens_do_not_change_what_text_it_is(folder, tmp_path):
    write_store(tmp_path / "plain", DOCUMENTS, lambda document: encode(document)[0])
    assert TokenStore.open(tmp_path / "plain").sha256 == opened(folder)[0].sha256


def test_another_format_is_refused(folder):
    meta = folder / "a" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 0}))
    with pytest.raises(StoreError, match="has format 0"):
        TokenStore.open(folder / "a")


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def half(folder: Path) -> None:
        write_store(folder / "a", DOCUMENTS, encode, source="s")
        raise UserError("no more text")

    with pytest.raises(UserError, match="no more text"):
        opened(tmp_path / "corpus", half)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.lock"]


def test_a_failed_rebuild_keeps_the_old_store(folder):
    with pytest.raises(AssertionError):
        opened(folder, forbidden, source="other")
    assert len(opened(folder, forbidden)) == 2


def test_what_a_dead_process_left_does_not_matter(folder):
    for end in ("new", "old"):
        (folder.with_name(f"corpus.{end}") / "a").mkdir(parents=True)
    shorten(folder / "a" / "tokens.bin")
    opened(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["corpus", "corpus.lock"]


def test_a_split_without_documents_is_refused(tmp_path):
    with pytest.raises(UserError, match="data: the valid split has no document"):
        write_store(tmp_path / "valid", [], encode)


def test_a_cache_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the token store cannot be written"):
        opened(tmp_path / "file" / "corpus")


def build_at_once(folder: Path, barrier, builds, results) -> None:
    def counted(new: Path) -> None:
        builds.put(1)
        build(new)

    barrier.wait()
    results.put([store.sha256 for store in opened(folder, counted)])


def test_two_processes_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, builds, results = context.Barrier(2), context.Queue(), context.Queue()
    arguments = tmp_path / "corpus", barrier, builds, results
    processes = [context.Process(target=build_at_once, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert first == second == [store.sha256 for store in opened(tmp_path / "corpus", forbidden)]
    assert builds.get(timeout=5) == 1
    assert builds.empty()


def test_a_process_hashes_a_store_once(folder):
    opened(folder)
    opened(folder)
    assert store_module._digests.cache_info().misses == 2  # stores a and b


def test_a_worker_maps_the_same_file_without_hashing(folder):
    store, _ = opened(folder)
    sent = pickle.dumps(store)
    store_module._digests.cache_clear()
    received = pickle.loads(sent)
    assert store_module._digests.cache_info().misses == 0
    assert len(sent) < 500
    assert isinstance(received.tokens, np.memmap)
    np.testing.assert_array_equal(received.tokens, store.tokens)


def test_a_worker_refuses_a_store_replaced_meanwhile(folder):
    sent = pickle.dumps(opened(folder)[0])
    other = [*DOCUMENTS, ("4", b"more")]
    opened(folder, lambda f: [write_store(f / n, other, encode, source="t") for n in "ab"], "t")
    with pytest.raises(StoreError, match="replaced while in use"):
        pickle.loads(sent)
