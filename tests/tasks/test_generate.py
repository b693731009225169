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
    tokens = [*writer.write(10, Sampling(temperature=1.0, seed=2), [0])]
    assert row["text"] == "".join(context.corpus.tokenizer.decode(tokens))
    assert (row["prompt_tokens"], row["tokens"], row["status"]) == (2, 10, "ok")
    assert row["state_bytes"] == context.model.state_bytes(2 + 9)  # the last was not read
    assert row["tokens_per_second"] > 0 < row["prompt_tokens_per_second"]


def test_another_prompt_is_another_measurement(context):
    one, other = (Generate(prompt=prompt).questions(context) for prompt in ("a", "b"))
    assert one != other


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "seed": 2}, {"stop": ["e", "t"]}])
def test_several_prompts_have_the_rows_that_each_has_alone(context, drawn):
    prompts = ["ab", "abc" * 9, "ab cd"]
    rows = [*measure(Generate, context, prompt=prompts, tokens=12, **drawn)]
    alone = [
        row for p in prompts for row in measure(Generate, context, prompt=p, tokens=12, **drawn)
    ]
    assert [row["prompt"] for row in rows] == prompts
    same = ("status", "text", "prompt", "prompt_tokens", "tokens", "state_bytes", "prompt_flops")
    assert [[row[name] for name in same] for row in rows] == [
        [row[name] for name in same] for row in alone
    ]
    assert {row["tokens_per_second"] for row in rows} == {None}


def test_of_several_prompts_only_the_one_that_is_too_long_has_no_text(context):
    context.model.positions = None
    context.model.blocks[0].mixer.max_length = 8
    rows = [*measure(Generate, context, prompt=["abc", "abcdef", "a"], tokens=4)]
    assert [row["status"] for row in rows] == ["ok", "not_applicable", "ok"]
    assert rows[1]["reason"].startswith("task.generate.tokens=4: the model reads at most 8 tokens")


@pytest.mark.parametrize(
    ("prompt", "rule"),
    {
        "[]": "must be one prompt, or a list of prompts that are not empty",
        "[a,'']": "must be one prompt, or a list of prompts that are not empty",
        "[a,b,a]": "names a prompt twice",
        "[a,1]": "must be text or a list",
        "3": "must be text or a list",
        "null": "must be text or a list",
        "[[a]]": "must be text or a list",
    }.items(),
)
def test_prompts_that_are_none_are_refused_in_one_line(prompt, rule):
    from zoo.config.compose import compose

    def check() -> None:
        words = ["run=x", "task=generate", f"task.generate.prompt={prompt}"]
        compose("eval", words).task["generate"].load()().check()

    with pytest.raises(UserError, match=rf"^task\.generate\.prompt=.*: {rule}[^\n]*$"):
        check()


def test_reports_show_the_text_as_it_is(context):
    (row,) = measure(Generate, context, prompt="ab", tokens=3)
    row |= {"text": "<b>two\nlines", "task": "generate", "arm": "x", "run": "x", "seed": 0}
    row["audited"] = {"float32": 3}
    row["declares"] = Generate.declares.plain(row)
    results = gather([row], [])
    assert "Text written, x\n    <b>two\n    lines" in terminal(results)
    assert "&lt;b&gt;two\nlines" in render(results, {})


def test_reports_name_the_prompt_of_each_of_several_texts(context):
    rows = [*measure(Generate, context, prompt=["ab", "<i>"], tokens=3)]
    for row, text in zip(rows, ("one", "two"), strict=True):
        row |= {"text": text, "task": "generate", "arm": "x", "run": "x", "seed": 0}
        row |= {"audited": {"float32": 3}, "declares": Generate.declares.plain(row)}
    results = gather(rows, [])
    assert "Text written, x, after 'ab'\n    one" in terminal(results)
    assert "Text written, x, after '<i>'\n    two" in terminal(results)
    assert "x, after &#39;&lt;i&gt;&#39;" in render(results, {})


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
