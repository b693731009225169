"""Perplexity: each protocol scores what its definition says, on the same text at every length."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import (
    VOCABULARY,
    BothSides,
    ByPosition,
    Remembers,
    make_context,
    measure,
    random_text,
    text_corpus,
    text_store,
)
from hypothesis import given
from hypothesis import strategies as st

from zoo.data.bigrams import Bigrams
from zoo.data.loader import evaluation_text
from zoo.data.masking import mask_tokens
from zoo.errors import UserError
from zoo.measurement import wrong_field
from zoo.report.statistics import interval
from zoo.tasks.perplexity import Perplexity
from zoo.tasks.protocols import CAUSAL, windows

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
        elif protocol == "half_tail":
            for token in range(unit - unit // 2 + 1, unit + 1):  # what it knows: see below
                windows_end = unit - (unit - token) // (length // 2) * (length // 2)
                start = max(0, windows_end - length)
                scored.append(model.costs(stretch[start : token + 1])[-1:])
        else:
            for start in range(0, unit - length + 1, STRIDE):
                scored.append(model.costs(stretch[start : start + length + 1]))
    return np.concatenate(scored)


@pytest.mark.parametrize("lengths", [[32, 48, 96], [32, 80, 160]], ids=["dividing", "not dividing"])
def test_a_protocol_scores_what_its_definition_says(lengths, store, tmp_path):
    model = Remembers(memory=20)
    context = make_context(model, tmp_path, store)
    text = evaluation_text(store, 192, UNITS, "joined")
    settings = {"lengths": lengths, "units": UNITS, "stride": STRIDE, "overlap": None, "chunk": 50}
    rows = list(measure(Perplexity, context, protocols=CAUSAL, unit=192, **settings))
    assert len(rows) == len(CAUSAL) * len(lengths)
    for row in rows:
        nats = brute_force(model, text, row["protocol"], row["length"])
        assert row["count"] == len(nats)
        assert row["nll_sum"] == pytest.approx(nats.sum(), rel=1e-12)
        assert row["perplexity"] == pytest.approx(math.exp(nats.mean()))
        assert row["bits_per_byte"] == pytest.approx(nats.mean() / math.log(2))
        own = nats.reshape(UNITS, -1).mean(1) / math.log(2)
        assert row["unit_bits"] == pytest.approx(own.tolist())
        half = 4.303 * own.std(ddof=1) / UNITS**0.5  # Student's t for three stretches
        assert row["interval"] == pytest.approx((own.mean() - half, own.mean() + half), rel=1e-3)


@pytest.mark.parametrize(("protocol", "tail"), [("stride_tail", STRIDE), ("half_tail", 192 // 2)])
def test_a_tail_is_the_same_tokens_at_every_length(protocol, tail, store, tmp_path):
    # A model that remembers one token gives a token one cost, however long the context.
    context = make_context(Remembers(memory=1), tmp_path, store)
    rows = list(measure(Perplexity, context, lengths=LENGTHS, protocols=[protocol], stride=STRIDE))
    assert len({tuple(np.round(row["unit_bits"], 9)) for row in rows}) == 1
    assert {row["count"] for row in rows} == {tail * rows[0]["units"]}


@given(st.integers(1, 600), st.data())
def test_half_a_window_or_more_is_before_every_token_that_a_half_tail_scores(unit, data):
    length = data.draw(st.integers(1, unit))
    contexts = {}
    for start, scored in windows("half_tail", unit, length, 1).items():
        assert 0 <= start <= unit - length
        assert 0 <= scored.start < scored.stop <= length
        for index in range(scored.start, scored.stop):
            assert start + index not in contexts  # each once
            contexts[start + index] = index + 1
    assert sorted(contexts) == list(range(unit // 2, unit))
    assert min(contexts.values()) >= max(1, length // 2)


def test_blocks_score_the_same_tokens_at_every_length_that_divides_the_longest(store, tmp_path):
    context = make_context(Remembers(memory=1), tmp_path, store)
    rows = list(measure(Perplexity, context, lengths=[48, 96, 192], protocols=["blocks"]))
    assert len({round(row["nll_sum"], 9) for row in rows}) == 1


def test_an_encoder_predicts_the_same_hidden_tokens_at_every_length(store, tmp_path):
    model = BothSides()
    context = make_context(model, tmp_path, store)
    rows = list(measure(Perplexity, context, lengths=[64, 192], units=UNITS, stride=STRIDE))
    assert [(row["protocol"], row["length"]) for row in rows] == [("masked", 192), ("masked", 64)]
    text, hidden = evaluation_text(store, 192, UNITS, "joined")[:, :-1], VOCABULARY
    for row in rows:
        wanted = []
        for unit, stretch in enumerate(text):
            shown, chosen = mask_tokens(stretch, hidden, (unit,))
            for start in range(0, 192, row["length"]):
                window = slice(start, start + row["length"])
                logits = model(torch.from_numpy(shown[window])[None])[0].log_softmax(-1)
                predicted = np.flatnonzero(chosen[window])
                wanted.append(-logits.numpy()[predicted, stretch[window][predicted]])
        nats = np.concatenate(wanted)
        assert row["count"] == len(nats)
        assert row["nll_sum"] == pytest.approx(nats.sum(), rel=1e-12)
        assert row["state_bytes"] is None
    assert rows[0]["count"] == rows[1]["count"]
    assert rows[0]["nll_sum"] != rows[1]["nll_sum"]  # the neighbours across an edge are missing


def test_a_protocol_and_an_objective_that_do_not_match_are_not_applicable(store, tmp_path):
    for model, protocol, message in (
        (BothSides(), "half_tail", "both ways, which masked measures"),
        (Remembers(1), "masked", "behind, which half_tail | blocks"),
    ):
        context = make_context(model, tmp_path, store)
        (row,) = measure(Perplexity, context, lengths=[64], protocols=[protocol])
        assert (row["status"], message in row["reason"]) == ("not_applicable", True)
        assert model.read == 0


def test_a_tail_never_reaches_beyond_the_shortest_window(store, tmp_path):
    rows = list(
        measure(
            Perplexity, make_context(Remembers(1), tmp_path, store), lengths=[32, 64], stride=256
        )
    )
    assert {row["stride"] for row in rows} == {32}


def test_early_tokens_weigh_on_blocks_and_not_on_tails(tmp_path):
    model = ByPosition(lambda position: 1 + 1 / position)
    context = make_context(model, tmp_path, text_store(np.zeros(2000)))
    how = {"lengths": [64, 256], "stride": 32, "units": 4, "chunk": 40}
    rows = by_protocol(measure(Perplexity, context, protocols=CAUSAL[:3], **how))
    for length in (64, 256):
        positions = np.arange(1, length + 1)
        nats = 1 + 1 / positions
        blocks, tail = rows["blocks", length], rows["stride_tail", length]
        half = rows["half_tail", length]["bits_per_byte"]
        assert half == pytest.approx(nats[length // 2 :].mean() / math.log(2))
        assert blocks["bits_per_byte"] == pytest.approx(nats.mean() / math.log(2))
        assert tail["bits_per_byte"] == pytest.approx(nats[-32:].mean() / math.log(2))
        edges, curve = blocks["curve"]["edges"], blocks["curve"]["bits_per_byte"]
        for low, high, bits in zip(edges, edges[1:], curve, strict=False):
            assert bits == pytest.approx(nats[low - 1 : high - 1].mean() / math.log(2))
        assert sum(blocks["curve"]["count"]) == blocks["count"]


def test_bits_are_per_byte_of_text_whatever_a_token_is(tmp_path):
    model = ByPosition(lambda position: torch.full_like(position, 2.0))
    store = text_store(np.zeros(400), bytes_per_token=4)
    row = next(measure(Perplexity, make_context(model, tmp_path, store), lengths=[32]))
    assert row["bits_per_byte"] == pytest.approx(2.0 / math.log(2) / 4)
    assert row["perplexity"] == pytest.approx(math.exp(2.0))


def test_bits_are_per_byte_of_the_scored_text_itself(tmp_path):
    """Tokens of 1, 2 .. 7 bytes: not the split's mean, but those that were scored."""
    model, text = ByPosition(lambda position: torch.full_like(position, 2.0)), np.zeros(400)
    sizes = np.random.default_rng(0).integers(1, 8, 400).astype(np.uint16)
    store = replace(text_store(text), sizes=sizes, meta={"source_bytes": int(sizes.sum())})
    rows = [
        *measure(
            Perplexity, make_context(model, tmp_path, store), lengths=[16, 32], protocols=CAUSAL[:2]
        )
    ]
    starts = [at * 367 // 7 for at in range(8)]
    for row in rows:
        unit = store.bytes_of(0, 400)
        units = [unit[start + 1 : start + 33] for start in starts]
        if row["protocol"] == "half_tail":
            units = [own[-16:] for own in units]
        assert row["bytes"] == sum(own.sum() for own in units)
        assert row["unit_bytes"] == [own.sum() for own in units]
        assert sum(row["interval"]) / 2 == pytest.approx(row["bits_per_byte"], rel=1e-12)
        nats = 2.0 * sum(map(len, units))
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / row["bytes"])
        for bits, own in zip(row["unit_bits"], units, strict=True):
            assert bits == pytest.approx(2.0 * len(own) / math.log(2) / own.sum())
        assert row["uniform_bits"] == pytest.approx(math.log2(16) * row["count"] / row["bytes"])


def test_a_stretch_whose_tokens_have_no_bytes_has_no_score_and_is_not_in_the_interval(tmp_path):
    """As where a character is cut into tokens, and a tail of one token is its last."""
    sizes = np.ones(400, np.uint16)
    sizes[[32, 399]] = 0  # the last token of the first and of the last stretch
    store = replace(text_store(random_text(400)), sizes=sizes, meta={"source_bytes": 398})
    context = make_context(Remembers(memory=5), tmp_path, store)
    settings = {"lengths": [16, 32], "protocols": ["stride_tail", "blocks"], "stride": 1}
    for row in measure(Perplexity, context, **settings):
        units = row["unit_bits"]
        assert row["status"] == "ok"
        tail = row["protocol"] == "stride_tail"
        assert [bits is None for bits in units] == [tail, *[False] * 6, tail]
        of_text = [pair for pair in zip(units, row["unit_bytes"], strict=True) if pair[1]]
        assert row["interval"] == interval(*map(list, zip(*of_text, strict=True)))
        assert wrong_field(json.loads(json.dumps(row))) is None


def test_one_document_has_one_score_whatever_is_shown_beside_it(tmp_path):
    model, generator = Remembers(memory=5), np.random.default_rng(0)
    text, sizes = random_text(64), generator.integers(1, 9, 64).astype(np.uint16)
    scores = []
    for beside in (0, 1, 30):  # bytes a token of documents too short to be scored
        tokens = np.concatenate([text, random_text(40 * bool(beside), seed=1)])
        store = text_store(tokens)
        every = np.concatenate([sizes, np.full(len(tokens) - 64, beside)]).astype(np.uint16)
        offsets = np.array([0, 64, len(tokens)][: 2 + bool(beside)])
        store = replace(store, sizes=every, offsets=offsets, meta={"source_bytes": 1})
        context = make_context(model, tmp_path, store, data=text_corpus(store, "whole"))
        scores.append([row["bits_per_byte"] for row in measure(Perplexity, context, lengths=[63])])
    assert scores[0] == scores[1] == scores[2]


def test_a_perplexity_beyond_all_numbers_is_none_and_its_bits_are_reported(store, tmp_path):
    model = Remembers(memory=5)
    model.logits *= 1e4
    row = next(measure(Perplexity, make_context(model, tmp_path, store), lengths=[32]))
    assert (row["status"], row["perplexity"]) == ("ok", None)
    assert 1000 < row["bits_per_byte"] < 1e5


def test_positions_are_kept_whole_in_the_file_the_row_names(store, tmp_path):
    context = make_context(Remembers(memory=20), tmp_path, store)
    how = {"lengths": [32, 96], "unit": 192, "stride": STRIDE, "protocols": CAUSAL}
    for row in measure(Perplexity, context, **how):
        with np.load(tmp_path / row["positions_file"], allow_pickle=False) as kept:
            assert kept["nll_sum"].dtype == np.float64
            assert kept["nll_sum"].shape == kept["count"].shape == (row["length"],)
            assert kept["nll_sum"].sum() == row["nll_sum"]
            assert kept["unit_nll_sum"].sum() == pytest.approx(row["nll_sum"])
            assert kept["count"].sum() == row["count"]
            tails = {"stride_tail": STRIDE, "half_tail": row["length"] // 2}
            scored = tails.get(row["protocol"], row["length"])
            assert np.flatnonzero(kept["count"]).tolist() == [*range(row["length"])][-scored:]


def test_no_row_writes_over_the_positions_of_another(store, tmp_path):
    """Whatever distinguishes two measurements of one protocol and length, both keep their files."""
    model, rows = Remembers(memory=20), []
    for units, split in ((1, "test"), (2, "test"), (2, "valid")):
        context = replace(make_context(model, tmp_path, store), split=split)
        model.logits.data *= 1 if split == "test" else 2  # as of another text
        rows += measure(Perplexity, context, lengths=[32], units=units)
    files = {row["positions_file"] for row in rows}
    assert len(files) == len({row["nll_sum"] for row in rows}) == len(rows)
    for row in rows:
        with np.load(tmp_path / row["positions_file"], allow_pickle=False) as kept:
            assert kept["nll_sum"].sum() == row["nll_sum"]


def test_text_is_read_once_for_all_lengths_whose_windows_start_there(store, tmp_path):
    model = Remembers(memory=1)
    context = make_context(model, tmp_path, store)
    rows = list(measure(Perplexity, context, lengths=[48, 96, 192], protocols=["blocks"], units=2))
    assert model.read == 2 * (192 + 96 + 2 * 48)
    rows += measure(Perplexity, context, lengths=[48, 96, 192], units=2)
    assert model.read == 2 * (192 + 96 + 2 * 48) + 2 * (192 + 2 * 96 + 3 * 48)
    assert len(rows) == 3 + 2 * 3


def test_short_windows_are_spread_over_the_whole_stretch_when_not_all_are_read():
    assert len(windows("window_mean", 16384, 512, 256, overlap=2)) == 63  # all there are
    starts = list(windows("window_mean", 16384, 4096, 256, overlap=2))
    assert len(starts) == 8
    assert (starts[0], starts[-1]) == (0, 16384 - 4096)
    assert all(start % 256 == 0 for start in starts)
    assert windows("window_mean", 16384, 16384, 256, overlap=2) == {0: slice(0, 16384)}


@pytest.mark.parametrize("protocol", [*CAUSAL, "masked"])
@pytest.mark.parametrize("unit", [None, 192, 256])
@pytest.mark.parametrize("lengths", [[32], [192], [64, 192], [80, 192]])
def test_settings_under_which_a_protocol_is_not_what_it_says_are_refused(protocol, unit, lengths):
    """window_mean with one window at a length; masked with other tokens at one than at another."""
    size = unit or max(lengths)
    found = [windows(protocol, size, length, STRIDE) for length in lengths]
    tokens = [{at + i for at, part in one.items() for i in range(size)[part]} for one in found]
    bad = protocol == "window_mean" and min(map(len, found)) < 2
    bad |= protocol == "masked" and any(one != {*range(size)} for one in tokens)
    task = Perplexity(lengths=lengths, protocols=[protocol], unit=unit, stride=STRIDE)
    with pytest.raises(UserError, match=r"task\.perplexity\.") if bad else nullcontext():
        task.check()


def test_a_unit_is_no_shorter_than_the_longest_length():
    with pytest.raises(UserError, match=r"unit=100: must be at least the longest length .192"):
        Perplexity(lengths=[64, 192], unit=100).check()


def test_a_length_the_model_refuses_says_so_in_its_own_words(tiny, store, tmp_path):
    context = make_context(tiny("learned").eval(), tmp_path, store)  # reads 256 tokens
    rows = by_protocol(measure(Perplexity, context, lengths=[64, 256, 512]))
    for protocol in ("blocks", "half_tail"):
        assert {rows[protocol, length]["status"] for length in (64, 256)} == {"ok"}
        row = rows[protocol, 512]
        assert row["status"] == "not_applicable"
        assert row["reason"] == "this model reads at most 256 tokens and was given 512"
        assert "bits_per_byte" not in row


def test_a_length_without_memory_keeps_its_place_and_the_others_go_on(store, tmp_path):
    class Greedy(Remembers):
        def forward(self, tokens, state=None):
            if state.tokens_seen + tokens.shape[1] > 64:
                raise MemoryError("no room")
            return super().forward(tokens, state)

    context = make_context(Greedy(1), tmp_path, store)
    rows = list(measure(Perplexity, context, lengths=[96, 32], chunk=8))
    assert [(row["length"], row["status"]) for row in rows] == [
        *[(96, "out_of_memory"), (96, "out_of_memory"), (32, "ok"), (32, "ok")]
    ]
    context = make_context(Remembers(1), tmp_path, store)
    whole = list(measure(Perplexity, context, lengths=[96, 32]))
    assert [row["nll_sum"] for row in rows[2:]] == pytest.approx(
        [row["nll_sum"] for row in whole[2:]]
    )


def test_text_that_is_too_short_leaves_a_reason_at_every_length(store, tmp_path):
    context = make_context(Remembers(1), tmp_path, store)
    rows = list(measure(Perplexity, context, lengths=[32, 100_000]))
    assert {row["status"] for row in rows} == {"failed"}
    assert {(row["length"], row["protocol"]) for row in rows} == {
        (length, protocol) for length in (32, 100_000) for protocol in ("blocks", "half_tail")
    }
    assert "600 tokens" in rows[0]["reason"]


def test_what_is_known_is_not_measured_again(store, tmp_path):
    model, task = Remembers(1), Perplexity(lengths=[32, 96], units=2, stride=STRIDE)
    context = make_context(model, tmp_path, store)
    predicted = [*task.questions(context)]
    wanted = [q for q in predicted if q["protocol"] == "half_tail" and q["length"] == 32]
    rows = list(task.rows(context, wanted))
    assert [(row["protocol"], row["length"]) for row in rows] == [("half_tail", 32)]
    assert model.read == 2 * 32 * 3
    identity = {"unit", "units", "documents", "stride", "split"}
    assert all(identity <= question.keys() for question in predicted)
    assert task.settings == {"task.perplexity.overlap": 2}


def test_lengths_are_multiples_of_the_training_length_unless_given(tmp_path):
    store = text_store(random_text(2000))
    rows = measure(
        Perplexity, make_context(Remembers(1), tmp_path, store), protocols=["blocks"], units=1
    )
    assert [row["length"] for row in rows] == [1024, 512, 256, 128, 64, 32]


@pytest.mark.parametrize("wrong", [{"protocols": ["block"]}, {"lengths": [0]}, {"stride": 0}])
def test_settings_that_make_no_sense_are_refused(wrong, store, tmp_path):
    with pytest.raises(UserError):
        list(measure(Perplexity, make_context(Remembers(1), tmp_path, store), **wrong))


def test_a_row_says_what_simple_guesses_would_score(tmp_path, store):
    """A bigram model, token frequencies, an even guess over the vocabulary, in bits per byte."""
    context = make_context(Remembers(memory=5), tmp_path, store)
    unit = LENGTHS[-1] + STRIDE  # over which windows slide
    options = {"lengths": LENGTHS, "units": UNITS, "unit": unit, "stride": STRIDE}
    rows = list(measure(Perplexity, context, **options, protocols=CAUSAL))
    text = evaluation_text(store, unit, UNITS, "joined")
    shares = np.bincount(text.ravel()) / text.size
    every = {
        "bigram": Bigrams.count(store.tokens, VOCABULARY).nats(text),
        "unigram": -np.log(shares[text])[:, 1:],
    }
    assert {row["protocol"] for row in rows} == {*CAUSAL}
    for row in rows:
        scored = np.zeros(unit)  # how often each token
        question = row["protocol"], unit, row["length"], row["stride"], 2
        for start, own in windows(*question).items():
            scored[start : start + row["length"]][own] += 1
        assert row["count"] == len(text) * scored.sum()
        for name, nats in every.items():
            wanted = (nats * scored).sum() / row["count"] / math.log(2)
            assert row[f"{name}_bits"] == pytest.approx(wanted / store.bytes_per_token)
        assert row["uniform_bits"] == pytest.approx(math.log2(VOCABULARY) / store.bytes_per_token)
