"""Passkey retrieval: who remembers the key is right, who forgot it guesses, on the same prompts."""

import numpy as np
import pytest
import torch
from building import train_config
from fakes import Finder, make_context, measure, text_store

from zoo.data.passkey import DIGITS, STATEMENT
from zoo.errors import UserError
from zoo.model.build import build_model
from zoo.report.statistics import wilson
from zoo.tasks.passkey import Passkey, _answer, _distinct_keys
from zoo.tasks.speed import Speed

SMALL = {"depths": 5, "repeats": 4, "candidates": 3}


def context(model, folder):
    text = np.random.default_rng(0).integers(97, 123, size=3000)
    return make_context(model, folder, text_store(text), train_length=200)


def test_a_key_is_found_exactly_where_it_is_remembered(tmp_path):
    """Beyond the memory every candidate is alike, and a tie is no answer."""
    (row,) = measure(Passkey, context(Finder(200), tmp_path), lengths=[400], **SMALL)
    assert row["status"] == "ok"
    assert row["correct_by_depth"] == row["exact_by_depth"] == [0, 0, 0, 4, 4]
    assert (row["correct"], row["count"], row["accuracy"], row["exact"]) == (8, 20, 0.4, 0.4)
    assert row["interval"] == wilson(8, 20)
    assert (row["chance"], row["exact_chance"], row["digits"]) == (1 / 3, 1e-4, 4)


@pytest.mark.parametrize("task", [Passkey, Speed])
def test_a_prompt_is_read_without_the_logits_of_its_tokens(task, tmp_path, monkeypatch):
    """Over a large vocabulary they would take more time and memory than all layers."""
    model = build_model(train_config("model=mamba", "size=tiny"), vocab_size=256)[0]
    seen = []
    head = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda x: seen.append(x.shape[1]) or head(x))
    options = SMALL if task is Passkey else {"decode_tokens": 2, "repeats": 1}
    rows = measure(task, context(model, tmp_path), lengths=[400], **options)
    assert {row["status"] for row in rows if row.get("phase") != "forward"} == {"ok"}
    assert sorted({*seen} - {64, 400}) in ([1], [1, 3])  # without those of speed's forward pass
    assert seen.count(400) == (2 if task is Speed else 0)


def test_one_wrong_digit_is_no_exact_answer(tmp_path):
    model = context(Finder(10**6, slip=3), tmp_path)
    rows = list(measure(Passkey, model, lengths=[150, 300], chunk=64, **SMALL))
    assert [row["exact"] for row in rows] == [0, 0]
    assert [row["accuracy"] for row in rows] == [1, 1]


def test_longer_prompts_begin_earlier_in_the_same_text_and_hide_the_same_keys(tmp_path):
    model = Finder(10**6)
    rows = list(measure(Passkey, context(model, tmp_path), lengths=[400, 200], **SMALL))
    assert [row["length"] for row in rows] == [200, 400]
    short, long = (
        torch.cat([prompt for prompt in model.prompts if prompt.shape[1] == length - DIGITS])
        for length in (200, 400)
    )
    assert len(short) == len(long) == 20
    for one, other in zip(short[::5], long[::5], strict=True):  # the key first of all
        stated = len(STATEMENT) + DIGITS
        assert torch.equal(one[:stated], other[:stated])
        assert torch.equal(one[100:], other[300:])


@pytest.mark.parametrize("name", ["transformer", "mamba", "hybrid"])
def test_answers_from_the_state_are_those_of_reading_everything_again(name, tmp_path):
    torch.manual_seed(0)
    model = build_model(train_config(f"model={name}", "size=tiny"), vocab_size=256)[0].double()
    generator = np.random.default_rng(0)
    prompts = generator.integers(97, 123, size=(16, 70))
    answers = [[np.array(list(key.encode())) for key in _distinct_keys(0, i, 4)] for i in range(16)]
    with torch.inference_mode():
        for row in range(0, 16, 2):  # what the model would write itself
            text = torch.from_numpy(prompts[row])
            for _ in range(DIGITS):
                text = torch.cat([text, model(text[None])[0, -1].argmax()[None]])
            answers[row][0] = text[-DIGITS:].numpy()
        found = _answer(context(model, tmp_path), prompts, answers, chunk=32)
        costs = [
            [model.loss(torch.from_numpy(np.concatenate([prompt, answer]))[None]) for answer in row]
            for prompt, row in zip(prompts, answers, strict=True)
        ]
    likeliest = torch.tensor(costs).argmin(1) == 0
    assert found[:, 0].tolist() == likeliest.tolist()
    assert found[:, 1].tolist() == [True, False] * 8


def test_what_cannot_be_measured_keeps_its_row_with_the_reason(tmp_path):
    config = train_config(
        "model=learned", "size=tiny", "seq_len=200", "model.positions.max_length=200"
    )
    model = build_model(config, vocab_size=256)[0]
    rows = list(measure(Passkey, context(model, tmp_path), lengths=[200, 400], **SMALL))
    assert [row["status"] for row in rows] == ["ok", "not_applicable"]
    assert "200" in rows[1]["reason"]
    (row,) = measure(Passkey, context(model, tmp_path), lengths=[4000], **SMALL)
    assert (row["status"], row["length"]) == ("failed", 4000)
    with pytest.raises(UserError, match=r"task\.passkey\.candidates=1: must be an integer from 2"):
        next(measure(Passkey, context(model, tmp_path), candidates=1))
    with pytest.raises(UserError, match=r"task\.passkey\.lengths=\[0\]: must be"):
        next(measure(Passkey, context(model, tmp_path), lengths=[0]))


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_the_interval_of_a_share(right, count, low, high):
    """The last: Newcombe 1998, table I."""
    assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)
