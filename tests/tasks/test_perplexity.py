"""Perplexity: each protocol scores what its definition says, on the same text at every length."""

import math

import numpy as np
import pytest
import torch
from fakes import ByPosition, Remembers, make_subject, random_text, text_store

from zoo.data.loader import evaluation_text
from zoo.errors import UserError
from zoo.tasks.perplexity import PROTOCOLS, measure, windows

LENGTHS, STRIDE, UNITS = [32, 48, 96, 192], 16, 3  # 48 and 96 divide the longest, 128 would not


@pytest.fixture
def store():
    return text_store(random_text(UNITS * 200))


def by_protocol(rows) -> dict[tuple[str, int], dict]:
    return {(row["protocol"], row["length"]): row for row in rows}


def brute_force(model, text, protocol, length) -> np.ndarray:
    """All nats the protocol scores, window by window, from the definitions of the papers."""
    scored = []
    for stretch in text:
        unit = len(stretch) - 1
        if protocol == "blocks":
            for end in range(unit, length - 1, -length):
                scored.append(model.costs(stretch[end - length : end + 1]))
        elif protocol == "stride_tail":
            scored.append(model.costs(stretch[unit - length :])[-STRIDE:])
        else:
            for start in range(0, unit - length + 1, STRIDE):
                scored.append(model.costs(stretch[start : start + length + 1]))
    return np.concatenate(scored)


@pytest.mark.parametrize("lengths", [LENGTHS, [32, 80, 192]], ids=["dividing", "not dividing"])
def test_a_protocol_scores_what_its_definition_says(lengths, store, tmp_path):
    model = Remembers(memory=20)
    subject = make_subject(model, tmp_path, store)
    text = evaluation_text(store, 192, UNITS, "joined")
    settings = {"lengths": lengths, "units": UNITS, "stride": STRIDE, "overlap": None, "chunk": 50}
    rows = list(measure(subject, protocols=PROTOCOLS, **settings))
    assert len(rows) == len(PROTOCOLS) * len(lengths)
    for row in rows:
        nats = brute_force(model, text, row["protocol"], row["length"])
        assert row["count"] == len(nats)
        assert row["nll_sum"] == pytest.approx(nats.sum(), rel=1e-12)
        assert row["perplexity"] == pytest.approx(math.exp(nats.mean()))
        assert row["bits_per_byte"] == pytest.approx(nats.mean() / math.log(2))
        assert row["interval"][0] < row["bits_per_byte"] < row["interval"][1]


def test_a_tail_is_the_same_tokens_at_every_length(store, tmp_path):
    # A model that remembers one token gives a token one cost, however long the context.
    subject = make_subject(Remembers(memory=1), tmp_path, store)
    rows = list(measure(subject, lengths=LENGTHS, protocols=["stride_tail"], stride=STRIDE))
    assert len({round(row["nll_sum"], 9) for row in rows}) == 1
    assert {row["count"] for row in rows} == {STRIDE * rows[0]["units"]}


def test_blocks_score_the_same_tokens_at_every_length_that_divides_the_longest(store, tmp_path):
    subject = make_subject(Remembers(memory=1), tmp_path, store)
    rows = list(measure(subject, lengths=[48, 96, 192], protocols=["blocks"]))
    assert len({round(row["nll_sum"], 9) for row in rows}) == 1


def test_a_tail_never_reaches_beyond_the_shortest_window(store, tmp_path):
    rows = list(measure(make_subject(Remembers(1), tmp_path, store), lengths=[32, 64], stride=256))
    assert {row["stride"] for row in rows} == {32}


def test_early_tokens_weigh_on_blocks_and_not_on_tails(tmp_path):
    model = ByPosition(lambda position: 1 + 1 / position)
    subject = make_subject(model, tmp_path, text_store(np.zeros(2000)))
    rows = by_protocol(measure(subject, lengths=[64, 256], stride=32, units=4, chunk=40))
    for length in (64, 256):
        positions = np.arange(1, length + 1)
        nats = 1 + 1 / positions
        blocks, tail = rows["blocks", length], rows["stride_tail", length]
        assert blocks["bits_per_byte"] == pytest.approx(nats.mean() / math.log(2))
        assert tail["bits_per_byte"] == pytest.approx(nats[-32:].mean() / math.log(2))
        edges, curve = blocks["curve"]["edges"], blocks["curve"]["bits_per_byte"]
        for low, high, bits in zip(edges, edges[1:], curve, strict=False):
            assert bits == pytest.approx(nats[low - 1 : high - 1].mean() / math.log(2))
        assert sum(blocks["curve"]["count"]) == blocks["count"]


def test_bits_are_per_byte_of_text_whatever_a_token_is(tmp_path):
    model = ByPosition(lambda position: torch.full_like(position, 2.0))
    store = text_store(np.zeros(400), bytes_per_token=4)
    row = next(measure(make_subject(model, tmp_path, store), lengths=[32]))
    assert row["bits_per_byte"] == pytest.approx(2.0 / math.log(2) / 4)
    assert row["perplexity"] == pytest.approx(math.exp(2.0))


def test_a_perplexity_beyond_all_numbers_is_none_and_its_bits_are_told(store, tmp_path):
    model = Remembers(memory=5)
    model.logits *= 1e4
    row = next(measure(make_subject(model, tmp_path, store), lengths=[32]))
    assert (row["status"], row["perplexity"]) == ("ok", None)
    assert 1000 < row["bits_per_byte"] < 1e5


def test_positions_are_kept_whole_in_the_file_the_row_names(store, tmp_path):
    subject = make_subject(Remembers(memory=20), tmp_path, store)
    for row in measure(subject, lengths=[32, 96], stride=STRIDE, protocols=PROTOCOLS):
        with np.load(tmp_path / row["positions_file"], allow_pickle=False) as kept:
            assert kept["nll_sum"].dtype == np.float64
            assert kept["nll_sum"].shape == kept["count"].shape == (row["length"],)
            assert (
                kept["nll_sum"].sum() == row["nll_sum"] == pytest.approx(kept["unit_nll_sum"].sum())
            )
            assert kept["count"].sum() == kept["unit_count"].sum() == row["count"]
            scored = STRIDE if row["protocol"] == "stride_tail" else row["length"]
            assert np.flatnonzero(kept["count"]).tolist() == [*range(row["length"])][-scored:]


def test_a_window_that_several_protocols_ask_for_is_read_once(store, tmp_path):
    model = Remembers(memory=1)
    rows = list(measure(make_subject(model, tmp_path, store), lengths=[96, 192], units=2))
    assert model.read == 2 * 2 * 192
    assert len(rows) == 4


def test_short_windows_are_spread_over_the_whole_stretch_when_not_all_are_read():
    starts, _ = windows("window_mean", 16384, 512, 256, overlap=2)
    assert len(starts) == 63  # all there are
    starts, _ = windows("window_mean", 16384, 4096, 256, overlap=2)
    assert len(starts) == 8
    assert (starts[0], starts[-1]) == (0, 16384 - 4096)
    assert all(start % 256 == 0 for start in starts)
    assert windows("window_mean", 16384, 16384, 256, overlap=2) == ([0], 0)


def test_a_length_the_model_refuses_says_so_in_its_own_words(tiny, store, tmp_path):
    subject = make_subject(tiny("learned").eval(), tmp_path, store)  # reads 64 tokens
    rows = by_protocol(measure(subject, lengths=[64, 128], stride=STRIDE))
    assert rows["blocks", 64]["status"] == "ok"
    for protocol in ("blocks", "stride_tail"):
        row = rows[protocol, 128]
        assert row["status"] == "not_applicable"
        assert row["reason"] == "this model reads at most 64 tokens and was given 128"
        assert "bits_per_byte" not in row


def test_a_length_without_memory_keeps_its_place_and_the_others_go_on(store, tmp_path):
    class Greedy(Remembers):
        def forward(self, tokens, state=None):
            if state.seen + tokens.shape[1] > 64:
                raise MemoryError("no room")
            return super().forward(tokens, state)

    rows = list(measure(make_subject(Greedy(1), tmp_path, store), lengths=[96, 32]))
    assert [(row["length"], row["status"]) for row in rows] == [
        *[(32, "ok"), (32, "ok"), (96, "out_of_memory"), (96, "out_of_memory")]
    ]


def test_text_that_is_too_short_leaves_a_reason_at_every_length(store, tmp_path):
    subject = make_subject(Remembers(1), tmp_path, store)
    rows = list(measure(subject, lengths=[32, 100_000]))
    assert {row["status"] for row in rows} == {"failed"}
    assert {(row["length"], row["protocol"]) for row in rows} == {
        (length, protocol) for length in (32, 100_000) for protocol in ("blocks", "stride_tail")
    }
    assert "600 tokens" in rows[0]["reason"]


def test_what_is_known_is_not_measured_again(store, tmp_path):
    model, asked = Remembers(1), []

    def measured(key) -> bool:
        asked.append(key)
        return key["protocol"] == "blocks" or key["length"] == 96

    subject = make_subject(model, tmp_path, store, measured=measured)
    rows = list(measure(subject, lengths=[32, 96], units=2, stride=STRIDE))
    assert [(row["protocol"], row["length"]) for row in rows] == [("stride_tail", 32)]
    assert model.read == 2 * 32
    assert all({"unit", "units", "stride", "split", "windows"} <= key.keys() for key in asked)


def test_lengths_are_multiples_of_the_training_length_unless_given(tmp_path):
    store = text_store(random_text(2000))
    rows = measure(make_subject(Remembers(1), tmp_path, store), protocols=["blocks"], units=1)
    assert [row["length"] for row in rows] == [32, 64, 128, 256, 512, 1024]


@pytest.mark.parametrize("wrong", [{"protocols": ["block"]}, {"lengths": [0]}, {"stride": 0}])
def test_settings_that_make_no_sense_are_refused(wrong, store, tmp_path):
    with pytest.raises(UserError):
        list(measure(make_subject(Remembers(1), tmp_path, store), **wrong))
