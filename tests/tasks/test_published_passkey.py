"""The papers' passkey: prompts fill their length, keys are where they should be, k_max by rule."""

import re

import numpy as np
import pytest
import torch
from fakes import Reader, TextsApart, make_context, measure, text_store
from hypothesis import given
from hypothesis import strategies as st

from zoo.data.tokenizers import BYTE_TOKENIZER
from zoo.errors import UserError
from zoo.model.backbone import BackboneState
from zoo.tasks.published_passkey import DIGITS, PublishedPasskey, k_max, prompt


@pytest.fixture(autouse=True)
def texts_are_read_apart(monkeypatch):
    monkeypatch.setattr("zoo.model.scoring.RowBatch", TextsApart)


class Recalls(Reader):
    """Writes the key that it read in the last `memory` bytes, else zeros."""

    def __init__(self, memory: int):
        super().__init__()
        self.memory = memory

    def hidden(self, tokens, state, positions=None):
        seen = torch.cat([state.blocks[0], tokens], 1)
        logits = torch.zeros(*tokens.shape, 256)
        for row, history in enumerate(seen.tolist()):
            text = bytes(history[-self.memory :]).decode("latin1")
            key = re.search(r"The pass key is (\d{5})\. Remember", text)
            written = text.rpartition("The pass key is")[2]
            wanted = f" {key[1] if key else '00000'}..."
            logits[row, -1, ord(wanted[min(len(written), 6)])] = 5.0
        return logits, BackboneState((seen,), state.tokens_seen + tokens.shape[1])


def context(memory: int, folder):
    text = np.random.default_rng(0).integers(97, 123, size=3000)
    return make_context(Recalls(memory), folder, text_store(text), train_length=200)


def test_k_max_is_how_far_back_keys_are_found(tmp_path):
    options = {"lengths": [1500], "distances": 8, "repeats": 2}
    (row,) = measure(PublishedPasskey, context(800, tmp_path), **options)
    assert row["status"] == "ok", row["reason"]
    within = [distance for distance in row["distances"] if distance <= 800]
    assert row["k_max"] == max(within)
    assert row["correct"] == 2 * len(within)
    assert row["count"] == 16
    assert row["distances"] == sorted(row["distances"])
    assert row["distances"][-1] > 1200  # right behind the prompt's first sentences


def test_yarns_keys_are_at_random_places(tmp_path):
    options = {"lengths": [1500], "repeats": 10, "protocol": "yarn"}
    (row,) = measure(PublishedPasskey, context(10**6, tmp_path), **options)
    assert (row["exact"], row["count"]) == (1, 10)
    assert "k_max" not in row
    (row,) = measure(PublishedPasskey, context(700, tmp_path), **options)
    assert 0 < row["correct"] < 10


@given(st.integers(400, 3000), st.floats(0, 1))
def test_prompts_fill_their_length_and_hold_the_key_twice(most, share):
    made = prompt(BYTE_TOKENIZER, "12345", share, most)
    text = bytes(made.tokens).decode()
    assert most - 100 < len(made.tokens) <= most
    assert text.count("12345") == 2
    assert text[len(text) - made.distance :].startswith("The pass key is 12345. Remember it.")
    assert text.endswith("What is the pass key? The pass key is")


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([1, 0.2, 0.1, 1], 20), ([0.1, 1, 1, 1], 0), ([1, 1, 1, 1], 40), ([0.2, 0, 0, 0], 10)],
)
def test_k_max_ends_at_the_first_distance_with_too_few(shares, expected):
    assert k_max([10, 20, 30, 40], shares, 0.2) == expected


def test_a_length_without_room_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be at least"):
        prompt(BYTE_TOKENIZER, "12345", 0.5, 100)
    assert DIGITS == 5
