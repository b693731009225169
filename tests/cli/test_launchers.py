"""Sweeps by launchers that run arms side by side: each line says which arm it speaks of."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ["size=tiny", "logger=none", "seq_len=32", "batch_size=2", "trainer.max_steps=2"]
SHORT += ["valid_windows=2", "optim.warmup_steps=1", "threads=1"]

pytestmark = pytest.mark.slow


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), "-m", "seed=0,1", *words, *SHORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def check_table(lines: list[str]) -> None:
    """The last lines are the table of both arms, with their losses."""
    assert re.fullmatch(r"arm  options  seed  valid loss  folder", lines[-3])
    for number, line in enumerate(lines[-2:]):
        assert re.fullmatch(rf"{number + 1} +{number} +\d\.\d{{4}} +runs/\S+", line)


def test_joblib_labels_the_lines_of_arms_side_by_side(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = sweep(tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for number in (1, 2):
        own = [line for line in lines if line.startswith(f"[{number}/2] ")]
        assert own[0].startswith(f"[{number}/2] seed={number - 1} size=tiny")
        assert any("training transformer for 2 steps" in line for line in own)
    assert not [line for line in lines[:-3] if not re.match(r"\[[12]/2\] ", line)]
    check_table(lines)


def test_submitit_says_each_job_and_where_its_logs_are(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = sweep(tmp_path, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    matches = [re.fullmatch(r"job (\d+): logs in (runs/\.sweeps/\S+)", line) for line in lines[:-3]]
    assert len(matches) == 2
    said = []
    for match in matches:
        assert match
        assert match[2].endswith(match[1])
        said += [log.read_text() for log in (tmp_path / match[2]).glob("*_log.err")]
    assert sorted(text[:12] for text in said) == ["[1/2] seed=0", "[2/2] seed=1"]
    check_table(lines)
