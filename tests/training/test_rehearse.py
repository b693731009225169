"""What a run would need is found before anything is written: its model, its devices, its memory."""

import os
import subprocess
import sys

import pytest
import torch
from building import ROOT, train_config
from tokenizing import KINDS

import zoo.training.rehearse
from zoo.cli.train import main
from zoo.config.compose import compose_tree, composing, parse
from zoo.config.resolve import resolve
from zoo.devices import machine_memory
from zoo.errors import UserError
from zoo.mixers.mamba import Mamba
from zoo.model.build import build_model
from zoo.runs.folder import RunFolder
from zoo.runs.resume import finetuned
from zoo.training.rehearse import rehearse

GB = 10**9

REFUSED = {
    "model=mamba model.mixer.state_size=0": "model.mixer.state_size=0: must be an integer >= 1",
    "model=mamba model.mixer.dt_rank=0": "model.mixer.dt_rank=0: must be an integer >= 1 or null",
    "model=mamba model.mixer.conv_width=-1": "conv_width=-1: must be an integer from 2 to 8",
    "model.mixer.heads=0": "model.mixer.heads=0: must be >= 1",
    "model.mixer.kv_heads=-1": "model.mixer.kv_heads=-1: must be >= 1",
    "model.feed_forward.hidden_width=0 match=none": "hidden_width=0: must be an integer >= 1",
    "model.mixer.backend=foo": "backend=foo: unknown backend of attend",
    "model=learned extension=randomised extension.factor=8": "model.positions.max_length=4096",
    "batch_tokens=100000000000000": "a step needs at least",
    "batch_size=1000000000": "Use fewer batch_tokens, trainer.accumulate_grad_batches=<parts",
    "model=mamba seq_len=1M": "checkpoint_activations=true, a shorter seq_len or a smaller size",
    "size.width=131072": "training needs at least",
    "model=mamba match=none model.mixer.state_size=1000000000000": "PB for 3,072,",
    "hybrid=[7*mamba,transformer]": "match=params: the 6 layers must hold the whole pattern",
    "hybrid=[7*mamba,transformer] size=tiny": "the 3 layers must hold the whole pattern of model=",
    "hybrid=[mamba,gla,transformer] match=none size=tiny": "or match=none size.layers=3.",
    "model=learned state_passing=carry": "state_passing=carry: each row reads on for",
    "model=aft model.mixer.variant=full state_passing=carry": "reads at most 512. Use state_",
    "trainer.devices=[0,1]": "a list names GPUs",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_run_that_cannot_be_is_reported_in_one_line(words, monkeypatch):
    monkeypatch.setattr(zoo.training.rehearse, "machine_memory", lambda: 32 * GB)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        rehearse(train_config(*words.split()))
    assert REFUSED[words] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_windows_of_a_mixer_without_a_state_are_not_split(monkeypatch):
    monkeypatch.setattr(Mamba, "forward", lambda self, x: x)
    rule = "trainer.sequence_parallel=2: Mamba keeps no state, so its windows cannot be split"
    with pytest.raises(UserError, match=f"^{rule}. Leave it out.$"):
        rehearse(train_config("model=mamba", "size=tiny", "trainer.sequence_parallel=2"))


@pytest.mark.parametrize("words", ["objective=masked model=sima", "state_passing=carry"])
def test_windows_that_depend_on_one_another_are_not_split(words):
    with pytest.raises(UserError, match=r"^trainer\.sequence_parallel=2: splits separate windows"):
        train_config("trainer.sequence_parallel=2", *words.split())


@pytest.mark.parametrize("requested", ["gpu", "cuda", "mps"])
def test_a_machine_without_an_accelerator_says_so(requested, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=f"^trainer.accelerator={requested}: this machine has none. Use"
    ):
        rehearse(train_config("size=tiny", f"trainer.accelerator={requested}"))


@pytest.mark.parametrize("devices", ["3", "[0,2]"])
def test_more_gpus_than_there_are_is_refused_with_their_number(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"this machine has 2\. Use at most 2\."):
        rehearse(train_config("size=tiny", f"trainer.devices={devices}"))


def test_a_hybrid_of_seven_to_one_trains_attention_at_a_size_that_holds_it():
    with torch.device("meta"):
        model, _ = build_model(train_config("hybrid=[7*mamba,transformer]", "size=base"), 256)
    names = [type(block.mixer).__name__ for block in model.blocks]
    assert names.count("SoftmaxAttention") == len(names) // 8 >= 2
    assert names[7] == "SoftmaxAttention"


@pytest.mark.parametrize("name", ["transformer", "mamba", "rwkv7", "hybrid"])
def test_the_memory_reported_is_what_a_step_saves(name, monkeypatch):
    """Against tensors counted in the whole model at the whole window."""
    config = train_config(f"model={name}", "size=tiny", "seq_len=512", "batch_size=4")
    model, knobs = build_model(config, 256)
    saved = zoo.training.rehearse._saved_bytes(model, 4, 512)
    estimate = 4 * zoo.training.rehearse._activations_per_row(config, 256, knobs)
    assert estimate == pytest.approx(saved, rel=0.05)


def test_memory_a_little_short_is_refused_and_enough_is_not(monkeypatch):
    config = train_config("size=tiny", "seq_len=512", "batch_size=64")
    model, _ = build_model(config, 256)
    needed = 16 * sum(p.numel() for p in model.parameters())
    needed += zoo.training.rehearse._saved_bytes(model, 64, 512) + 8 * 64 * 513
    monkeypatch.setattr(zoo.training.rehearse, "machine_memory", lambda: int(needed * 1.05))
    rehearse(config)
    monkeypatch.setattr(zoo.training.rehearse, "machine_memory", lambda: int(needed * 0.95))
    with pytest.raises(UserError, match="batch_size=64, seq_len=512: a step needs at least"):
        rehearse(config)
    rehearse(train_config("size=tiny", "batch_size=64", "trainer.accumulate_grad_batches=2"))


def test_this_machine_has_memory():
    assert machine_memory() is None or GB // 2 < machine_memory() < 10**6 * GB


REFUSED_ARM = ["model=deltanet", "model.mixer.heads=3", "size=tiny", "logger=none"]


def test_nothing_is_written_for_a_run_that_cannot_be(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(REFUSED_ARM) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert "model.mixer.heads=3: must divide width=64." in said
    assert not os.listdir(tmp_path)


def test_an_arm_that_cannot_be_keeps_its_place(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *REFUSED_ARM],
        **{"cwd": tmp_path, "capture_output": True, "text": True},
    )
    assert "model.mixer.heads=3: must divide width=64." in done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert len([name for name in os.listdir(tmp_path / "runs") if name[0] != "."]) == 1


VOCABULARIES = {  # what the base was trained on, the options of tuning it, and how that is refused
    ("data=text", "data=recall"): "data=recall: has 32 tokens, and the model of finetune=",
    ("data=recall", "data=text"): "data=text: has 256 tokens, and the model of finetune=",
    ("data=text", "data.tokenizer={file}"): r"data.tokenizer={file}: has 261 tokens, and the model",
    ("data=recall", "data=recall data.task.keys=4"): "data.task.keys=4: has 20 tokens, and the",
    ("data=recall", "data=recall data.task.keys=12 data.task.values=20"): None,
    ("data=text", "data=text data.passkey=0.5"): None,
}


@pytest.mark.parametrize("words", VOCABULARIES)
def test_data_of_another_vocabulary_than_the_model_s_are_refused_by_name(words, tmp_path):
    """Before a line says that it trains; those of the same size go on."""
    file, line = tmp_path / "tokenizer.json", VOCABULARIES[words]
    KINDS["byte level"]().save(str(file))
    before, options = (part.format(file=file).split() for part in words)
    small = ["size=tiny", "match=none", "seq_len=32"]
    config = train_config(*small, *before)
    vocabulary = 32 if "recall" in words[0] else 256
    base = RunFolder.create(tmp_path / "base", config, {"step": 1, "status": "done"})
    state = build_model(config, vocabulary)[0].state_dict()
    state = {f"model.{name}": weight for name, weight in state.items()}
    torch.save({"state_dict": state, "global_step": 1}, base.path / "checkpoints/step=1.ckpt")
    given = [f"finetune={base}", "batch_size=2", *options]
    with composing("train"):
        tree = resolve(compose_tree("train", parse(given)))
    tuned = finetuned(tree, [word.partition("=")[0] for word in given])
    if line is None:
        rehearse(tuned)
        return
    with pytest.raises(UserError) as caught:
        rehearse(tuned)
    assert str(caught.value).startswith(line.format(file=file))


def test_an_option_of_a_task_beside_finetune_says_to_name_the_task():
    with composing("train"), pytest.raises(UserError) as caught:
        compose_tree("train", parse(["finetune=runs/base", "data.task.keys=4"]))
    rule = "data.task.keys=4: is of a synthetic task, and data= names none. Add data=recall"
    assert str(caught.value).startswith(rule)
