"""Checkpoints written in parts are read as whole ones; damaged and foreign ones are not read.

That runs go on from them is in training/test_ranks.
"""

import os
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from zoo.model import shards
from zoo.runs.checkpoints import shards_of
from zoo.runs.files import file_hash


@pytest.fixture
def mesh():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def written(mesh, tmp_path):
    """A checkpoint as its file has it, its folder of shards, and its tensors."""
    weight, moment = torch.randn(5, 3), torch.randn(5, 3).bfloat16()
    parts = [distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, moment)]
    state = {0: {"step": torch.tensor(2.0), "exp_avg": parts[1]}}
    tree = {
        "state_dict": {"embedding": parts[0], "head": parts[0]},
        "optimizer_states": [{"state": state, "param_groups": [{"params": [0]}]}],
        "version": "2",
    }
    folder = shards_of(tmp_path / "step=1.ckpt")
    return shards.write(tree, folder), folder, weight, moment


def test_what_is_read_is_whole(written):
    tree, folder, weight, moment = written
    found = shards.read(tree, folder)
    assert torch.equal(found["state_dict"]["embedding"], weight)
    assert found["state_dict"]["head"] is found["state_dict"]["embedding"]
    (optimiser,) = found["optimizer_states"]
    assert torch.equal(optimiser["state"][0]["exp_avg"], moment)
    assert optimiser["param_groups"] == [{"params": [0]}]
    assert {*found} == {"state_dict", "optimizer_states", "version"}


def test_the_file_holds_plain_containers(written, tmp_path):
    torch.save(written[0], tmp_path / "file")
    assert torch.load(tmp_path / "file", weights_only=True).keys() == written[0].keys()


def test_damaged_and_missing_files_are_refused(written):
    tree, folder, *_ = written
    for name in tree[shards.HASHES]:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ValueError, match="missing or damaged"):
            shards.read(tree, folder)
        (folder / name).write_bytes(before)
    shards.read(tree, folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="missing or damaged"):
        shards.read(tree, folder)


@pytest.mark.parametrize(
    "what", [os.system, shards.Path.unlink, torch.load, dist.init_process_group]
)
def test_an_index_that_names_other_code_is_refused(what, written):
    tree, folder, *_ = written

    class Call:
        def __reduce__(self):
            return what, ("true",)

    (folder / ".metadata").write_bytes(pickle.dumps(Call()))
    tree[shards.HASHES][".metadata"] = file_hash(folder / ".metadata")
    with pytest.raises(pickle.UnpicklingError, match="names "):
        shards.read(tree, folder)
