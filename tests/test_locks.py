"""Locks that go with the process that holds them."""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from building import ROOT

from zoo.errors import UserError
from zoo.locks import alone_on_machine, fcntl

pytestmark = pytest.mark.skipif(fcntl is None, reason="Windows has no locks of folders")

HOLD = """
import sys, time
from pathlib import Path
from zoo.locks import alone_on_machine
with alone_on_machine(Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@contextmanager
def holder(group: Path) -> Iterator[subprocess.Popen]:
    """A process that is alone for a group, and stays so."""
    command = [sys.executable, "-c", HOLD, str(group)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        try:
            yield process
        finally:
            process.kill()


def test_one_at_a_time_is_alone_on_the_machine(tmp_path):
    inside, most = 0, 0

    def enter() -> None:
        nonlocal inside, most
        for _ in range(5):  # who comes back finds that the file is gone, or another one
            with alone_on_machine(tmp_path):
                inside += 1
                most = max(most, inside)
                time.sleep(0.01)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not [*tmp_path.iterdir()]


def test_a_process_that_is_killed_lets_the_next_of_its_group_in_and_others_need_not_wait(tmp_path):
    entered, waiting = [], threading.Event()

    def enter() -> None:
        waiting.set()
        with alone_on_machine(tmp_path / "run"):
            entered.append(process.poll())

    with holder(tmp_path / "run") as process:
        with alone_on_machine(tmp_path / "other"):
            assert process.poll() is None
        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        waiting.wait()
        time.sleep(0.1)
        assert not entered
        process.kill()
        thread.join(timeout=10)
    assert len(entered) == 1
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with (
        pytest.raises(UserError, match=r"^TMPDIR=.*none: must be a folder that can be locked \("),
        alone_on_machine(tmp_path),
    ):
        pass
