"""`zoo rankings` reads what two evaluations left, and refuses in one line what it cannot."""

import pytest

from zoo.__main__ import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "run=: must be given. See zoo rankings --help."),
        ("run=x task=y", "task=y: unknown task"),
        ("run=x runs=nowhere", "runs=nowhere: must be a folder that is there."),
        ("run=nowhere", "nowhere"),
        ("run=x of=y", "of=y: unknown option"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["rankings", *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
