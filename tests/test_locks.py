"""Locks that go with the process that holds them."""

import subprocess
import sys
import tempfile
import threading
import time

import pytest
from building import ROOT

from zoo.errors import UserError
from zoo.locks import alone_on_machine, fcntl

pytestmark = pytest.mark.skipif(fcntl is None, reason="Windows has no locks of folders")

HOLD = """
import time
from zoo.locks import alone_on_machine
with alone_on_machine():
    print("inside", flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_one_at_a_time_is_alone_on_the_machine():
    inside, most = 0, 0

    def enter() -> None:
        nonlocal inside, most
        with alone_on_machine():
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


def test_a_process_that_is_killed_lets_the_next_in():
    command = [sys.executable, "-c", HOLD]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    entered, waiting = [], threading.Event()

    def enter() -> None:
        waiting.set()
        with alone_on_machine():
            entered.append(holder.poll())

    with holder:
        assert holder.stdout.readline() == "inside\n"
        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        waiting.wait()
        time.sleep(0.1)
        assert not entered
        holder.kill()
        thread.join(timeout=10)
    assert len(entered) == 1


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with (
        pytest.raises(UserError, match=r"^TMPDIR=.*none: must be a folder that can be locked \("),
        alone_on_machine(),
    ):
        pass
