"""Runs on several machines, simulated: processes that torchrun starts for two nodes on this one."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from building import ROOT, train_config, write_text

from zoo.cli.train import main
from zoo.errors import RunError
from zoo.model.checkpoint import read_file
from zoo.runs.folder import RunFolder
from zoo.training import distributed, fit
from zoo.training.partition import is_first, process_count, processes_here, sharing

WORDS = [
    *("model=mamba", "size=tiny", "data=text", "data.path=text", "logger=none", "match=none"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "seq_len=32", "batch_size=4"),
    *("valid_windows=20", "trainer.log_every_n_steps=1", "optim.eps=1e-2", "optim.lr=1e-2"),
    *("optim.warmup_steps=1", "allocator=system", "save_every=2", "threads=1"),
]
NODES = ["trainer=multi_node", "trainer.num_nodes=2", "trainer.devices=2"]
NODES += ["trainer.sequence_parallel=2"]


def on_two_machines(folder: Path, *words: str) -> None:
    """Run train.py as torchrun starts it on each of two machines, two processes each."""
    store = folder / "port"
    started = []
    for node in (0, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += ["--nproc-per-node=2", f"--node-rank={node}", "--master-addr=127.0.0.1"]
        command += [f"--master-port={port(store)}", str(ROOT / "train.py"), *words]
        started.append(subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said


def port(store: Path) -> int:
    """A free port, the same at every call with one file until that is removed."""
    if not store.exists():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            store.write_text(str(free.getsockname()[1]))
    return int(store.read_text())


@pytest.mark.slow
def test_two_machines_train_what_one_process_does_and_go_on(tmp_path, monkeypatch):
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, "trainer.max_steps=4", "name=one"]) == 0
    on_two_machines(tmp_path, *WORDS, *NODES, "trainer.max_steps=4", "name=two")
    one, two = (RunFolder.open(f"runs/{name}") for name in ("one", "two"))
    assert two.info["status"] == "done"
    assert two.info["processes"] == 4
    assert [path.name for path in Path("runs").iterdir()].count("two") == 1
    assert len([*Path("runs/two/checkpoints").glob("step=00000004.shards/__*")]) == 4
    found, expected = (read_file(run.checkpoint())["state_dict"] for run in (two, one))
    for name, weight in expected.items():
        assert float((found[name] - weight).abs().max()) < 5e-6, name
    (tmp_path / "port").unlink()
    on_two_machines(tmp_path, "resume=runs/two", "trainer.max_steps=6")
    assert main(["resume=runs/one", "trainer.max_steps=6"]) == 0
    found, expected = (read_file(run.checkpoint())["state_dict"] for run in (two, one))
    for name, weight in expected.items():
        assert float((found[name] - weight).abs().max()) < 5e-6, name


def test_a_run_of_several_machines_is_refused_on_one(capsys):
    assert main([*NODES, "size=tiny", "data=mqar"]) == 2
    said = capsys.readouterr().err
    assert "trainer.num_nodes=2: is a run of 4 processes. Start it on each by torchrun" in said


def test_processes_are_counted_on_all_machines_and_on_this():
    config = train_config("trainer=multi_node")
    assert (process_count(config), processes_here(config)) == (64, 8)


def test_the_first_process_of_all_machines_writes_the_record(monkeypatch):
    for environment, first in [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, False),
    ]:
        with monkeypatch.context() as patch:
            for name in ("RANK", "LOCAL_RANK"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            assert is_first() == first


def test_another_version_in_one_process_is_said_in_a_line(monkeypatch):
    def gather(found, own):
        found[:] = [own, own, {**own, "torch": "2.12.0"}, own]

    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(
        RunError, match=r"process 3 of 4 has torch 2\.12\.0 and the first 2\.13\.0: "
    ):
        distributed.check_versions({"python": "3.11", "torch": "2.13.0"})


def test_a_process_that_is_waited_for_too_long_is_said_in_a_line():
    class Waits:
        _signal_connector = type("Handlers", (), {})()

        def fit(self, *_, **__):
            raise RuntimeError("[unbound_buffer.cc:119] Timed out waiting 1800000ms for recv")

    with pytest.raises(RunError, match=r"a process waited 30 minutes for another one, .* goes on"):
        fit._fit(Waits(), None, None, None)  # type: ignore[arg-type]


def test_more_processes_than_cores_are_said_in_a_line(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    cpu = "trainer.accelerator=cpu"
    config = train_config("trainer.sequence_parallel=64", cpu)
    (line,) = sharing(config)
    assert line.startswith("trainer.sequence_parallel=64: 64 processes share 2 cores")
    (line,) = sharing(train_config("trainer.devices=4", cpu))
    assert line.startswith("trainer.devices=4: 4 processes share 2 cores")
    assert not sharing(train_config("trainer.devices=2", cpu))


def test_a_strategy_that_one_process_has_no_use_for_is_said_in_a_line():
    cpu = "trainer.accelerator=cpu"
    (line,) = sharing(train_config("trainer=ddp", "trainer.devices=1", cpu))
    assert line.startswith("trainer.strategy=ddp: there is one device")
    assert not sharing(train_config("trainer=fsdp", "trainer.devices=1", cpu))
    assert not sharing(train_config("trainer.devices=1", cpu))
