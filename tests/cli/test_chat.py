"""`zoo chat`: line by line, from one state."""

import io
import logging

import pytest
import torch
from building import train_on_text

import zoo
from zoo.__main__ import main
from zoo.cli.chat import OPTIONS
from zoo.cli.guard import held_back, log_plainly


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("chat")
    model = ["model=mamba", "batch_tokens=64", "trainer.max_steps=1"]
    train_on_text(folder, *model, f"runs={folder}", "name=x")
    return str(folder / "x")


def test_each_line_is_added_to_the_text(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    capsys.readouterr()
    assert main(["chat", f"run={run}", "tokens=5", "device=cpu"]) == 0
    said = capsys.readouterr()
    model, written = zoo.load(run, device="cpu"), []
    for line in ("one\n", "", "two\n"):
        text = "one\n" + "".join(written[:1]) if line == "" else line
        text = "one\n" + written[0] + written[1] + line if line == "two\n" else text
        written.append(model.generate(text, tokens=5))
    assert said.out == "".join(f"{piece}\n" for piece in written)
    assert "[5 tokens, " in said.err
    assert "text 23, state " in said.err


def test_random_numbers_go_on_from_reply_to_reply(run, monkeypatch, capsys):
    draws: list[int] = []

    def start(self):
        generator = torch.Generator().manual_seed(self.seed)

        def draw(_):
            draws.append(int(torch.randint(0, 256, (1,), generator=generator)))
            return 65

        return draw

    monkeypatch.setattr("zoo.model.generation.Sampling.start", start)
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n"))
        assert main(["chat", run, "tokens=8", "temperature=1", "seed=3", "device=cpu"]) == 0
    first, second, *again = [draws[i : i + 8] for i in range(0, 32, 8)]
    assert first != second
    assert again == [first, second]


def test_what_modules_log_waits_for_the_end_of_a_text(capsys):
    log_plainly()
    with held_back():
        logging.getLogger("zoo").info("attend runs on its native backend")
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err == "attend runs on its native backend\n"
    logging.getLogger("zoo").info("at once")
    assert capsys.readouterr().err == "at once\n"


def test_the_end_of_a_document_is_not_counted_as_written(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    monkeypatch.setattr("zoo.model.generation.Sampling.start", lambda _: lambda _: 0)
    assert main(["chat", run, "tokens=5", "device=cpu"]) == 0
    assert "[0 tokens, " in capsys.readouterr().err


@pytest.mark.parametrize("option", [*OPTIONS[2:], "extension.factor"])
def test_an_option_given_twice_is_named_as_it_was_given(option, capsys):
    assert main(["chat", "run=gone", f"{option}=1", f"{option}=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"zoo chat: {option}=2: {option} is given twice. Give each option once."


def test_output_may_be_closed(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert main(["chat", run, "tokens=5", "device=cpu"]) == 0


def test_a_place_may_have_an_equals_sign_and_input_may_be_closed(run, tmp_path, monkeypatch):
    (tmp_path / "a=b").symlink_to(run)
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", str(tmp_path / "a=b"), "device=cpu"]) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "zoo chat: no place: must be one run or checkpoint. Give it as run=<folder>."),
        (["run="], "zoo chat: run=: must be one run or checkpoint."),
        (["run=RUN", "checkpoint=b"], "zoo chat: run=RUN checkpoint=b: must be one run or check"),
        (["RUN", "temperature=-1"], "zoo chat: temperature=-1: must be a number from 0 to 1000."),
        (["RUN", "top_k=4"], "zoo chat: top_k=4: unknown option. Did you mean 'top_p'?"),
        (["RUN", "stop=[x,'']"], "zoo chat: stop="),
        (["RUN", "prompt=[x,y]"], "zoo chat: prompt=[x,y]: must be one text."),
        *[
            (
                ["RUN", f"prompt={value}"],
                f"zoo chat: prompt={value}: must be one text. Quote what is read",
            )
            for value in ("3", "null", "true", "1.5")
        ],
        (
            ["RUN", "prompt=${seq_len}"],
            "zoo chat: prompt=${seq_len}: ${..} has the value of an option, ",
        ),
        (["RUN", "stop=[${x}]"], "zoo chat: stop=[${x}]: ${..} has the value of an option, "),
        (["nowhere"], "zoo chat: nowhere: is no run and no checkpoint."),
    ],
)
def test_a_mistake_is_one_line(run, words, line, capsys):
    assert main(["chat", *(run if word == "RUN" else word for word in words)]) == 2
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert said.startswith(line)
