"""`trainer=ddp` and `trainer=fsdp`: which processes share a step, and what goes with it.

That they train what one process does is in test_ranks.
"""

import pytest
from building import train_config

from zoo.config.validate import plain
from zoo.errors import UserError
from zoo.runs.folder import RunFolder
from zoo.runs.resume import resumed
from zoo.training import partition
from zoo.training.partition import process_count, sharded


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_word_takes_every_gpu_or_two_processes_on_the_cpu(strategy, monkeypatch):
    monkeypatch.setattr(partition, "cuda_devices", lambda: 4)
    for gpu, words, count in [
        (False, [], 2),
        (True, [], 4),
        (False, ["trainer.sequence_parallel=4"], 4),
        (True, ["trainer.devices=2"], 2),
        (False, ["trainer.devices=1"], 1),
    ]:
        monkeypatch.setattr(partition, "on_cuda", lambda _, gpu=gpu: gpu)
        config = train_config(f"trainer={strategy}", *words)
        assert process_count(config) == count
        assert sharded(config) == (strategy == "fsdp")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["optim=muon"], "optim=muon"),
        (["state_passing=carry"], "state_passing=carry"),
        (["finetune=runs/a", "lora.rank=2"], "lora.rank"),
        (["checkpoint_activations=16"], "checkpoint_activations=<tokens>"),
    ],
)
def test_fsdp_is_refused_by_name_with_what_acts_on_whole_weights(words, named):
    train_config("trainer=ddp", *words)
    with pytest.raises(
        UserError, match=rf"strategy=fsdp: cannot be combined with {named}\. Use tr"
    ):
        train_config("trainer=fsdp", *words)


def test_a_run_goes_on_under_another_strategy_and_its_own_other_options(tmp_path):
    before = train_config("trainer=ddp", "trainer.max_steps=7", "trainer.log_every_n_steps=3")
    RunFolder.create(tmp_path / "run", before, {})
    other = plain(train_config("trainer=fsdp"))
    config = resumed({**other, "resume": str(tmp_path / "run")}, ["resume", "trainer"])
    changed = {**plain(before)["trainer"], "strategy": "fsdp"}
    assert plain(config)["trainer"] == changed


@pytest.mark.parametrize("checkpoint", ["whole", "sharded"])
def test_a_run_folder_keeps_how_its_steps_are_shared(checkpoint, tmp_path):
    config = train_config("trainer=fsdp", f"trainer.checkpoint={checkpoint}")
    RunFolder.create(tmp_path / "run", config, {})
    assert RunFolder.open(tmp_path / "run").config == config


def test_parts_are_refused_of_weights_that_are_not_divided():
    with pytest.raises(
        UserError, match=r"^trainer\.checkpoint=sharded: .* Add it, or use whole\.$"
    ):
        train_config("trainer=ddp", "trainer.checkpoint=sharded")
