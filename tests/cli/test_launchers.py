"""Sweeps by launchers that run arms side by side: each line says which arm it speaks of."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from zoo.cli import launch
from zoo.cli.train import main
from zoo.config.compose import compose_groups, composing, parse
from zoo.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
SHORT = ["size=tiny", "logger=none", "seq_len=32", "batch_size=2", "trainer.max_steps=2"]
SHORT += ["valid_windows=2", "optim.warmup_steps=1", "threads=1"]


@pytest.fixture
def plugins():
    """Skips where Hydra's launchers are not installed."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), "-m", *words, *SHORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize("jobs", ["0", "1.5", "null", "foo"])
def test_a_number_of_runs_that_joblib_would_not_take_is_refused(jobs, capsys):
    words = ["-m", "launcher=local", "seed=0,1", f"hydra.launcher.n_jobs={jobs}", *SHORT]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"train.py: hydra.launcher.n_jobs={jobs}: ")
    assert said.count("\n") == 1


def check_table(lines: list[str]) -> None:
    """The last lines are the table of both arms, with their losses."""
    assert re.fullmatch(r"arm  options  seed  valid loss  folder", lines[-3])
    for number, line in enumerate(lines[-2:]):
        assert re.fullmatch(rf"{number + 1} +{number} +\d\.\d{{4}} +runs/\S+", line)


@pytest.mark.slow
@pytest.mark.usefixtures("plugins")
def test_joblib_labels_the_lines_of_arms_side_by_side(tmp_path):
    done = sweep(tmp_path, "seed=0,1", "launcher=local")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for number in (1, 2):
        own = [line for line in lines if line.startswith(f"[{number}/2] ")]
        assert own[0].startswith(f"[{number}/2] seed={number - 1} launcher=local size=tiny")
        assert any("training transformer for 2 steps" in line for line in own)
    assert not [line for line in lines[:-3] if not re.match(r"\[[12]/2\] ", line)]
    check_table(lines)


@pytest.mark.slow
@pytest.mark.usefixtures("plugins")
def test_submitit_says_each_job_and_where_its_logs_are(tmp_path):
    words = ["seed=0,1", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"]
    done = sweep(tmp_path, *words)
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


@pytest.mark.slow
@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize("launcher", ["launcher=local", "hydra/launcher=submitit_local"])
def test_an_arm_that_fails_leaves_the_others_and_is_in_the_table(launcher, tmp_path):
    """Half a minute each."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/two").write_text("no folder")
    done = sweep(tmp_path, launcher, "seed=0", "name=one,two")
    assert done.returncode == 1, done.stderr
    one, two = [line for line in done.stderr.splitlines() if re.match(r"[12] +name=", line)]
    assert re.search(r" \d\.\d{4} +runs/one$", one), one
    assert two.split() == ["2", "name=two", "0", "failed"]
    assert re.search(r"name=two .*: runs/two: ", done.stderr)
    assert RunFolder.open(tmp_path / "runs/one").info["status"] == "done"


def begun_job(folder: Path) -> tuple[subprocess.Popen, int]:
    """A sweep of one run by submitit, which has trained some steps: its program, and its job."""
    words = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "save_every=1000"]
    words += ["model=mamba", "trainer.max_steps=60", "trainer.log_every_n_steps=1", "name=one"]
    short = [word for word in SHORT if not word.startswith("trainer.max_steps")]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *words, *short]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = folder / "runs/one/metrics.csv"
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 5)
    (pid,) = {job.name for job in folder.glob("runs/.sweeps/*/.submitit/[0-9]*")}
    (job,) = children(int(pid))
    return process, job


def steps_of(run: Path) -> list[int]:
    lines = (run / "metrics.csv").read_text().splitlines()
    return [int(line.partition(",")[0]) for line in lines[1:]]


@pytest.mark.slow
@pytest.mark.usefixtures("plugins")
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the jobs in /proc")
def test_a_job_that_is_terminated_leaves_a_run_that_goes_on(tmp_path):
    process, job = begun_job(tmp_path)
    os.kill(job, signal.SIGTERM)
    assert process.stderr is not None
    lines = process.stderr.read().splitlines()
    assert process.wait() != 0, lines
    run = RunFolder.open(tmp_path / "runs/one")
    assert run.info["status"] == "stopped", lines
    assert 0 < run.info["step"] < 60
    assert run.checkpoint() is not None
    command = [sys.executable, str(ROOT / "train.py"), "resume=runs/one"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert RunFolder.open(run.path).info["status"] == "done"
    assert steps_of(run.path) == [*range(1, 61)]


@pytest.mark.slow
@pytest.mark.usefixtures("plugins")
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the jobs in /proc")
def test_a_preempted_job_saves_goes_back_to_the_queue_and_on_from_there(tmp_path):
    process, job = begun_job(tmp_path)
    os.kill(job, signal.SIGUSR2)
    assert process.stderr is not None
    lines = process.stderr.read().splitlines()
    assert process.wait() == 0, lines
    (log,) = tmp_path.glob("runs/.sweeps/*/.submitit/*/*_log.err")
    said = log.read_text()
    stopped = re.search(r"stopped by SIGUSR2 at step (\d+)", said)
    assert stopped, said
    assert f"training mamba from step={int(stopped[1]):08d}.ckpt" in said
    assert RunFolder.open(tmp_path / "runs/one").info["status"] == "done"
    assert steps_of(tmp_path / "runs/one") == [*range(1, 61)]


@pytest.mark.slow
@pytest.mark.usefixtures("plugins")
def test_a_job_that_dies_is_in_the_table_of_all(tmp_path):
    words = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", "seed=0,1", *words, *SHORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len([*tmp_path.glob("runs/*/metrics.csv")]) > 0)
    began = next(tmp_path.glob("runs/*/metrics.csv")).parent
    holder = int((began / ".lock").read_text())
    os.kill(holder, signal.SIGKILL)
    assert process.stderr is not None
    lines = process.stderr.read().splitlines()
    assert process.wait() == 1, lines
    assert lines[-1].startswith("train.py: the sweep's launcher failed: ")
    rows = [line for line in lines if re.match(r"[12] +[01] +", line)]
    assert len(rows) == 2, lines
    assert any("failed" in row and began.name in row for row in rows)


def test_a_job_of_slurm_has_notice_of_its_end_and_may_return_to_the_queue(plugins, tmp_path):
    """As submitit writes it for sbatch, from the preset and an option beside it."""
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    with composing("train"):
        words = parse(["launcher=slurm", "hydra.launcher.partition=long"])
        found = compose_groups("train", words, hydra=True).hydra
        settings = OmegaConf.to_container(found.launcher, resolve=False)
    assert settings.pop("_target_").endswith(".SlurmLauncher")
    for key in ("submitit_folder", "max_num_timeout", "name"):
        settings.pop(key)
    names = SlurmExecutor._equivalence_dict()
    given = {names.get(key, key): value for key, value in settings.items() if value is not None}
    given["time"] = given.pop("timeout_min", given.get("time"))
    text = _make_sbatch_string(command="true", folder=str(tmp_path), **given)
    for line in ("signal=USR2@120", "requeue", "gpus-per-node=1", "partition=long", "time=720"):
        assert f"#SBATCH --{line}" in text, text


def test_a_launcher_without_a_sweep_a_package_or_a_cluster_is_refused(monkeypatch, capsys):
    for words, installed, rule in [
        (["launcher=local"], True, "launcher=local: launches the runs of a sweep. Add -m"),
        (["hydra/launcher=joblib"], True, "hydra/launcher=joblib: launches the runs of a sweep."),
        (
            ["-m", "launcher=local"],
            False,
            "launcher=local: needs the package hydra-joblib-launcher. Run pip install 'zoo[cl",
        ),
        (["-m", "launcher=slurm"], True, "launcher=slurm: there is no SLURM on this machine."),
        (["-m", "launcher=lokal"], True, "launcher=lokal: unknown"),
    ]:
        monkeypatch.setattr(launch, "_installed", lambda _, installed=installed: installed)
        assert main([*words, "size=tiny"]) == 2
        assert rule in capsys.readouterr().err


def test_a_fresh_run_is_no_job_that_may_return_to_the_queue(monkeypatch, capsys):
    monkeypatch.setattr(launch, "_installed", lambda _: True)
    monkeypatch.setattr(launch.shutil, "which", lambda _: "/usr/bin/srun")
    assert main(["-m", "launcher=slurm", "fresh=true", "size=tiny"]) == 2
    assert "fresh=true: begins a job that returns to the queue anew." in capsys.readouterr().err


def wait_for(holds: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
