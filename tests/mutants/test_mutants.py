"""The tests are tested: mistakes of one line each, all over the package, and none survives."""

import subprocess
import sys
import time
from pathlib import Path

import mutants
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


def test_tests_that_do_not_end_in_time_have_not_seen_a_mistake(monkeypatch, tmp_path):
    def waits(_tests: tuple[str, ...], _place: Path, printed: Path) -> int:
        printed.write_text("begun")
        time.sleep(60)
        return 1

    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/x.py").write_text("a")
    monkeypatch.setattr(mutants, "SECONDS", 0.5)
    monkeypatch.setattr(mutants, "_test", waits)
    late = Mutant("what", "zoo/x.py", "a", "b", (), "x.txt")
    assert mutants.run(late, tmp_path) == (mutants.LATE, "begun")
    assert mutants.VERDICTS[mutants.LATE] == "NO ANSWER IN TIME"
    assert (tmp_path / "zoo/x.py").read_text() == "a"


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(HERE.glob("*.txt")), ids=lambda file: file.stem)
def test_every_mistake_is_seen(file):
    command = [sys.executable, HERE / "mutants.py", file.name]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert found.returncode == 0, found.stdout
