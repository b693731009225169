"""What every program that reads its own words refuses, whatever its options are."""

import pytest

from zoo.cli import compress, export, report

PROGRAMS = {"compress": compress, "export": export, "report": report}
OPTIONS = [(name, option) for name, program in PROGRAMS.items() for option in program.OPTIONS]


@pytest.mark.parametrize(("program", "option"), OPTIONS)
def test_an_option_that_is_misspelt_repeated_or_empty_is_refused_by_name(
    program, option, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    for words, said in {
        (f"{option}x=1",): f"{option}x=1: unknown option. Did you mean '",
        (f"{option}=1", f"{option}=2"): f"{option}=2: {option} is given twice.",
        (f"{option}=",): f"{option}=: is empty.",
    }.items():
        assert PROGRAMS[program].main(words) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"zoo {program}: {said}")
    assert not list(tmp_path.iterdir())
