"""`trainer=ddp` and `trainer=fsdp`: which processes share a step, and what goes with it.

That they train what one process does is in test_ranks.
"""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from building import train_config, write_text
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from zoo.config.validate import plain
from zoo.errors import UserError
from zoo.model.build import build_model
from zoo.runs.folder import RunFolder
from zoo.runs.resume import resumed
from zoo.training import partition
from zoo.training.partition import process_count, sharded
from zoo.training.sharding import cut, shard


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


@pytest.mark.parametrize("words", [["model=mamba"], ["model=transformer", "model.sink_token=true"]])
def test_parts_of_all_processes_are_the_whole_bit_for_bit_and_nothing_else_is_kept(words):
    config, count = train_config(*words, "size=tiny", "seq_len=32", "match=none"), 3

    def built():
        torch.manual_seed(0)
        return build_model(config, 256)[0]

    whole, several = built(), []
    marks = [vars(weight) for weight in whole.parameters()]
    assert any(marks)
    for index in range(count):
        model = built()
        weights = [weakref.ref(weight) for weight in model.parameters()]
        several.append(cut(model, index, count))
        assert not any(weight() for weight in weights)
        assert [vars(weight) for weight in model.parameters()] == marks
        assert all(weight.is_meta for weight in model.parameters())
        assert model.head.weight is model.embedding.weight
    parts: list[Tensor] = [
        torch.cat(every) for every in zip(*(one.values() for one in several), strict=True)
    ]
    assert all(map(torch.equal, parts, whole.parameters()))
    sizes = [sum(p.untyped_storage().nbytes() for p in one.values()) for one in several]
    assert max(sizes) < 0.4 * sum(sizes)


def test_divided_weights_have_the_values_and_the_marks_of_the_whole(tmp_path):
    config = train_config("model=mamba", "size=tiny", "seq_len=32", "match=none")
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = build_model(config, 256)[0]
        marks = [dict(vars(weight)) for weight in model.parameters()]
        values = [weight.detach().clone() for weight in model.parameters()]
        assert any(marks)
        mesh = init_device_mesh("cpu", (1,))
        shard(model, cut(model, 0, 1), model.blocks, (), mesh, alike=True)
        for weight, mark, value in zip(model.parameters(), marks, values, strict=True):
            assert vars(weight).items() >= mark.items()
            assert isinstance(weight, DTensor)
            assert torch.equal(weight.full_tensor(), value)
        assert model.head.weight is model.embedding.weight
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_processes_hold_the_whole_model_one_after_another_and_then_their_parts(tmp_path):
    write_text(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("peaks.py"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"parts-{rank}.json").read_text()) for rank in (0, 1)]
    first, second = sorted(found, key=lambda one: one["before"][0])
    assert first["cut"][0] <= second["before"][0]
    for one in found:
        whole = one["built"][1] - one["before"][1]
        assert whole > 190 * 2**20
        assert one["cut"][1] - one["before"][1] < 0.65 * whole
