"""Passkeys in training windows and prompts: where the words are, and that seeds decide all."""

import re
from pathlib import Path

import numpy as np
import pytest
from building import train_config

from zoo.config.schema.train import TrainConfig
from zoo.config.validate import plain, validate
from zoo.data.corpora import Corpus
from zoo.data.passkey import (
    END,
    QUESTION,
    STATEMENT,
    TIMES,
    Passkeys,
    facts_prompt,
    passkey_prompt,
    random_key,
)
from zoo.data.store import TokenStore
from zoo.data.tokenizers import BYTE_TOKENIZER, encode_bytes
from zoo.errors import UserError
from zoo.runs.identity import run_name

FILLER = np.frombuffer(b"_" * 600, np.uint8).astype(np.int64)
SENTENCE = re.escape(STATEMENT) + r"(\d{4})"


def text(tokens: np.ndarray) -> str:
    return bytes(tokens.tolist()).decode()


def planted(share: float, size: int = 600, rows: int = 40, step: int = 0) -> list[str]:
    windows = np.tile(FILLER[:size], (rows, 1))
    seeds = [(3, step, row) for row in range(rows)]
    return [text(row) for row in Passkeys(share, encode_bytes).plant(windows, seeds)]


def test_a_window_states_its_key_once_and_queries_it_to_the_end():
    windows = planted(1.0)
    for window in windows:
        key = re.search(SENTENCE, window)[1]
        assert len(window) == 600
        assert window.count(STATEMENT) == 1
        assert window.index(STATEMENT) < window.index(QUESTION)
        assert 1 <= window.count(QUESTION) <= TIMES
        assert window.count(f"~{key}{END}") == window.count("~") == 1 + window.count(QUESTION)
        assert window.endswith(f"{QUESTION}{key}{END}")
    assert len({re.search(SENTENCE, window)[1] for window in windows}) > 35
    starts = [window.index(STATEMENT) for window in windows]
    assert min(starts) < 50
    assert max(starts) > 450


def test_a_window_of_facts_queries_what_it_stated_behind_the_same_sign():
    counts, alone = [], 0
    seeds = [(3, 0, row) for row in range(60)]
    for row in Passkeys(1.0, encode_bytes, 6).plant(np.tile(FILLER[:300], (60, 1)), seeds):
        window = text(row)
        stated = re.findall(rf"{re.escape(STATEMENT[:-1])}(.)(\d{{4}}){re.escape(END)}", window)
        queried = re.findall(rf"{re.escape(QUESTION[:-1])}(.)(\d{{4}}){re.escape(END)}", window)
        assert len(window) == 300
        assert len({sign for sign, _ in stated}) == len(stated)
        assert {*queried} <= {*stated}
        assert window.rindex(STATEMENT[:-1]) < window.index(QUESTION[:-1])
        assert window[-len(END) - 5 : -len(END)] in {sign + key for sign, key in stated}
        counts.append(len(stated))
        alone += len({*queried}) == 1
    assert {*counts} == {*range(1, 7)}
    assert alone < 40  # most windows query several


def test_a_window_without_room_for_as_many_facts_is_refused():
    windows = np.tile(FILLER[:60], (2, 1))
    Passkeys(1.0, encode_bytes, 1).plant(windows, [(3, 0, 0), (3, 0, 1)])
    with pytest.raises(UserError, match=r"^data\.passkey_facts=6: takes windows of \d+ tokens"):
        Passkeys(1.0, encode_bytes, 6).plant(windows, [(3, 0, 0), (3, 0, 1)])


def test_a_prompt_of_facts_states_them_in_order_from_its_beginning_to_its_end():
    facts = [("^", "1111"), ("~", "2222"), ("%", "3333")]
    prompt = text(facts_prompt(FILLER[:200], facts, 1, encode_bytes))
    assert len(prompt) == 200
    assert prompt.endswith(QUESTION)
    assert prompt.startswith(f"{STATEMENT[:-1]}^1111{END}")
    assert prompt[: -len(QUESTION)].endswith(f"{STATEMENT[:-1]}%3333{END}")
    at = prompt.index(f"{STATEMENT}2222{END}")
    size = len(STATEMENT) + 4 + len(END)
    assert at == size + round((200 - 3 * size - len(QUESTION)) / 2)
    with pytest.raises(UserError, match="length=80: must be at least"):
        facts_prompt(FILLER[:80], facts, 0, encode_bytes)


def test_a_share_of_the_windows_holds_a_key_and_the_rest_is_the_text():
    some, every = planted(0.3, rows=400), planted(1.0, rows=400)
    kept = [window == text(FILLER) for window in some]
    assert 0.22 < 1 - np.mean(kept) < 0.38
    pairs = zip(some, every, kept, strict=True)
    assert all(one == other for one, other, plain in pairs if not plain)
    assert set(planted(0.0)) == {text(FILLER)}
    assert planted(0.3) != planted(0.3, step=1)


@pytest.mark.parametrize("size", [50, 257, 600])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_a_prompt_ends_with_the_question_and_hides_the_key_at_its_depth(size, depth):
    prompt = text(passkey_prompt(FILLER[:size], "4071", depth, encode_bytes))
    assert len(prompt) == size
    assert prompt.endswith(QUESTION)
    stated = f"{STATEMENT}4071{END}"
    assert prompt.count(stated) == 1
    room = prompt.count("_")
    assert prompt.index(stated) == round(depth * room)
    assert text(FILLER) == "_" * 600


def test_a_text_too_short_for_a_key_is_refused_in_one_line():
    for call, option in (
        (lambda: passkey_prompt(FILLER[:30], "4071", 0.5, encode_bytes), "length=30"),
        (lambda: planted(0.1, size=30), "seq_len=29"),
    ):
        with pytest.raises(
            UserError, match=rf"^{option}: must be at least \d+ tokens, to hold"
        ) as message:
            call()
        assert "\n" not in str(message.value)


def test_keys_are_uniform_over_the_digits():
    generator = np.random.default_rng(0)
    digits = "".join(random_key(generator) for _ in range(1000))
    assert all(320 < digits.count(digit) < 480 for digit in "0123456789")


def test_the_share_is_a_part_of_the_run_and_its_data_where_there_is_one():
    none, some = train_config(), train_config("data.passkey=0.5")
    assert "passkey" not in plain(none)["data"]  # as before there were passkeys: runs keep names
    assert plain(some)["data"]["passkey"] == 0.5
    assert run_name(none) != run_name(some)
    assert validate(TrainConfig, plain(some)) == some
    store = TokenStore(Path("x"), FILLER, np.array([0, 600]), "sha", {})
    corpora = [
        Corpus("x", store, store, store, BYTE_TOKENIZER, "whole", passkey=share)
        for share in (0.0, 0.25, 0.5)
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == 3
    facts = Corpus("x", store, store, store, BYTE_TOKENIZER, "whole", 0.5, 8)
    assert facts.fingerprint not in {corpus.fingerprint for corpus in corpora}
    assert facts.passkeys == Passkeys(0.5, encode_bytes, 8)
    assert "passkey_facts" not in plain(some)["data"]
    several = train_config("data.passkey=0.5", "data.passkey_facts=8")
    assert plain(several)["data"]["passkey_facts"] == 8
    assert run_name(several) != run_name(some)
    with pytest.raises(UserError, match=r"data\.passkey_facts=8: no window holds a passkey"):
        train_config("data.passkey_facts=8")
    assert corpora[0].passkeys is None
    assert corpora[2].passkeys == Passkeys(0.5, encode_bytes)
    for wrong in ("-0.1", "2", "some"):
        with pytest.raises(UserError, match=r"data\.passkey"):
            train_config(f"data.passkey={wrong}")
