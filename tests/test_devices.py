"""On CUDA a run takes bfloat16, TF32 and one device, and says so; elsewhere it is as it was."""

import pytest
import torch

from zoo import devices as hardware
from zoo.cli import train
from zoo.config.compose import compose, compose_tree, composing, parse
from zoo.errors import UserError
from zoo.runs.claim import claim
from zoo.runs.identity import identity, run_name


@pytest.fixture
def on_cuda(monkeypatch):
    """A machine with eight CUDA devices, as far as PyTorch reports."""
    monkeypatch.setattr(hardware, "_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(hardware, "_driver", lambda: False)


@pytest.fixture
def full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_on_cuda_a_run_takes_bfloat16(on_cuda):
    trainer = compose("train", ["size=tiny"]).trainer
    assert trainer.precision == "bf16-mixed"
    assert hardware.cuda_line(trainer.precision, 1) == (
        "trainer.precision=bf16-mixed on 1 of 8 CUDA devices; trainer.devices=8 takes all"
    )
    assert hardware.cuda_line("32-true", 8) == "trainer.precision=32-true on 8 of 8 CUDA devices"


@pytest.mark.parametrize("words", [["trainer.accelerator=cpu"], ["trainer.precision=32-true"]])
def test_what_is_requested_is_kept_on_cuda(on_cuda, words):
    assert compose("train", ["size=tiny", *words]).trainer.precision == "32-true"


def test_on_the_cpu_nothing_changes(on_cpu, full_precision):
    default = compose("train", ["size=tiny"])
    plain = compose("train", ["size=tiny", "trainer.precision=32-true"])
    assert (identity(default), run_name(default)) == (identity(plain), run_name(plain))
    assert hardware.prepare("cpu") is None
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_run_keeps_its_precision_on_another_machine(on_cuda, monkeypatch, tmp_path):
    words = ["size=tiny", f"runs={tmp_path}"]
    config = compose("train", words)
    folder = claim(config)
    assert "precision: bf16-mixed" in (folder.path / "config.yaml").read_text(encoding="utf-8")
    monkeypatch.setattr(hardware, "_driver", lambda: False)
    assert folder.config.trainer.precision == "bf16-mixed"
    assert identity(compose("train", words)) != identity(config)  # another run, not a mixture


def test_on_cuda_float32_products_take_tf32_and_it_is_said(full_precision):
    line = hardware.prepare("cuda")
    assert line is not None
    assert line.startswith("float32 matrix products take TF32")
    assert torch.get_float32_matmul_precision() == "high"


def test_training_says_how_it_uses_the_device(tmp_path, monkeypatch, capsys):
    from zoo.training import fit

    words = ["size=tiny", f"runs={tmp_path}", "seq_len=32", "batch_tokens=32", "logger=none"]
    words += ["trainer.max_steps=1", "trainer.accelerator=cpu", "threads=1"]
    config = compose("train", words)
    assert config.trainer.devices == "auto"  # which is one
    monkeypatch.setattr(fit, "prepare", lambda device: f"as on a {device} device")
    fit.train(config, claim(config))
    assert (
        "trainer.precision=32-true on 1 of 0 CUDA devices; as on a cpu device"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_deterministic_algorithms_are_refused_by_name_on_cuda(on_cuda, accelerator):
    with pytest.raises(UserError, match=r"^trainer\.deterministic=true: not available on CUDA"):
        hardware.check_deterministic(accelerator, True)
    words = ["size=tiny", "trainer.deterministic=true", f"trainer.accelerator={accelerator}"]
    with composing("train"):
        tree = compose_tree("train", parse(words))
    with pytest.raises(UserError, match="deterministic"):
        train.check(tree, [word.partition("=")[0] for word in words])
    hardware.check_deterministic(accelerator, "warn")
    hardware.check_deterministic("cpu", True)


def test_deterministic_algorithms_are_taken_on_the_cpu(on_cpu):
    hardware.check_deterministic("auto", True)
