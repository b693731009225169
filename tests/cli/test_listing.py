"""What can be chosen is listed in lines that the YAML files begin with."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.cli.listing import KINDS, listing, summary
from zoo.errors import UserError

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("configs/*/*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_yaml_begins_with_one_line_that_says_what_it_is(file):
    line = summary(file)
    assert 20 <= len(line) <= 90
    assert line[0].isupper() or line.startswith(("k-hop", "cosFormer"))
    assert line.endswith(".")


def test_every_choice_is_listed_with_its_line():
    output = listing()
    for kind, group in KINDS.items():
        assert f"{kind}: {'zoo recipe ' if kind == 'recipes' else f'{group}='}<name>" in output
        for file in ROOT.glob(f"configs/{group}/*.yaml"):
            assert any(
                line.split(maxsplit=1) == [file.stem, summary(file)] for line in output.splitlines()
            )
    assert "mamba2" not in listing(["tasks"])
    with pytest.raises(UserError, match=r"^--list=modles: unknown kind. Did you mean 'models'\?"):
        listing(["modles"])


@pytest.mark.parametrize(
    "words",
    [("train.py", "--list"), ("eval.py", "--list", "tasks"), ("-m", "zoo", "list")],
    ids=str,
)
def test_the_list_comes_at_once(words, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert not done.stderr
    assert done.stdout == listing(words[2:] if words[0] == "eval.py" else ())
