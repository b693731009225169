"""The tests are tested: mistakes of one line each, all over the package, and none survives."""

import subprocess
import sys
from pathlib import Path

import pytest
from mutants import HERE, ROOT, Mutant, every, read

MUTANTS = every()


def test_every_mistake_still_fits_its_file():
    """The old text is there once, the new one is Python where the old one was, the tests exist."""
    assert len(MUTANTS) >= 80
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        changed = mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8"))
        assert mutant.old != mutant.new, mutant
        if mutant.file.endswith(".py"):
            compile(changed, mutant.file, "exec")
        files = [word.partition("::")[0] for word in mutant.tests if word.startswith("tests/")]
        assert files, mutant
        assert all((ROOT / file).is_file() for file in files), mutant


def test_mistakes_are_all_over_the_package():
    spread = {Path(mutant.file).parts[1] for mutant in MUTANTS if mutant.file.startswith("zoo/")}
    folders = {path.name for path in (ROOT / "zoo").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= spread


def test_another_form_of_a_mistake_is_refused(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("what\nzoo/x.py\n- a\n+ b\n")
    with pytest.raises(ValueError, match="not a mutant"):
        list(read(file))
    with pytest.raises(ValueError, match="is there 2 times"):
        Mutant("what", "zoo/x.py", "a", "b", (), "x.txt").applied("a a")


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(HERE.glob("*.txt")), ids=lambda file: file.stem)
def test_every_mistake_is_seen(file):
    command = [sys.executable, HERE / "mutants.py", file.name]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert found.returncode == 0, found.stdout
