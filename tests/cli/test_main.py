"""Every program begins in `zoo.__main__`."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from building import ROOT

from zoo.__main__ import PROGRAMS, main
from zoo.config.compose import composing
from zoo.config.groups import CONFIGS
from zoo.errors import FORM


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_package_explains_its_programs(flag, capsys):
    assert main([flag]) == 0
    out, error = capsys.readouterr()
    assert all(f"zoo {program} " in out for program in PROGRAMS)
    assert not error


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "tran": "zoo tran: unknown program. Did you mean 'train'? Use one of: train, tune, ",
        "": "zoo: unknown program. Use one of: train, tune, study, recipe, eval, compress, ",
        "doctor foo": "zoo doctor foo: must be `zoo doctor`, without arguments.",
        "list modles": "--list=modles: unknown kind. Did you mean 'models'? ",
        "train --list=models": "--list=models: unknown flag. See --help.",
        "train -h --list": "train.py: -h --list: -h prints the usage alone. Use -h alone.",
        "eval --list --help": "eval.py: --list --help: --help prints the usage alone. Use --help",
        "chat --list tasks -h": "zoo chat: --list tasks -h: -h prints the usage alone. Use -h",
        "training-free": "zoo training-free: no factor: must be one factor >= 1, such as 8.",
        "patterns /proc/x": "folder=/proc/x: cannot be written (/proc: No such file or directory)",
    }.items(),
)
def test_a_mistake_is_one_line_with_exit_code_2(words, message, capsys):
    assert main(words.split()) == 2
    out, error = capsys.readouterr()
    assert not out
    assert message in error
    assert error.count("\n") == 1


def method(name: str) -> list[str]:
    tree = yaml.safe_load((CONFIGS / "compress" / f"{name}.yaml").read_text())["method"]
    return [f"method.{key}" for key, value in tree.items() if isinstance(value, int | float)]


BY = "by=gone rate=0.5 question=Why? instruction=Say"
NUMBERS = {  # options of each program that are numbers, beside words that go well with them
    "shrink": ("run=gone", ["rank", "sparsity"]),
    "compress": ("file=text.txt method=truncation", ["rate", "tokens"]),
    "compress ": (f"file=text.txt method=llmlingua {BY}", method("llmlingua")),
    "compress  ": (f"file=text.txt method=longllmlingua {BY}", method("longllmlingua")),
    "chat": ("run=gone", ["tokens", "temperature", "top_p", "seed", "extension.factor"]),
    "recipe": (
        "yarn_twice data=text data.path=gone",
        ["size.heads", "seq_len", "trainer.max_steps", "optim.lr", "seed", "extension.factor"],
    ),
    "tune": ("model=xpos data=text data.path=gone", ["size.heads", "seq_len", "optim.lr", "seed"]),
    "train": ("model=learned data=text data.path=gone", ["seq_len", "size.heads", "size.width"]),
    "patterns": ("extension=dca", ["extension.attention.chunk", "extension.factor"]),
    "paper": ("dca_pg19 checkpoint=gone data.path=gone", ["lengths", "threads"]),
    "eval": ("run=gone", ["task.perplexity.stride", "threads", "sequence_parallel"]),
}
NONE = ("-1", "-1e-9", "-1e30", "nan", "inf", "abc", "")  # values that no number has
RARE = ("0", "1e-9")  # that some have


@pytest.mark.parametrize("program", NUMBERS)
def test_a_number_that_cannot_be_is_refused_as_the_option_that_was_given(
    program, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A text. And more of it.")
    words, options = NUMBERS[program]
    cases = itertools.product(options, NONE + RARE)
    with composing("train"):  # reads the YAML files once
        codes = {
            (option, value): (
                main([program.strip(), *words.split(), f"{option}={value}"]),
                capsys.readouterr().err.splitlines(),
            )
            for option, value in cases
        }
    for (option, value), (code, lines) in codes.items():
        if value in RARE and not (len(lines) == 1 and f"{option}=" in lines[0]):
            continue  # it is such a number: something that is not there was refused, or nothing
        assert code == 2, (option, value)
        (line,) = lines
        said = line[line.index(option) :]
        assert said.startswith(f"{option}={value}: "), line
        assert FORM.fullmatch(said), line
    assert {*Path().iterdir()} <= {Path("text.txt"), Path(".data")}


# What these do without a word is their plain form; each has a test of its own.
ALONE = {"train", "study", "doctor", "list", "report", "patterns"}


@pytest.mark.parametrize("program", sorted({*PROGRAMS} - ALONE))
def test_a_program_without_the_words_it_needs_is_refused_in_one_line(program, capsys):
    assert main([program]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.count("\n") == 1
    assert re.search(r"must be|is needed", error)


def test_doctor_explains_itself(capsys):
    assert main(["doctor", "--help"]) == 0
    assert "backend" in capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_explains_itself(program, capsys):
    assert main([program, "--help"]) == 0
    out, error = capsys.readouterr()
    assert program in out or f"{program}.py" in out
    assert not error


@pytest.mark.parametrize("program", ["", *PROGRAMS])
def test_help_beside_other_words_is_refused(program, capsys):
    for words in (["--help", "extra"], ["-h", "seed=1"], ["--help", "--help"]):
        assert main([*program.split(), *words]) == 2
        out, error = capsys.readouterr()
        assert not out
        assert f"{' '.join(words)}: {words[0]} prints the usage alone." in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("program", ["", *PROGRAMS])
def test_every_program_runs_where_its_output_is_closed(program, monkeypatch):
    for words, code in ((["--help"], 0), (["--help", "extra"], 2)):
        monkeypatch.setattr("sys.stdout", None)
        monkeypatch.setattr("sys.stderr", None)
        assert main([*program.split(), *words]) == code


def test_a_process_that_begins_without_streams_gives_their_numbers_to_no_file():
    code = "import os, sys; from zoo.__main__ import main; main(['list', 'sizes']); "
    code += "sys.exit(0 if os.open('.', os.O_RDONLY) > 2 else 1)"
    words = [sys.executable, "-c", code]
    shell = 'exec "$@" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell, "sh", *words], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("flag", ["--cfg hydra", "-sc install=bash"])
def test_hydras_own_flags_work_behind_the_programs_name(flag):
    words = [sys.executable, "-m", "zoo", "train", *flag.split()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("trainer.foo=1", False),
        ("data.passkey=0.5 data=recall", False),
        ("trainer.max_step=1", True),
        ("sed=1", True),
    ],
)
def test_only_a_near_name_is_offered(words, hint, capsys):
    assert main(["train", *words.split()]) == 2
    assert ("Did you mean" in capsys.readouterr().err) is hint
