"""A run whose rank dies says which, keeps what it saved, and goes on from there."""

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from building import ROOT, write_text

from zoo.runs.folder import RunFolder

STEPS = 40
WORDS = [
    *("model=mamba", "size=tiny", "data=text", "data.path=text", "logger=none", "match=none"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "seq_len=33", "batch_size=2"),
    *("valid_windows=2", "save_every=2", f"trainer.max_steps={STEPS}", "allocator=system"),
    *("trainer.log_every_n_steps=1", "trainer.sequence_parallel=2"),
]


def losses(folder: Path) -> list[str]:
    with open(folder / "metrics.csv") as file:
        return [row["train_loss"] for row in csv.DictReader(file)]


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
def test_a_dead_rank_ends_the_run_in_one_line_and_it_goes_on(tmp_path):
    write_text(tmp_path)
    command = [sys.executable, str(ROOT / "train.py"), *WORDS]
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
            os.kill(max(children(process.pid)), signal.SIGKILL)
            break
    said += process.stderr.readlines()
    assert process.wait() == 1, said
    run = RunFolder.open(tmp_path / "runs/broken")
    assert run.info["status"] == "failed"
    assert run.info["reason"].startswith("process 2 of 2 was ended by SIGKILL")
    assert said[-1].startswith("train.py: process 2 of 2 was ended by SIGKILL"), said
    assert not any("Traceback" in line for line in said), said
    done = subprocess.run([*command, "name=broken"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "runs/broken") == losses(tmp_path / "runs/whole")
