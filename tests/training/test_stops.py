"""Signals, crashes and threads: the record is true, the lock free, and the rest goes on."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zoo.runs.find import find_runs
from zoo.runs.folder import RunFolder
from zoo.runs.stopping import handled

STUB = Path(__file__).with_name("stub.py")
HANGS = 240  # seconds after which a process is taken to hang: no test waits for a clock otherwise


def heard() -> None:
    """As in a terminal: what runs the tests may ignore signals, under nohup."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(how: str, *words: str, cwd: Path, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(STUB), how, *words],
        cwd=cwd,
        env={**os.environ, "GRACE": str(HANGS), **env},
        preexec_fn=heard,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(how: str, *words: str, cwd: Path) -> tuple[int, str]:
    process = start(how, *words, cwd=cwd)
    output, _ = process.communicate(timeout=HANGS)
    return process.returncode, output


def until(process: subprocess.Popen, line: str) -> None:
    assert process.stdout is not None
    for said in process.stdout:
        if line in said:
            return
    raise AssertionError(f"it never said {line!r}")


def the_run(folder: Path) -> RunFolder:
    (found,) = find_runs(str(folder / "runs/*"), "runs")
    return found


def test_an_arm_that_crashes_is_a_failed_arm(tmp_path):
    code, output = run("crash", "-m", "seed=0,1,2", cwd=tmp_path)
    assert code == 1, output
    runs = {folder.config.seed: folder.info for folder in find_runs(str(tmp_path / "runs/*"), "")}
    assert [runs[seed]["status"] for seed in (0, 1, 2)] == ["done", "failed", "done"]
    assert "SIGSEGV" in runs[1]["reason"]
    assert "1 of 3 arms failed" in output
    assert "Traceback" not in output
    assert [runs[seed]["arm"] for seed in (0, 1, 2)] == ["seed=0", "seed=1", "seed=2"]
    assert len({info["sweep"] for info in runs.values()}) == 1
    table = output[output.index("arm  options") :].splitlines()[1:4]
    assert [line.split()[1] for line in table] == ["0", "1", "2"]  # seeds
    assert ["failed" in line for line in table] == [False, True, False]
    assert all(line.startswith(f"{n}  ") for n, line in enumerate(table, 1))
    assert "[2/3] runs/" in output


def test_a_rank_that_crashes_is_the_runs_reason(tmp_path):
    code, output = run("crash_of_one_rank", "trainer.devices=2", cwd=tmp_path)
    assert code == 1, output
    info = the_run(tmp_path).info
    assert info["status"] == "failed"
    assert "process 2 of 2 was ended by SIGKILL" in info["reason"]


def test_what_one_rank_says_comes_before_what_others_lose_by_it(tmp_path):
    code, output = run("refuse", "trainer.devices=2", "runs='a b=c'", cwd=tmp_path)
    assert code == 1, output
    (folder,) = find_runs(str(tmp_path / "a b=c/*"), "runs")
    assert folder.info["status"] == "failed"
    assert folder.info["reason"] == "the loss is nan at step 3"


def test_seven_ranks_have_one_record_and_one_voice(tmp_path):
    code, output = run("done", "trainer.devices=7", "batch_size=14", cwd=tmp_path)
    assert code == 0, output
    crowded = (os.cpu_count() or 1) < 7  # which is said in a line of its own
    assert len(output.splitlines()) == 2 + crowded, output  # what a step reads, where it trains
    assert the_run(tmp_path).info["status"] == "done"


def test_a_thread_trains_and_the_command_line_stays_the_callers(tmp_path):
    code, output = run("done_in_a_thread", cwd=tmp_path)
    assert code == 0, output
    assert the_run(tmp_path).info["status"] == "done"


@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("steps", signal.SIGTERM),
        ("building", signal.SIGINT),
        ("broken_by_it", signal.SIGTERM),
        ("steps -m", signal.SIGINT),
        ("steps trainer.devices=2", signal.SIGTERM),
        ("steps", signal.SIGHUP),
    ],
)
def test_a_first_signal_stops_it_in_order(how, number, tmp_path):
    process = start(*how.split(), cwd=tmp_path)
    until(process, "training\n")
    process.send_signal(number)
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    info, name = the_run(tmp_path).info, {15: "SIGTERM", 2: "Ctrl-C", 1: "SIGHUP"}[number]
    assert info["status"] == "stopped"
    assert info["reason"].startswith(f"stopped by {name}")
    assert output.splitlines()[-1].startswith(f"train.py: stopped by {name}")
    with the_run(tmp_path).lock():
        pass


@pytest.mark.parametrize("layout", ["trainer.devices=1", "trainer.devices=2"])
def test_what_does_not_end_is_ended(layout, tmp_path):
    """In C, Python's handlers never run: the process ends all the same, and the record is true."""
    process = start("one_long_step", layout, cwd=tmp_path, GRACE="1")
    until(process, "training\n")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 130, output
    assert the_run(tmp_path).info["status"] == "stopped"
    assert "SIGTERM" in the_run(tmp_path).info["reason"]
    with the_run(tmp_path).lock():
        pass


@pytest.mark.parametrize("layout", ["trainer.devices=1", "trainer.devices=2"])
def test_a_second_signal_ends_it_at_once(layout, tmp_path):
    process = start("one_long_step", layout, cwd=tmp_path, GRACE="60")
    until(process, "training\n")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 130, output
    assert the_run(tmp_path).info["status"] == "stopped"


def test_ranks_end_with_the_process_that_started_them(tmp_path):
    process = start("one_long_step", "trainer.devices=2", cwd=tmp_path)
    until(process, "training\n")
    process.kill()
    process.communicate(timeout=HANGS)  # whoever lives holds its output open
    with the_run(tmp_path).lock():
        pass


@pytest.mark.parametrize("layout", ["trainer.devices=1", "trainer.devices=2"])
def test_a_closed_terminal_stops_it_in_order(layout, tmp_path):
    """Its signal reaches every process of the terminal, and none of them can print any more."""
    child, terminal = pty.fork()
    if not child:
        heard()
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, str(STUB), "steps", layout])
    said = b""
    while b"training\r\n" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    info = the_run(tmp_path).info
    assert (info["status"], info["reason"]) == ("stopped", "stopped by SIGHUP at step 7")


def test_under_nohup_a_closed_terminal_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Finaliser:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_finaliser_swallows_comes_before_the_first_step():
    begun = []

    def program() -> None:
        with handled() as stop:
            Finaliser()
            begun.append("loading")
            with stop.deferred():
                begun.append("steps")

    with pytest.raises(KeyboardInterrupt, match="stopped by Ctrl-C"):
        program()
    assert begun == ["loading"]


def test_an_early_stop_is_said_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from zoo.cli.launch import launch

    def check(*_):
        raise KeyboardInterrupt

    assert launch("train", [], usage="", check=check, job=lambda *_: 0) == 130
    assert capsys.readouterr().err == "train.py: stopped\n"
