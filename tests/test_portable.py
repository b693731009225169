"""What only Unix has is used where it is, and nothing depends on a system's own encoding."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from zoo import locks
from zoo.ops.runtime import build, cuda

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("zoo/**/*.py"), ROOT / "train.py", ROOT / "eval.py"])

# Hides Unix's modules from the package alone (asyncio, for one, takes fcntl on Linux), imports all
# of it, and locks a file by a stand-in for Windows's call.
WITHOUT_UNIX = """
import builtins, fcntl, importlib, sys, types
from pathlib import Path

UNIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
true_import = builtins.__import__

def hiding(name, globals=None, *others, **more):
    if name in UNIX and str((globals or {}).get("__name__")).split(".")[0] == "zoo":
        raise ImportError(f"no module {name} here")
    return windows if name == "msvcrt" and globals["__name__"] == "zoo.locks" else true_import(
        name, globals, *others, **more
    )

builtins.__import__ = hiding
def locking(file, mode, count):
    assert (mode, count) == (2, 1)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
windows = types.SimpleNamespace(LK_NBLCK=2, locking=locking)

root = Path(sys.argv[1])
for source in sorted(root.glob("zoo/**/*.py")):
    name = ".".join(source.relative_to(root).with_suffix("").parts)
    if not name.endswith(("__main__", "__init__")):
        importlib.import_module(name)

import zoo.locks
from zoo.cli.train import check
from zoo.config.compose import compose_tree, composing, parse
from zoo.errors import UserError
from zoo.runs.claim import claim
from zoo.runs.folder import RunFolder

assert zoo.locks.fcntl is None
with composing("train"):
    config = check(compose_tree("train", parse(["size=tiny", f"runs={sys.argv[2]}"])), [])
folder = claim(config)
with folder.lock():
    try:
        with RunFolder.open(folder.path).lock():
            print("locked twice")
    except UserError as error:
        print(error)
"""


def test_the_package_imports_and_locks_a_run_where_unix_modules_are_missing(tmp_path):
    words = [sys.executable, "-c", WITHOUT_UNIX, str(ROOT), str(tmp_path / "runs")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is already being trained by process" in done.stdout


def test_a_lock_that_is_waited_for_is_taken_when_it_is_free(tmp_path, monkeypatch):
    answers = [False, False, True]
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "PAUSE", 0)
    monkeypatch.setattr(locks, "_lock_byte", lambda _: answers.pop(0))
    with open(tmp_path / "lock", "w", encoding="utf-8") as file:
        locks.lock_file(file, wait=True)
        assert not answers
        answers[:] = [False]
        with pytest.raises(BlockingIOError):
            locks.lock_file(file, wait=False)


def test_kernels_are_refused_in_one_line_on_windows(monkeypatch):
    with monkeypatch.context() as windows:
        windows.setattr(sys, "platform", "win32")
        with pytest.raises(build.BuildError, match=r"^the C kernels are built on Linux and macOS"):
            build.compiler.__wrapped__()
        with pytest.raises(build.BuildError, match=r"^the CUDA kernels are launched on Linux"):
            cuda.driver.__wrapped__()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_text_is_read_and_written_as_utf8(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        named = any(keyword.arg == "encoding" for keyword in node.keywords)
        if method and name in ("read_text", "write_text"):
            assert named, f"{path.name}:{node.lineno} {name} without an encoding"
        if name == "open" and not method and len(node.args) > 1:
            mode = node.args[1]
            binary = isinstance(mode, ast.Constant) and "b" in mode.value
            assert named or binary, f"{path.name}:{node.lineno} open without an encoding"
