"""Batches are the same for any number of workers and ranks, and after any restart."""

from array import array

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.data import store as store_module
from zoo.data.loader import (
    batches_of,
    evaluation_bytes,
    evaluation_text,
    train_loader,
    valid_batch,
)
from zoo.data.order import stream_restarts, window_starts
from zoo.data.passkey import Passkeys
from zoo.data.store import TokenStore, write_store
from zoo.data.tokenizers import encode_bytes
from zoo.errors import UserError

SETTINGS = {"seq_len": 16, "batch_size": 4, "seed": 3, "start_step": 0, "steps": 6}


def make_store(folder, lengths: list[int]) -> TokenStore:
    """Documents of so many tokens; every token of the split is another number."""
    ends = np.cumsum(lengths)
    spans = {
        f"{i}".encode(): (int(end - n), int(end))
        for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
    }
    named = [(name.decode(), name) for name in spans]
    write_store(folder / "test", named, lambda document: array("I", range(*spans[document])))
    return TokenStore.open(folder / "test")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("store"), [300, 5, 700])


def batches(store, **changes) -> list[dict]:
    return list(train_loader(store, **{**SETTINGS, "contiguous": False, **changes}))


def same(one: list[dict], other: list[dict]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        a["step"] == b["step"]
        and torch.equal(a["tokens"], b["tokens"])
        and torch.equal(a["restart"], b["restart"])
        for a, b in pairs
    )


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_batch_is_the_windows_of_its_step(store, contiguous):
    found = batches(store, contiguous=contiguous)
    assert [batch["step"] for batch in found] == list(range(6))
    for step, batch in enumerate(found):
        starts = window_starts(len(store), 16, 4, 3, step, contiguous)
        assert batch["tokens"].dtype == torch.int64
        assert batch["tokens"].tolist() == [list(range(s, s + 17)) for s in starts]
        expected = stream_restarts(len(store), 16, 4, 3, step) if contiguous else np.ones(4, bool)
        assert batch["restart"].tolist() == expected.tolist()


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_restart_reads_what_an_unbroken_run_would(store, contiguous):
    whole = batches(store, contiguous=contiguous, steps=30)
    rest = batches(store, contiguous=contiguous, start_step=19, steps=11)
    assert same(rest, whole[19:])


@pytest.mark.parametrize("contiguous", [False, True])
def test_ranks_share_the_rows_of_a_step(store, contiguous):
    whole = batches(store, contiguous=contiguous)
    ranks = [batches(store, contiguous=contiguous, rank=rank, world=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        for name in ("tokens", "restart"):
            rows = torch.stack([ranks[0][step][name], ranks[1][step][name]], 1).flatten(0, 1)
            assert torch.equal(rows, batch[name])


def test_workers_change_nothing_and_hash_nothing(store, monkeypatch):
    alone = batches(store)

    def forbidden(files):
        raise AssertionError("a worker hashed the store")

    monkeypatch.setattr(store_module, "_digests_of", forbidden)  # inherited by forked workers
    assert same(batches(store, workers=2), alone)


def test_ranks_that_do_not_divide_the_batch_are_refused(store):
    with pytest.raises(UserError, match="batch_size=4: must be a multiple of 3 processes"):
        batches(store, world=3)


def test_a_short_text_is_refused_before_the_first_batch(store):
    with pytest.raises(UserError, match="training text has 1,005"):
        train_loader(store, **{**SETTINGS, "seq_len": 1005}, contiguous=False)


@given(seq_len=st.integers(1, 1004), count=st.integers(1, 40))
def test_validation_windows_are_disjoint_and_spread(store, seq_len, count):
    found = valid_batch(store, seq_len, count)["tokens"].numpy()
    assert found.shape == (min(count, 1005 // (seq_len + 1)), seq_len + 1)
    spread_without_overlap(found)
    if len(found) > 1:
        assert (found[0, 0], found[-1, -1]) == (0, 1004)


def spread_without_overlap(stretches: np.ndarray) -> None:
    assert stretches.dtype == np.int64
    assert (np.diff(stretches, axis=1) == 1).all()  # stretches of the text
    assert (stretches[1:, 0] > stretches[:-1, -1]).all()


def test_validation_longer_than_the_split_is_refused(store):
    with pytest.raises(UserError, match="test split: it has 1,005 tokens and 1,006 are needed"):
        valid_batch(store, 1005, 1)


def test_masks_are_the_same_for_any_workers_ranks_and_restart(store):
    alone = batches(store, masked=1005)
    assert same(batches(store, masked=1005, workers=2), alone)
    assert same(batches(store, masked=1005, start_step=2, steps=4), alone[2:])
    ranks = [batches(store, masked=1005, rank=rank, world=2) for rank in range(2)]
    for batch, *shares in zip(alone, *ranks, strict=True):
        for rank, share in enumerate(shares):
            for name in ("tokens", "shown", "chosen"):
                assert torch.equal(share[name], batch[name][rank::2])
    assert not torch.equal(alone[0]["chosen"], alone[1]["chosen"])


def drawn(rows: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(100 * rows, generator=generator)[: rows * tokens].view(rows, tokens)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_refused_is_one_line_from_a_worker_too(store, workers):
    more = {"contiguous": False, "passkeys": Passkeys(0.5, encode_bytes), "workers": workers}
    said = r"^seq_len=16: must be at least 41 tokens, to hold a passkey and its question\.$"
    with pytest.raises(UserError, match=said):
        list(batches_of(train_loader(store, **SETTINGS, **more)))


def test_positions_are_the_same_for_any_workers_ranks_and_restart(store):
    drawing = {"draw_positions": drawn}
    alone = [batch["positions"] for batch in batches(store, **drawing)]
    assert alone[0].shape == (4, 16)
    assert not torch.equal(alone[0], alone[1])
    again = batches(store, **drawing, workers=2)[2:]
    rest = batches(store, **drawing, start_step=2, steps=4)
    ranks = [batches(store, **drawing, rank=rank, world=2)[2:] for rank in range(2)]
    for step, positions in enumerate(alone[2:]):
        assert torch.equal(again[step]["positions"], positions)
        assert torch.equal(rest[step]["positions"], positions)
        for rank, batch in enumerate(ranks):
            assert torch.equal(batch[step]["positions"], positions[rank::2])
    other = batches(store, **drawing, seed=4)
    assert not torch.equal(other[0]["positions"], alone[0])


def test_passkeys_are_the_same_for_any_workers_ranks_and_restart(tmp_path):
    store = make_store(tmp_path, [3000])
    keys = {"passkeys": Passkeys(0.5, encode_bytes), "seq_len": 150}
    alone = batches(store, **keys)
    plain = batches(store, seq_len=150)
    assert not same(alone, plain)
    assert same(batches(store, **keys, workers=2), alone)
    assert same(batches(store, **keys, start_step=2, steps=4), alone[2:])
    ranks = [batches(store, **keys, rank=rank, world=2) for rank in range(2)]
    for batch, *shares in zip(alone, *ranks, strict=True):
        for rank, share in enumerate(shares):
            assert torch.equal(share["tokens"], batch["tokens"][rank::2])
    with pytest.raises(UserError, match="to hold a passkey"):
        batches(store, **keys | {"seq_len": 16})


documents = st.lists(st.integers(1, 60), min_size=1, max_size=8)


@given(documents, st.integers(1, 30), st.integers(1, 12))
def test_whole_evaluation_never_crosses_a_document(tmp_path_factory, lengths, unit, count):
    store = make_store(tmp_path_factory.mktemp("store"), lengths)
    if max(lengths) < unit + 1:
        with pytest.raises(UserError, match=f"has {max(lengths)} tokens.*eval_documents=joined"):
            evaluation_text(store, unit, count, "whole")
        return
    found = evaluation_text(store, unit, count, "whole")
    assert found.shape == (min(count, sum(n // (unit + 1) for n in lengths)), unit + 1)
    spread_without_overlap(found)
    owner = np.searchsorted(store.offsets, found, side="right")
    assert (owner == owner[:, :1]).all()


@pytest.mark.parametrize("how", ["whole", "joined"])
def test_the_bytes_of_evaluated_text_are_those_of_its_tokens(tmp_path, how):
    tokens = array("H", range(90))
    sizes = array("H", [(7 * i) % 5 for i in range(90)])
    cuts = {"a": slice(0, 30), "b": slice(30, 90)}
    encode = {name.encode(): (tokens[cut], sizes[cut]) for name, cut in cuts.items()}
    named = [(name, name.encode()) for name in cuts]
    write_store(tmp_path / "test", named, encode.__getitem__)
    store = TokenStore.open(tmp_path / "test")
    text, found = (read(store, 11, 4, how) for read in (evaluation_text, evaluation_bytes))
    assert found.shape == text.shape
    np.testing.assert_array_equal(found, np.array(sizes)[text])


def test_whole_evaluation_is_spread_over_the_documents(tmp_path):
    store = make_store(tmp_path, [100] * 10)
    found = evaluation_text(store, 9, 10, "whole")
    assert (found[:, 0] // 100).tolist() == list(range(10))


def test_joined_evaluation_crosses_documents(store):
    assert len(evaluation_text(store, 500, 8, "joined")) == 2
    with pytest.raises(UserError, match="1,006 are needed"):
        evaluation_text(store, 1005, 1, "joined")
