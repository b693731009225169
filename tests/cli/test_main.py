"""Every program begins in `zoo.__main__`."""

import pytest

from zoo.__main__ import PROGRAMS, main


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_package_explains_its_programs(flag, capsys):
    assert main([flag]) == 0
    out, error = capsys.readouterr()
    assert all(f"zoo {program} " in out for program in PROGRAMS)
    assert not error


@pytest.mark.parametrize(
    ("words", "told"),
    {
        "tran": "zoo tran: unknown program. Did you mean 'train'? Use one of: train, tune, ",
        "": "zoo: unknown program. Use one of: train, tune, study, eval, list, training-free, ",
        "doctor foo": "zoo doctor foo: must be `zoo doctor`, without arguments.",
        "list modles": "--list=modles: unknown kind. Did you mean 'models'? ",
        "train --list=models": "--list=models: unknown flag. See --help.",
    }.items(),
)
def test_a_mistake_is_one_line_with_exit_code_2(words, told, capsys):
    assert main(words.split()) == 2
    out, error = capsys.readouterr()
    assert not out
    assert told in error
    assert error.count("\n") == 1


def test_doctor_explains_itself(capsys):
    assert main(["doctor", "--help"]) == 0
    assert "backend" in capsys.readouterr().out
