"""The text that a model writes is a measurement: a row, a report and a line in the terminal."""

import pytest
from fakes import make_context, measure, random_text, text_store

from zoo.errors import UserError
from zoo.model.generation import Sampling, Writer
from zoo.report.page import render, terminal
from zoo.report.rows import gather
from zoo.tasks.generate import Generate


@pytest.fixture
def context(tmp_path):
    from building import train_config

    from zoo.model.build import build_model

    config = train_config("model=transformer", "size=tiny", "seq_len=32", "match=none")
    model, _ = build_model(config, vocab_size=256)
    store = text_store(random_text(100))
    found = make_context(model.eval().requires_grad_(False), tmp_path, store)
    tokenizer = found.corpus.tokenizer._replace(vocab_size=256)
    object.__setattr__(found.data, "tokenizer", tokenizer)
    return found


def test_a_row_holds_the_text_that_the_writer_writes(context):
    (row,) = measure(Generate, context, prompt="ab", tokens=10, temperature=1.0, seed=2)
    writer = Writer(context.model)
    writer.read([97, 98])
    tokens = [*writer.write(10, Sampling(temperature=1.0, seed=2), 0)]
    assert row["text"] == "".join(context.corpus.tokenizer.decode(tokens))
    assert (row["prompt_tokens"], row["tokens"], row["status"]) == (2, 10, "ok")
    assert row["state_bytes"] == context.model.state_bytes(2 + 9)  # the last was not read
    assert row["tokens_per_second"] > 0 < row["prompt_tokens_per_second"]


def test_another_prompt_is_another_measurement(context):
    one, other = (Generate(prompt=prompt).settings for prompt in ("a", "b"))
    assert one != other


def test_reports_show_the_text_as_it_is(context):
    (row,) = measure(Generate, context, prompt="ab", tokens=3)
    row |= {"text": "<b>two\nlines", "task": "generate", "arm": "x", "run": "x", "seed": 0}
    row["audited"] = {"float32": 3}
    row["declares"] = Generate.declares.plain(row)
    results = gather([row], [])
    assert "Text written, x\n    <b>two\n    lines" in terminal(results)
    assert "&lt;b&gt;two\nlines" in render(results, {})


def test_a_text_longer_than_the_model_can_read_is_not_applicable(context):
    context.model.positions = None
    context.model.blocks[0].mixer.max_length = 4
    (row,) = measure(Generate, context, prompt="abc", tokens=10)
    assert row["status"] == "not_applicable"
    assert row["reason"].startswith("task.generate.tokens=10: the model reads at most 4 tokens")


def test_an_empty_stop_is_refused():
    with pytest.raises(UserError, match=r"task\.generate\.stop="):
        Generate(stop=["x", ""]).check()


def test_the_end_of_a_document_is_not_written(context, monkeypatch):
    monkeypatch.setattr(Writer, "write", lambda *_: iter(()))  # it ends at once
    (row,) = measure(Generate, context, prompt="ab", tokens=5)
    assert (row["tokens"], row["text"], row["tokens_per_second"]) == (0, "", None)
