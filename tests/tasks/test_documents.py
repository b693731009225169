"""Answers in long texts: prompts that fit, cuts that are reported, scores by hand."""

import json
from importlib import import_module
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from building import train_on_text
from fakes import Reader, make_context, text_store
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.config.compose import compose
from zoo.config.groups import choices
from zoo.data.long_contexts import Example
from zoo.data.tokenizers import BYTE_TOKENIZER
from zoo.errors import UserError
from zoo.model.backbone import BackboneState
from zoo.runs.folder import RunFolder
from zoo.tasks.documents import BENCHMARKS, METRICS, Documents, cut_to, fitting

NAMES = ["variable_tracking", "common_words", "babilong"]
TEXT = [f"Sentence {i} of a book." for i in range(50)]


class Says(Reader):
    """Writes `answer(prompt)` behind a prompt, and then the end of a document."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.prompts = answer, []

    def hidden(self, tokens, state, positions=None):
        seen = torch.cat([state.blocks[0], tokens], 1)
        logits = torch.zeros(*tokens.shape, 256)
        for row, text in enumerate(bytes(line).decode() for line in seen.tolist()):
            prompt = next((one for one in self.prompts if text.startswith(one)), None)
            if prompt is None or tokens.shape[1] > 1:
                prompt = text
                self.prompts = [text, *self.prompts]
            said = f"{self.answer(prompt)}\0".encode()
            logits[row, -1, said[min(len(text) - len(prompt), len(said) - 1)]] = 5.0
        return logits, BackboneState((seen,), state.tokens_seen + tokens.shape[1])


def rows(folder, answer, **options):
    text = np.frombuffer(" ".join(TEXT).encode(), np.uint8)
    task = Documents(**options)
    task.check()
    return [*task.rows(make_context(Says(answer), folder, text_store(text), train_length=400))]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6)
@given(most=st.integers(5000, 7000), seed=st.integers(0, 2**20))
def test_generated_prompts_fill_their_length(name, most, seed):
    prompt = fitting(BYTE_TOKENIZER, name, [seed, 0], TEXT, most)
    unit = {"variable_tracking": 25, "common_words": 40, "babilong": 30}[name]
    assert most - unit < len(prompt.tokens) <= most
    longer = fitting(BYTE_TOKENIZER, name, [seed, 0], TEXT, 2 * most)
    assert len(longer.answers) == len(prompt.answers)


def test_a_length_without_room_for_an_example_is_refused():
    with pytest.raises(UserError, match=r"lengths=100: .*common_words, which has at least \d+"):
        fitting(BYTE_TOKENIZER, "common_words", [0, 0], [], 100)


def test_the_share_of_the_answers_that_is_written_is_the_score(tmp_path):
    def right(prompt: str) -> str:
        chain = [part.split(" = ")[0] for part in prompt.split("VAR ") if " = " in part]
        return ", ".join(chain).lower()

    def half(prompt: str) -> str:
        return right(prompt).split(", ")[0]

    options = {"dataset": "variable_tracking", "lengths": [1200], "examples": 3}
    (row,) = rows(tmp_path, right, **options)
    assert (row["status"], row["score"], row["count"]) == ("ok", 1.0, 3), row["reason"]
    assert row["cut"] == row["tokens_cut"] == 0
    assert 1100 < row["prompt_tokens"] <= 1200 - BENCHMARKS["variable_tracking"].tokens
    (row,) = rows(tmp_path, half, **options)
    assert row["score"] == pytest.approx(0.2)
    (row,) = rows(tmp_path, lambda _: "nothing", **options)
    assert (row["score"], row["first_answer"]) == (0, "nothing")


def test_facts_are_hidden_in_the_text_that_is_measured(tmp_path):
    seen = []

    def listening(prompt: str) -> str:
        seen.append(prompt)
        return ""

    (row,) = rows(tmp_path, listening, dataset="babilong", lengths=[1500], examples=2)
    assert row["status"] == "ok", row["reason"]
    assert any(prompt.count("of a book.") > 30 for prompt in seen)


def write_file(folder, size=2000):
    file = folder / "data.jsonl"
    document = "".join(f"<{i}>" for i in range(size))
    records = [
        {"context": document, "input": "What is it?", "answers": ["the green door", "a door"]},
        {"context": "Short.", "input": "And this?", "answers": ["short"]},
    ]
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return file


def test_long_documents_are_cut_as_it_says_and_it_is_reported(tmp_path):
    file = write_file(tmp_path)
    for truncate in ("left", "middle"):
        seen = []

        def listening(prompt: str, seen=seen) -> str:
            seen.append(prompt)
            return "The green door!\nAnd more."

        (row,) = rows(
            tmp_path,
            listening,
            **{"dataset": "narrative_qa", "path": str(file), "lengths": [900]},
            truncate=truncate,
        )
        assert row["status"] == "ok", row["reason"]
        assert row["score"] == pytest.approx(0.5)  # one of two; articles and "!" count for nothing
        assert (row["count"], row["cut"]) == (2, 0.5)
        document = max(seen, key=len)
        whole = sum(len(f"<{i}>") for i in range(2000))
        text = document.partition("briefly.\n\n")[2].rpartition("\n\nWhat is it?\nAnswer:")[0]
        assert row["tokens_cut"] == whole - len(text)
        assert len(document) == 900 - BENCHMARKS["narrative_qa"].tokens
        assert text.startswith("<0><1>") == (truncate == "middle")
        assert text.endswith("<1998><1999>")
    with pytest.raises(UserError, match="truncate=null: an example has"):
        rows(tmp_path, lambda _: "", dataset="qasper", path=str(file), lengths=[900])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "task.documents.path=.*: has no record. Give a file of examples."),
        ('{"context": "a", "input": "b", "answers": [""]}\n', "has no text or list of texts"),
    ],
)
def test_a_file_without_an_answer_is_refused_before_anything_is_measured(tmp_path, lines, said):
    file = tmp_path / "empty.jsonl"
    file.write_text(lines)
    with pytest.raises(UserError, match=said):
        rows(tmp_path, lambda _: "", dataset="qasper", path=str(file), lengths=[900])


def test_what_was_measured_is_known_by_the_files_contents(tmp_path):
    file = write_file(tmp_path, 10)
    options = {"dataset": "qasper", "path": str(file), "lengths": [900]}
    (one,) = rows(tmp_path, lambda _: "", **options)
    write_file(tmp_path, 11)
    (other,) = rows(tmp_path, lambda _: "", **options)
    assert one["data"] != other["data"]


@given(st.text("ab \n", max_size=40), st.integers(0, 60), st.sampled_from(["left", "middle"]))
def test_a_cut_prompt_has_all_tokens_that_there_is_room_for(text, room, truncate):
    example = Example("Read.", text, "Why?", ["so"])
    most = len("Read.\n\n\n\nWhy?") + room
    if not room and text:
        with pytest.raises(UserError, match="a question alone has"):
            cut_to(BYTE_TOKENIZER, example, most, truncate)
        return
    prompt = cut_to(BYTE_TOKENIZER, example, most, truncate)
    assert prompt.cut == max(0, len(text) - room)
    assert len(prompt.tokens) + prompt.cut >= len(text) + len("Read.\n\nWhy?")
    assert len(prompt.tokens) <= most


def test_every_data_set_that_may_be_chosen_has_its_benchmark():
    assert get_args(get_type_hints(Documents)["dataset"]) == (*BENCHMARKS,)
    assert {one.metric for one in BENCHMARKS.values()} == {*METRICS}


def test_scores_by_hand():
    assert METRICS["f1"]("a green door", ["the red door"])["score"] == pytest.approx(0.5)
    assert METRICS["exact"]("The Door.", ["window", "door"])["score"] == 1
    assert METRICS["exact"]("the doors", ["door"])["score"] == 0
    assert METRICS["found"]("X and y", ["x", "Y", "z"])["score"] == pytest.approx(2 / 3)
    found = METRICS["rouge"]("the cat sat", ["the cat ran", "dogs"])
    assert found == pytest.approx({"score": 2 / 3, "rouge1": 2 / 3, "rouge2": 0.5})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset": "qasper"}, "path=null: must be the file of dataset=qasper"),
        ({"dataset": "babilong", "truncate": "left"}, "truncate=left: dataset=babilong is gener"),
        ({"dataset": "babilong", "path": "x"}, "path=x: dataset=babilong is generated"),
        ({"dataset": "qasper", "path": __file__}, "is no file of records"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_opened(options, said):
    with pytest.raises(UserError, match=said):
        Documents(**options).check()


BY_NAME = [name for name in ("documents", *BENCHMARKS) if name in choices("task")]


def test_every_benchmark_of_documents_is_a_task_by_name(tmp_path, monkeypatch):
    assert BY_NAME == ["documents", "gov_report", "qmsum", "narrative_qa", "qasper", "quality"]
    monkeypatch.chdir(tmp_path)
    train_on_text(tmp_path, "trainer.max_steps=1", "name=run", "runs=runs", "batch_tokens=64")
    file = write_file(tmp_path)
    options = ["task.documents.lengths=[900]", "task.documents.examples=2", "logger=none"]
    for name in BY_NAME[1:]:
        task = compose("eval", ["run=x", f"task={name}"]).task["documents"]
        assert (task.options["dataset"], task.options["truncate"]) == (name, "middle")
    words = ["task=quality", f"task.documents.path={file}", "task.documents.tokens=3"]
    assert import_module("zoo.cli.eval").main(["run=runs/run", *words, *options]) == 0
    (row,) = RunFolder.open("runs/run").rows()
    assert (row["dataset"], row["status"], row["cut"]) == ("quality", "ok", 0.5)
    assert "QuALITY, exact match" in (tmp_path / "report.html").read_text()
