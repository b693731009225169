"""Speed and memory by length: what is timed is what is said, and freed memory hides nothing."""

import time

import pytest
import torch
from fakes import VOCABULARY, Remembers, make_context, measure, random_text, text_store

from zoo.errors import UserError
from zoo.tasks.memory import peak_bytes
from zoo.tasks.speed import Speed

MIB = 2**20


@pytest.fixture
def store():
    return text_store(random_text(100))


def test_each_length_is_read_at_once_and_written_token_by_token(store, tmp_path):
    class Watched(Remembers):
        calls: list = []  # noqa: RUF012

        def forward(self, tokens, state=None):
            assert tokens.max() < VOCABULARY
            self.calls.append((tokens.shape[1], state is not None))
            return super().forward(tokens, state)

    model = Watched(3)
    context = make_context(model, tmp_path, store)
    rows = list(measure(Speed, context, lengths=[100], decode_tokens=5, repeats=2, chunk=40))
    assert [row["phase"] for row in rows] == ["forward", "decode"]
    assert {row["status"] for row in rows} == {"ok"}
    warm_up = model.calls.index((100, False))
    whole, prompt = [(100, False)] * 3, [(40, True), (40, True), (20, True)]
    assert model.calls[warm_up:] == [*whole, *prompt, *[(1, True)] * (1 + 5)]


def test_tokens_per_second_are_those_of_the_clock(store, tmp_path):
    class Sleeps(Remembers):
        def forward(self, tokens, state=None):
            time.sleep(0.02)
            return super().forward(tokens, state)

    context = make_context(Sleeps(1), tmp_path, store)
    forward, decode = measure(Speed, context, lengths=[64], decode_tokens=3, repeats=2)
    for row, tokens in ((forward, 64), (decode, 1)):
        assert 20 <= row["milliseconds"] < 200
        assert row["tokens_per_second"] == pytest.approx(1000 * tokens / row["milliseconds"])


def test_a_peak_counts_what_is_held_at_a_time_beyond_what_was_there():
    def call():
        first = torch.ones(3 * MIB // 4)
        del first
        return torch.ones(MIB // 4), torch.ones(MIB // 4)

    before = torch.ones(MIB)
    assert peak_bytes(torch.device("cpu"), call) == 3 * MIB
    assert before.sum() == MIB


def test_measuring_memory_writes_nothing(capfd):
    peak_bytes(torch.device("cpu"), lambda: torch.ones(9))
    assert capfd.readouterr() == ("", "")


def test_a_peak_is_what_the_call_took_each_time(store, tmp_path):
    class Hungry(Remembers):
        def forward(self, tokens, state=None):
            torch.ones((64 if tokens.shape[1] > 1 else 16) * MIB // 4)
            return super().forward(tokens, state)

    context = make_context(Hungry(1), tmp_path, store)
    for row in measure(Speed, context, lengths=[16, 32, 64], decode_tokens=2, repeats=1):
        taken = 64 if row["phase"] == "forward" else 16
        assert taken * MIB <= row["peak_bytes"] < (taken + 1) * MIB


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("architecture", ["transformer", "mamba"])
def test_a_row_has_the_bytes_of_the_state(architecture, precision, tiny, store, tmp_path):
    model = tiny(architecture, dtype=torch.float32).eval()
    context = make_context(model, tmp_path, store, precision=precision)
    rows = list(measure(Speed, context, lengths=[16, 64], decode_tokens=2, repeats=1))
    for row in rows:
        with context.arithmetic():
            assert row["state_bytes"] == model.state_bytes(row["length"])
    grows = rows[-1]["state_bytes"] > rows[0]["state_bytes"]
    assert grows == (architecture == "transformer")


def test_writing_beyond_what_the_model_reads_is_not_applicable(tiny, store, tmp_path):
    context = make_context(tiny("learned").eval(), tmp_path, store)  # reads 256 tokens
    forward, decode = measure(Speed, context, lengths=[256], decode_tokens=2, repeats=1)
    assert forward["status"] == "ok"
    assert decode["status"] == "not_applicable"
    assert decode["reason"] == "this model reads at most 256 tokens and was given 258"


def test_what_is_known_is_not_timed_again(store, tmp_path):
    context, task = make_context(Remembers(1), tmp_path, store), Speed(lengths=[16, 32])
    wanted = [question for question in task.questions(context) if question["phase"] == "decode"]
    rows = list(task.rows(context, wanted))
    assert [row["phase"] for row in rows] == ["decode", "decode"]


@pytest.mark.parametrize("wrong", [{"lengths": [0]}, {"decode_tokens": 0}, {"repeats": 0}])
def test_settings_that_make_no_sense_are_refused(wrong, store, tmp_path):
    with pytest.raises(UserError):
        list(measure(Speed, make_context(Remembers(1), tmp_path, store), **wrong))
