"""Every option that names a file or folder to be written is refused where that cannot be.

Before anything is read or measured, in one line, and nothing is left behind.
"""

import importlib
import itertools
import os
from pathlib import Path

import pytest
from building import ROOT, files_below

from zoo.cli import patterns
from zoo.config.schema.eval import EvalConfig
from zoo.errors import UserError

# What each program needs beside: options that would fail later, of a run that is not there.
PROGRAMS = {
    "eval": ["run=none"],
    "report": ["run=none"],
    "compress": ["file=text.txt", "method=truncation", "rate=0.5"],
    "export": ["run=none"],
    "shrink": ["run=none", "rank=4"],
}
READ = {"file", "run", "runs", "by", "wandb"}  # paths that are read
WRITTEN = {"to", "html", "marked", "report", "publish"}


def outputs() -> list[tuple[str, str]]:
    """Every program and option of it that names what it writes."""
    found = [("eval", name) for name in EvalConfig.model_fields if name in WRITTEN]
    for path in sorted((ROOT / "zoo/cli").glob("*.py")):
        module = importlib.import_module(f"zoo.cli.{path.stem}")
        options = [*getattr(module, "OPTIONS", ())]
        found += [(path.stem, name) for name in options if name in WRITTEN]
    return found


def test_every_option_that_is_a_path_is_known_as_read_or_written():
    paths = {
        name
        for name, field in EvalConfig.model_fields.items()
        if "file" in (field.description or "").split()
    }
    assert paths <= READ | WRITTEN, paths
    assert {program for program, _ in outputs()} == {*PROGRAMS}


@pytest.mark.parametrize(("program", "option"), outputs())
@pytest.mark.parametrize("place", ["text.txt/new", "text.txt/further/new"])
def test_what_cannot_be_written_is_refused_first(
    program, option, place, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some words of a text")
    words = [*PROGRAMS[program], f"{option}={place}"]
    before = files_below(tmp_path)
    code = importlib.import_module(f"zoo.cli.{program}").main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2, line
    assert f"{option}={place}: " in line
    assert "cannot be written" in line or "must be in a folder that is there" in line
    assert files_below(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
@pytest.mark.parametrize(("program", "option"), outputs())
def test_a_pipe_is_not_waited_for(program, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some words of a text")
    os.mkfifo("pipe")
    words = [*PROGRAMS[program], f"{option}=pipe"]
    assert importlib.import_module(f"zoo.cli.{program}").main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pipe" in line or "none: there is no such run folder" in line
    assert Path("pipe").is_fifo()


def test_one_file_is_not_written_for_two_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some words of a text")
    for program, words in PROGRAMS.items():
        several = [option for name, option in outputs() if name == program]
        for one, other in itertools.combinations(several, 2):
            main = importlib.import_module(f"zoo.cli.{program}").main
            assert main([*words, f"{one}=x", f"{other}=./x"]) == 2
            assert f"is the file of {one}= as well" in capsys.readouterr().err


def test_a_folder_of_drawings_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patterns, "sheets", lambda: pytest.fail("drawn first"))
    Path("text.txt").write_text("a")
    with pytest.raises(UserError, match=r"^folder=.*: cannot be written"):
        patterns.main(["text.txt/further"])
