"""Answers in long texts: prompts that fit, cuts that are reported, scores by hand."""

import json
from importlib import import_module
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from building import train_on_text
from fakes import Reader, TextsApart, make_context, text_store
from tokenizing import EVERY, opened

import zoo
from zoo.config.compose import compose
from zoo.config.groups import choices
from zoo.data.long_contexts import GENERATED
from zoo.data.long_prompts import fitting
from zoo.data.tokenizers import BYTE_TOKENIZER
from zoo.errors import UserError
from zoo.model.backbone import BackboneState
from zoo.report.statistics import interval, wilson
from zoo.runs.folder import RunFolder
from zoo.tasks.answers import METRICS
from zoo.tasks.documents import BENCHMARKS, Documents, _interval

TEXT = [f"Sentence {i} of a book." for i in range(50)]


@pytest.fixture(autouse=True)
def texts_are_read_apart(monkeypatch):
    monkeypatch.setattr("zoo.model.scoring.RowBatch", TextsApart)


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
    assert one["examples"] != other["examples"]


def test_every_data_set_that_may_be_chosen_has_its_benchmark():
    assert get_args(get_type_hints(Documents)["dataset"]) == (*BENCHMARKS,)
    assert {one.metric for one in BENCHMARKS.values()} == {*METRICS}


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_the_right_answer_has_room_or_the_line_says_how_many_tokens_it_has(dataset, tmp_path):
    """Of every data set a model that writes the right answer scores 1, as bytes too, or nothing is
    measured."""
    place = "the old lighthouse behind the seventh hill of the long northern road"
    options: dict = {"dataset": dataset, "examples": 4, "lengths": [4000]}
    if dataset not in GENERATED:
        file = tmp_path / "examples.jsonl"
        file.write_text(json.dumps({"context": "A text.", "input": "Where?", "answers": [place]}))
        options["path"] = str(file)
    right = {}

    def listening(prompt: str) -> str:
        return f" {right.get(prompt, place)}."

    for number in range(4 if dataset in GENERATED else 0):
        made = fitting(
            BYTE_TOKENIZER, dataset, [0, number], TEXT, 4000 - Documents(**options)._answer_tokens
        )
        right[bytes(made.tokens).decode()] = ", ".join(made.answers)
    metric = BENCHMARKS[dataset].metric
    if metric == "exact":
        with pytest.raises(UserError, match="tokens=64: an answer that scores has 69 tokens"):
            rows(tmp_path, listening, **options)
        options["tokens"] = 70
    (row,) = rows(tmp_path, listening, **options)
    assert metric in ("rouge", "f1") or row["score"] == 1
    if metric == "found":
        with pytest.raises(UserError, match=r"tokens=7: an answer that scores has \d+ tokens"):
            rows(tmp_path, listening, **options, tokens=7)


@pytest.mark.parametrize(("kind", "tokens"), zip(EVERY, (4, 2, 1, 1), strict=True))
def test_an_answer_of_one_token_behind_its_question_has_room_in_one(kind, tokens, tmp_path):
    """Also where a tokenizer puts a space before every text, which an answer is not."""
    assert Documents(dataset="babilong")._least_answer(opened(kind, tmp_path), ["the"]) == tokens


FILE = {"dataset": "qasper", "path": "examples.jsonl"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset": "qasper"}, "path=null: must be the file of dataset=qasper"),
        ({"dataset": "babilong", "truncate": "left"}, "truncate=left: dataset=babilong is gener"),
        ({"dataset": "babilong", "path": "x"}, "path=x: dataset=babilong is generated"),
        ({"dataset": "qasper", "path": __file__}, "is no file of records"),
        ({"dataset": "babilong", "shots_path": "x"}, "shots_path=x: dataset=babilong is generated"),
        ({"shots": 1, **FILE}, "shots_path=null: must be the training examples of dataset=qasper"),
        ({"shots_path": FILE["path"], **FILE}, "no demonstration is read with shots=0"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_opened(
    options, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples.jsonl").write_text("")
    with pytest.raises(UserError, match=said):
        Documents(**options).check()


def write_training(folder, count=3):
    file = folder / "training.jsonl"
    records = [
        {"context": f"Door {i}. " * 40, "input": f"Number {i}?", "answers": [f"no. {i}", "x"]}
        for i in range(count)
    ]
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return file


def test_demonstrations_come_before_the_question_and_are_counted(tmp_path):
    seen, file, training = [], write_file(tmp_path, 20), write_training(tmp_path)

    def listening(prompt: str) -> str:
        seen.append(prompt)
        return "short"

    options = {"dataset": "qasper", "path": str(file), "shots": 2, "shots_path": str(training)}
    (row,) = rows(tmp_path, listening, lengths=[2000], **options)
    assert (row["status"], row["shots_read"], row["shots_tokens_cut"]) == ("ok", 2, 0), row
    document = max(seen, key=len)
    places = [document.index(part) for part in ("Number 0?\nAnswer: no. 0", "Number 1?", "<0>")]
    assert places == sorted(places)
    assert "Number 2?" not in document
    assert document.endswith("What is it?\nAnswer:")
    (none,) = rows(tmp_path, listening, lengths=[2000], dataset="qasper", path=str(file))
    assert none["shots_read"] == 0
    assert Documents(**options).settings["task.documents.shots"] == 2
    write_training(tmp_path, 2)
    (other,) = rows(tmp_path, listening, lengths=[2000], **options)
    assert other["demonstrations"] != row["demonstrations"]


def test_a_summary_ends_where_the_model_begins_an_example_of_its_own(tmp_path):
    file, training = write_file(tmp_path, 20), write_training(tmp_path)
    options = {"dataset": "gov_report", "path": str(file), "lengths": [2000]}
    said = "Two lines.\n\nOf it.\n\nRead the text.\n\nMore"
    (plain,) = rows(tmp_path, lambda _: said, **options)
    assert plain["first_answer"] == said
    (row,) = rows(tmp_path, lambda _: said, shots=1, shots_path=str(training), **options)
    assert row["first_answer"] == "Two lines.\n\nOf it."


def test_demonstrations_are_not_the_examples_that_are_measured(tmp_path):
    file = write_file(tmp_path, 20)
    options = {"dataset": "qasper", "path": str(file), "lengths": [2000]}
    with pytest.raises(UserError, match="holds the very examples that are measured"):
        rows(tmp_path, lambda _: "", shots=1, shots_path=str(file), **options)
    shots = {"shots": 4, "shots_path": str(write_training(tmp_path))}
    with pytest.raises(UserError, match=r"shots=4: .* has 3 examples. Use fewer."):
        rows(tmp_path, lambda _: "", **shots, **options)


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
    words = ["task=quality", f"task.documents.path={file}", "task.documents.tokens=7"]
    assert import_module("zoo.cli.eval").main(["run=runs/run", *words, *options]) == 0
    (row,) = RunFolder.open("runs/run").rows()
    assert (row["dataset"], row["status"], row["cut"]) == ("quality", "ok", 0.5)
    assert [known["dataset"] for known in zoo.rows("runs/run")] == ["quality"]
    assert "QuALITY, exact match" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("score", [0.0, 1.0])
@pytest.mark.parametrize("examples", [1, 3])
def test_examples_that_all_agree_do_not_make_a_score_certain(score, examples, tmp_path):
    options = {"dataset": "variable_tracking", "lengths": [1200], "examples": examples}

    def right(prompt: str) -> str:
        return " ".join(part.split(" = ")[0] for part in prompt.split("VAR ") if " = " in part)

    (row,) = rows(tmp_path, right if score else lambda _: "nothing", **options)
    assert row["score"] == score
    assert row["interval"] == wilson(int(score) * examples, examples)


@pytest.mark.parametrize("score", [0.0, 0.2, 2 / 3, 1.0])
@pytest.mark.parametrize("rounding", [0.0, 6e-8])
@pytest.mark.parametrize("examples", [1, 2, 20])
def test_scores_that_are_alike_are_as_uncertain_as_answers_of_that_mean(score, rounding, examples):
    scores = [score] * (examples - 1) + [abs(score - rounding)]
    mean = sum(scores) / examples
    low, high = _interval(scores) or (mean, mean)
    assert 0 <= low <= mean <= high <= 1
    # The widest that scores of this mean can spread: all of them 0 or 1.
    ones = round(score * 3000)
    spread = interval([1.0] * ones + [0.0] * (3000 - ones)) or (0.0, 0.0)
    assert high - low >= (spread[1] - spread[0]) / 2
    assert high - low > 0.1


def test_scores_that_differ_have_students_interval():
    assert _interval([0.2] * 19 + [0.3]) == interval([0.2] * 19 + [0.3])
