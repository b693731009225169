"""`trainer=ddp` and `trainer=fsdp`: which processes share a step, and what goes with it.

That they train what one process does is in test_ranks.
"""

import pytest
from building import train_config

from zoo.errors import UserError
from zoo.training import partition
from zoo.training.partition import process_count, sharded

PRUNED = {"run": "runs/a", "rank": None, "sparsity": 0.5}


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
    ],
)
def test_fsdp_is_refused_by_name_with_what_acts_on_whole_weights(words, named):
    train_config("trainer=ddp", *words)
    with pytest.raises(
        UserError, match=rf"strategy=fsdp: cannot be combined with {named}\. Use tr"
    ):
        train_config("trainer=fsdp", *words)
