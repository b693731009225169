"""Seeded mistakes: one line of the package changed as a tired engineer would, and who sees it.

The `.txt` files beside this one hold them, one a paragraph:

    what is wrong
    file
    - what is there once
    + what is there instead
    ? the tests that must fail, as words of pytest

`python tests/mutants/mutants.py [word ...]` tries those whose name, path and file here hold all of
the words, each in a copy of the package, and prints which no test has seen.
"""

import functools
import importlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = ("zoo", "configs", "kernels", "tests", "train.py", "eval.py", "pyproject.toml", "README.md")
SECONDS = 240
LATE = 124  # the exit code of tests that have not ended by then
VERDICTS = {1: "seen", 0: "SURVIVED", LATE: "NO ANSWER IN TIME"}


@dataclass(frozen=True)
class Mutant:
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    source: str  # the file beside this one that holds it

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"

    def applied(self, source: str) -> str:
        """The file's text with the mistake in it. ValueError unless the old text is there once."""
        if source.count(self.old) != 1:
            raise ValueError(f"{self}: {self.old!r} is there {source.count(self.old)} times")
        return source.replace(self.old, self.new)


def read(file: Path) -> Iterator[Mutant]:
    """The mutants of one file. ValueError for a paragraph of another form."""
    for paragraph in file.read_text(encoding="utf-8").strip().split("\n\n"):
        lines = paragraph.split("\n")
        if len(lines) != 5 or [line[:2] for line in lines[2:]] != ["- ", "+ ", "? "]:
            raise ValueError(f"{file.name}: not a mutant:\n{paragraph}")
        what, path, old, new, tests = lines
        yield Mutant(what, path, old[2:], new[2:], tuple(shlex.split(tests[2:])), file.name)


def every() -> list[Mutant]:
    """All of them, file by file."""
    return [mutant for file in sorted(HERE.glob("*.txt")) for mutant in read(file)]


@contextmanager
def copy() -> Iterator[Path]:
    """A copy of what the tests need, which goes when the caller is done."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        for part in PARTS:
            source, target = ROOT / part, Path(place) / part
            skip = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(source, target, ignore=skip) if source.is_dir() else shutil.copy(
                source, target
            )
        yield Path(place)


def run(mutant: Mutant, place: Path) -> tuple[int, str]:
    """pytest's exit code on the mutant's tests in that copy, and what it printed.

    1 is a mistake seen; 0 is one that survived; any other, as LATE, that its tests could
    not judge.
    """
    file = place / mutant.file
    whole = file.read_text(encoding="utf-8")
    file.write_text(mutant.applied(whole), encoding="utf-8")
    try:
        return tested(mutant.tests, place)
    finally:
        file.write_text(whole, encoding="utf-8")


def tested(tests: tuple[str, ...], place: Path) -> tuple[int, str]:
    """pytest's exit code and what it printed, of a fork of this process.

    It has imported what takes long, and nothing of the package.
    """
    printed = place / "printed.txt"
    child = os.fork()
    if not child:
        os._exit(_test(tests, place, printed))
    code = _wait(child)
    return code, printed.read_text(encoding="utf-8")


def _test(tests: tuple[str, ...], place: Path, printed: Path) -> int:
    import pytest

    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(place)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(place))
    words = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", f"--rootdir={place}", "-Wignore"]
    code = int(pytest.main([*words, "-c", f"{place}/pyproject.toml", *tests]))
    sys.stdout.flush()
    return code


def _wait(child: int) -> int:
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - began > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return LATE
        time.sleep(0.02)


def main(words: list[str]) -> int:
    for heavy in ("torch", "lightning", "hydra", "pydantic", "hypothesis", "jaxtyping"):
        importlib.import_module(heavy)
    assert "zoo" not in sys.modules
    left = 0
    mutants = [m for m in every() if all(word in f"{m} {m.source}" for word in words)]
    with copy() as place:
        without = functools.cache(functools.partial(tested, place=place))
        for mutant in mutants:
            began = time.monotonic()
            code, output = run(mutant, place)
            verdict = VERDICTS.get(code, f"UNDECIDED ({code})")
            if (clean := without(mutant.tests))[0]:
                why = VERDICTS[LATE] if clean[0] == LATE else clean[0]
                code, output, verdict = -1, clean[1], f"FAILS WITHOUT IT ({why})"
            left += code != 1
            last = "" if code == 1 else "\n" + "\n".join(output.splitlines()[-12:])
            sys.stdout.write(f"{verdict:10} {time.monotonic() - began:4.0f} s  {mutant}{last}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{left} not seen\n")
    return left > 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.remove(str(HERE))
    sys.exit(main(sys.argv[1:]))
