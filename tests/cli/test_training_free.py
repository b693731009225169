"""The extensions that a trained rotary model can be read under without further training."""

import pytest
from building import MODEL_OF

from zoo.__main__ import main
from zoo.config.compose import compose


def test_each_line_is_options_of_eval_and_none_trains(capsys):
    assert main(["training-free", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "extension=none"
    assert {"extension=dca", "extension=pi extension.factor=8"} <= {*lines}
    names = [line.partition(" ")[0].removeprefix("extension=") for line in lines]
    assert not {"pose", "randomised", "clex", "longrope", *MODEL_OF} & {*names}
    for line in lines:
        assert compose("eval", ["run=x", *line.split()]).extension.positions is None


@pytest.mark.parametrize("words", ["", "8 4", "0.5", "long", "nan"])
def test_anything_but_one_factor_is_refused_in_one_line(words, capsys):
    assert main(["training-free", *words.split()]) == 2
    assert capsys.readouterr().err.endswith("must be one factor >= 1, such as 8.\n")


def test_a_factor_that_no_extension_takes_is_refused_and_drops_none_in_silence(capsys):
    assert main(["training-free", "2000000"]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("extension.factor=2000000: must be")
