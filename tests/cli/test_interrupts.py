"""Ctrl-C at any moment of a training ends it soon and in order, with nothing half-written."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zoo.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
WITHIN = 10  # seconds from the signal to the end


def interrupted(folder: Path, after: float, *words: str) -> tuple[int, str, float]:
    """Exit code, what was said and the seconds it took to end, of a training stopped by SIGINT."""
    command = [sys.executable, str(ROOT / "train.py"), "model=mamba", "size=tiny", "logger=none"]
    program = subprocess.Popen(
        [*command, *words],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(after)
    start = time.monotonic()
    program.send_signal(signal.SIGINT)
    try:
        said = program.communicate(timeout=3 * WITHIN)[1]
    except subprocess.TimeoutExpired:
        program.kill()
        said = f"hangs: {program.communicate()[1]}"
    return program.returncode, said, time.monotonic() - start


def check_end(folder: Path, code: int, said: str, seconds: float) -> None:
    ours = "Traceback" in said and "/zoo/" in said  # before it the interpreter's own start is cut
    assert not ours, said
    assert code in (130, -signal.SIGINT) or "site" in said or "importlib" in said, said
    assert seconds < WITHIN, said
    assert not list(folder.rglob(".*.tmp"))
    for record in folder.glob("runs/*/run.json"):
        run = RunFolder.open(record.parent)
        assert run.info["status"] == "stopped", run.info
        with run.lock():
            pass


def test_ctrl_c_while_modules_load_is_one_line(tmp_path):
    code, said, seconds = interrupted(tmp_path, 0.4)
    check_end(tmp_path, code, said, seconds)
    assert said.count("\n") <= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_ctrl_c_at_any_time_ends_a_training_in_order(seed, tmp_path):
    code, said, seconds = interrupted(tmp_path, random.Random(seed).uniform(0, 12), "threads=1")
    check_end(tmp_path, code, said, seconds)
