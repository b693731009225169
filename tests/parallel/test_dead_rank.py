"""A run whose rank dies says which, keeps what it saved, and goes on from there.

One whose rank is slow waits for it. Ranks that cannot work together say why in a line.
"""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from building import ROOT, write_text

from zoo.runs.folder import RunFolder

STEPS = 40
WORDS = [
    *("model=mamba", "size=tiny", "data=text", "data.path=text", "logger=none", "match=none"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "seq_len=33", "batch_size=2"),
    *("valid_windows=2", "save_every=2", f"trainer.max_steps={STEPS}", "allocator=system"),
    "trainer.log_every_n_steps=1",
]
SLOW = 2.0  # seconds that a rank does nothing


def losses(folder: Path) -> list[str]:
    with open(folder / "metrics.csv") as file:
        return [row["train_loss"] for row in csv.DictReader(file)]


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_ranks_that_cannot_work_together_say_why_in_a_line():
    command = [sys.executable, str(Path(__file__).with_name("meet.py"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    versions, taken, port = done.stdout.splitlines()
    assert versions.startswith("process 2 of 2 has torch 2.1 and the first 2.0: install the same")
    assert taken.startswith(f"port {port}, by which its processes meet, was taken by another")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    ("how", "lost"), [("trainer.sequence_parallel=2", 2), ("trainer=ddp", 1), ("trainer=fsdp", 2)]
)
def test_a_dead_rank_ends_the_run_in_one_line_and_it_goes_on(how, lost, tmp_path):
    write_text(tmp_path)
    command = [sys.executable, str(ROOT / "train.py"), *WORDS, how]
    done = subprocess.run([*command, "name=whole"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [*command, "name=broken"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if re.match(r"step \d+/", line):
            rank = sorted(children(process.pid))[lost - 1]
            os.kill(rank, signal.SIGSTOP)
            time.sleep(SLOW)
            assert process.poll() is None  # the other rank waits
            os.kill(rank, signal.SIGCONT)
            time.sleep(0.05)  # a step or two
            os.kill(rank, signal.SIGKILL)
            break
    said += process.stderr.readlines()
    assert process.wait() == 1, said
    run = RunFolder.open(tmp_path / "runs/broken")
    assert run.info["status"] == "failed"
    assert run.info["reason"].startswith(f"process {lost} of 2 was ended by SIGKILL")
    assert said[-1].startswith(f"train.py: process {lost} of 2 was ended by SIGKILL"), said
    assert not any("Traceback" in line for line in said), said
    done = subprocess.run([*command, "name=broken"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "runs/broken") == losses(tmp_path / "runs/whole")
