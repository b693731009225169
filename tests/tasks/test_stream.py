"""Streaming: one text, read once through, in memory that does not grow."""

import math
import mmap
import time

import numpy as np
import pytest
import torch
from fakes import VOCABULARY, ByPosition, Remembers, make_context, measure, random_text, text_store

from zoo.config.compose import compose
from zoo.errors import UserError
from zoo.model.extend import extend
from zoo.tasks.memory import held_bytes
from zoo.tasks.stream import Stream

MIB = 2**20
shows_growth = pytest.mark.skipif(
    held_bytes(torch.device("cpu")) is None, reason="this system does not report a process's size"
)


def test_a_stream_is_one_long_sequence(tmp_path):
    model, text = Remembers(memory=20), random_text(1000)
    (row,) = measure(Stream, make_context(model, tmp_path, text_store(text)), tokens=777, chunk=50)
    nats = model.costs(text[:778])
    assert row["nll_sum"] == pytest.approx(nats.sum(), rel=1e-12)
    assert (row["count"], row["length"], row["passes"]) == (777, 777, 0.777)
    edges, curve = row["curve"]["edges"], row["curve"]["bits_per_byte"]
    for low, high, bits in zip(edges, edges[1:], curve, strict=False):
        assert bits == pytest.approx(nats[low - 1 : high - 1].mean() / math.log(2))


def test_a_text_that_ends_is_read_again(tmp_path):
    model, text = Remembers(memory=3), random_text(100)
    (row,) = measure(Stream, make_context(model, tmp_path, text_store(text)), tokens=250, chunk=40)
    assert row["passes"] == 2.5
    assert row["nll_sum"] == pytest.approx(model.costs(np.tile(text, 3)[:251]).sum())


@shows_growth
def test_a_long_stream_takes_constant_memory(tmp_path):
    model = ByPosition(lambda position: 1 + 1 / position)
    context = make_context(model, tmp_path, text_store(np.zeros(50_000)))
    (row,) = measure(Stream, context, tokens=MIB, chunk=4096)
    assert row["status"] == "ok"
    assert row["state_bytes"] == 8
    assert row["growth_bytes"] < 4 * MIB
    assert row["peak_bytes"] > 4096 * VOCABULARY * 8  # the logits of a chunk
    assert row["tokens_per_second"] > 0


@shows_growth
def test_memory_that_is_lost_on_the_way_is_seen(tmp_path):
    class Leaks(Remembers):
        lost: list = []  # noqa: RUF012

        def forward(self, tokens, state=None):
            self.lost.append(mmap.mmap(-1, 2 * MIB))  # not of the heap, which has room left over
            self.lost[-1].write(bytes(2 * MIB))
            return super().forward(tokens, state)

    context = make_context(Leaks(1), tmp_path, text_store(random_text(1000)))
    (row,) = measure(Stream, context, tokens=1000, chunk=10)
    assert row["growth_bytes"] > 100 * MIB  # of 180; the heap may shrink meanwhile


def test_a_state_that_grows_in_secret_fails(tmp_path):
    class Grows(Remembers):
        def forward(self, tokens, state=None):
            logits, after = super().forward(tokens, state)
            held = torch.cat([state.blocks[0], tokens], 1)  # type: ignore[union-attr]
            return logits, after._replace(blocks=(held,))

    context = make_context(Grows(1), tmp_path, text_store(random_text(100)))
    (row,) = measure(Stream, context, tokens=64, chunk=16)
    assert (row["status"], "declares 8" in row["reason"]) == ("failed", True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_recurrent_model_streams_and_attention_says_why_not(precision, tiny, tmp_path):
    store = text_store(random_text(300))
    rows = []
    for architecture in ("mamba", "transformer"):
        model = tiny(architecture, dtype=torch.float32).eval()
        context = make_context(model, tmp_path, store, precision=precision)
        rows += measure(Stream, context, tokens=256, chunk=64)
    mamba, other = rows
    assert (mamba["status"], mamba["reason"]) == ("ok", None)
    assert other["status"] == "not_applicable"
    assert "grows with the text" in other["reason"]
    assert "\n" not in other["reason"]


def test_attention_with_sinks_streams_in_a_state_that_stops_growing(tiny, tmp_path):
    sinks = compose("eval", ["run=x", "extension=streaming_llm"]).extension
    model = extend(tiny("transformer", dtype=torch.float32).eval(), sinks, 16)
    context = make_context(model, tmp_path, text_store(random_text(300)))
    short, long = (next(measure(Stream, context, tokens=n, chunk=64)) for n in (64, 1000))
    assert (short["status"], long["status"]) == ("ok", "ok")
    assert long["state_bytes"] == short["state_bytes"] > 0


def test_a_model_that_slows_down_is_seen(tmp_path):
    class Slows(Remembers):
        def forward(self, tokens, state=None):
            if state is not None and state.tokens_seen >= 900:
                time.sleep(0.2)
            return super().forward(tokens, state)

    context = make_context(Slows(1), tmp_path, text_store(random_text(1000)))
    (row,) = measure(Stream, context, tokens=1000, chunk=100)
    assert row["late_tokens_per_second"] < 500
    assert row["tokens_per_second"] > 2 * row["late_tokens_per_second"]


def test_a_stream_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError):
        list(
            measure(
                Stream, make_context(Remembers(1), tmp_path, text_store(random_text(9))), tokens=0
            )
        )
