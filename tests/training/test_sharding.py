"""`trainer=ddp` and `trainer=fsdp`: which processes share a step, and what goes with it.

That they train what one process does is in test_ranks.
"""

import json
import os
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from building import ARCHITECTURES, train_config
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_leaves

from zoo.config.schema.model import Shrunk
from zoo.config.stored import WEIGHTS
from zoo.config.validate import plain
from zoo.errors import UserError
from zoo.model import checkpoint, lora, shards
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.model.flops import forward_flops
from zoo.model.pretrained import pretrained_weights
from zoo.runs.checkpoints import shards_of
from zoo.runs.claim import weights_of
from zoo.runs.folder import RunFolder
from zoo.runs.resume import resumed
from zoo.tasks.leaks import leaked_in_training
from zoo.training import fit, partition
from zoo.training.fit import _build
from zoo.training.partition import process_count, sharded
from zoo.training.rehearse import FROZEN_BYTES
from zoo.training.sharding import Cut, shard


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


COUNT = 3  # processes


def numbers(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() for x in tensors if not x.is_meta)


def built(folder: RunFolder, cut: Cut | None = None) -> Backbone:
    torch.manual_seed(0)
    return _build(folder.config, folder, 256, cut)[0]


def parts_of(model: Backbone, cut: Cut, whole: Backbone) -> list[Tensor]:
    """A process's parts of a model, which has no weights left and else is as the whole is."""
    assert all(weight.is_meta for weight in model.parameters())
    assert [*map(vars, model.parameters())] == [*map(vars, whole.parameters())]
    assert (model.head.weight is model.embedding.weight) == (
        whole.head.weight is whole.embedding.weight
    )
    return [cut.parts[weight] for weight in model.parameters()]


def check_whole(several: list[list[Tensor]], whole: Backbone) -> None:
    together = [torch.cat(every) for every in zip(*several, strict=True)]
    assert all(map(torch.equal, together, whole.parameters()))


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def save(folder: RunFolder, model: Backbone, in_parts: bool) -> None:
    """A checkpoint of other weights than the model has, whole or in parts."""
    file = folder.path / "checkpoints/step=1.ckpt"
    file.parent.mkdir(exist_ok=True)
    with torch.no_grad():
        weights = {f"model.{name}": x + 1 for name, x in model.state_dict().items()}
    tree: dict[str, Any] = {"state_dict": weights, "global_step": 1}
    if in_parts:
        mesh = init_device_mesh("cpu", (1,))
        tree["state_dict"] = {n: distribute_tensor(x, mesh, [Shard(0)]) for n, x in weights.items()}
        tree = shards.write(tree, shards_of(file))
    torch.save(tree, file)
    folder.update(step=1)


def in_turn(names: list[str]) -> Iterator[Any]:
    """The names, each third one for the slow part, and numbers of processes."""
    for place, name in enumerate(names):
        marks = [pytest.mark.slow] if place % 3 == 2 else []
        yield pytest.param(name, 2 + place % 2, marks=marks)


@pytest.mark.parametrize(
    ("name", "count"),
    [*in_turn(ARCHITECTURES), ("sink_token", COUNT), ("factored", COUNT)],
)
def test_parts_of_all_processes_are_the_whole_and_no_process_ever_holds_it(name, count, tmp_path):
    """Bit for bit, whatever draws them; at most the parts, and the embedding or one block more."""
    words = {"sink_token": ["model.sink_token=true"], "factored": ["model=mamba"]}
    words = words.get(name, [f"model={name}"])
    config = train_config(*words, "size=tiny", "seq_len=64", "match=none")
    drawn = config  # before its weights are factored
    if name == "factored":
        config = config.model_copy(update={"shrunk": Shrunk(run=str(tmp_path), rank=4)})
    folder = RunFolder.create(tmp_path / "run", config, {})
    whole = built(folder)
    model = whole if drawn is config else build_model(drawn, 256)[0]
    most = max(numbers(block.parameters()) for block in [*model.blocks, model.embedding])

    class Watched(Cut):
        def __call__(self, module: nn.Module) -> None:
            here = {weight for weight in module.parameters() if not weight.is_meta}
            self.most = max(getattr(self, "most", 0), numbers(here))
            super().__call__(module)
            assert not numbers(module.parameters())

    several, cut = [], Cut(0, 1)
    for index in range(count):
        model = built(folder, cut := Watched(index, count))
        assert cut.most <= most
        several.append(parts_of(model, cut, whole))
    sizes = [sum(part.untyped_storage().nbytes() for part in one) for one in several]
    assert max(sizes) < 1.2 / count * sum(sizes)
    with cut.zeros(model):
        assert forward_flops(model, 16) == forward_flops(whole, 16)
        states = (tree_leaves(one.empty_state(1)) for one in (model, whole))
        assert all(map(torch.equal, *(map(torch.as_tensor, state) for state in states)))
    check_whole(several, whole)


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("goes_on", [False, True])
def test_each_process_reads_its_parts_of_a_checkpoint(goes_on, in_parts, group, tmp_path):
    """Of the run that is tuned, and of its own, which has trained frequencies beside them."""
    same = ["model=transformer", "size=tiny", "seq_len=64", "match=none"]
    first = RunFolder.create(tmp_path / "base", train_config(*same), {})
    save(first, built(first), in_parts)
    words = [*same, f"finetune={first.path}", "extension=clex", "extension.factor=4"]
    folder = RunFolder.create(tmp_path / "run", train_config(*words), {})
    if goes_on:
        save(folder, built(folder), in_parts)
    whole = built(folder)
    assert whole.frequencies is not None
    if goes_on:
        assert not torch.equal(whole.head.weight, built(first).head.weight)
    several = []
    for index in range(COUNT):
        model = built(folder, cut := Cut(index, COUNT))
        several.append(parts_of(model, cut, whole))
    check_whole(several, whole)


def test_each_process_converts_its_parts_of_pretrained_weights_alone(tmp_path):
    config = train_config("model=transformer", "size=tiny", "seq_len=64", "match=none")
    config = config.model_copy(update={"checkpoint": str(tmp_path)})
    whole, several = build_model(config, 256)[0], []
    half = {name: x.bfloat16().clone() for name, x in whole.state_dict().items()}
    save_file(half, tmp_path / "model.safetensors")
    stored = pretrained_weights(config, None)
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    whole.load_state_dict(pretrained_weights(config))
    for index in range(COUNT):
        model = build_model(config, 256, cut := Cut(index, COUNT))[0]
        cut.load(model, stored)
        several.append(parts_of(model, cut, whole))
    check_whole(several, whole)
    save_file({**half, "norm.weight": half["norm.weight"].int()}, tmp_path / "model.safetensors")
    for dtype in (None, torch.float32):
        with pytest.raises(UserError, match=r"norm\.weight is of int32"):
            pretrained_weights(config, dtype)


def test_each_process_adds_adapters_to_its_parts_alone(tmp_path, monkeypatch):
    """Of a run of adapters that is tuned on: one weight after another is put together."""
    same = ["model=transformer", "size=tiny", "seq_len=64", "match=none"]
    base = RunFolder.create(tmp_path / "base", train_config(*same), {})
    save(base, built(base), in_parts=False)
    config = train_config(*same, f"finetune={base.path}", "lora.rank=2")
    tuned = RunFolder.create(tmp_path / "tuned", config, {"base": {"weights": weights_of(base)}})
    model, adapters = built(base), {}
    for name in lora.adapted_layers(model, config.lora):
        outputs, inputs = model.get_parameter(f"{name}.weight").shape
        adapters |= {f"model.{name}{lora.A}": torch.randn(2, inputs)}
        adapters |= {f"model.{name}{lora.B}": torch.randn(outputs, 2)}
    (tuned.path / "checkpoints").mkdir(exist_ok=True)
    tree = {"state_dict": adapters, "global_step": 1}
    torch.save(tree, tuned.path / "checkpoints/step=1.ckpt")
    tuned.update(step=1)
    folder = RunFolder.create(tmp_path / "run", train_config(*same, f"finetune={tuned.path}"), {})
    whole, read, held = built(folder), lora._Merged.read, []
    name = "blocks.0.mixer.q_proj.weight"
    assert not torch.equal(whole.get_parameter(name), model.get_parameter(name))

    def watched(one: Any) -> Tensor:
        assert not any(other() is not None for other in held)
        held.append(weakref.ref(found := read(one)))
        return found

    monkeypatch.setattr(lora._Merged, "read", watched)
    several = []
    for index in range(COUNT):
        model = built(folder, cut := Cut(index, COUNT))
        several.append(parts_of(model, cut, whole))
    assert len(held) == COUNT * len(adapters) // 2
    check_whole(several, whole)


def test_parts_that_cannot_be_written_or_are_gone_are_one_line(group, tmp_path, monkeypatch):
    """PyTorch raises there what is no Exception, which would pass as a stop by signal."""
    tree = {"x": distribute_tensor(torch.randn(4, 4), group, [Shard(0)])}

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = r"step=1\.shards: cannot be written \(No space left on device\)\. Free some space"
        with pytest.raises(UserError, match=said):
            shards.write(tree, tmp_path / "step=1.shards")
    written = shards.write(tree, tmp_path / "step=1.shards")
    later = shards.unread(written, tmp_path / "step=1.shards")["x"]
    (tmp_path / "step=1.shards/__0_0.distcp").unlink()
    with pytest.raises(ValueError, match="No such file"):
        later.read()


def test_a_checkpoint_of_whole_tensors_is_written_a_tensor_at_a_time(group, tmp_path, monkeypatch):
    weights = {"a": torch.randn(7, 5), "b": torch.randn(5, 4).T, "none": torch.empty(0, 3)}
    parts = {name: distribute_tensor(x, group, [Shard(0)]) for name, x in weights.items()}
    moments = [{"step": torch.tensor(4.0), "part": parts["b"].detach()}, {"name": "é", "of": 2}]
    whole, held = DTensor.full_tensor, []

    def watched(part: DTensor) -> Tensor:
        assert not any(one() is not None for one in held)
        found = whole(part).clone()
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(DTensor, "full_tensor", watched)
    tree = {"state_dict": {**parts, "tied": parts["a"]}, "optimizer_states": moments}
    with open(tmp_path / "whole.ckpt", "w+b") as file:
        shards.write_whole(tree, file)
    assert len(held) == 4
    found = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert found["state_dict"].pop("tied") is found["state_dict"]["a"]
    assert all(torch.equal(found["state_dict"][name], x) for name, x in weights.items())
    (first, second), state = found["optimizer_states"], found["state_dict"]
    assert first["step"] == 4
    assert torch.equal(first["part"], weights["b"])
    assert second == {"name": "é", "of": 2}
    assert [*state] == [*weights]
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as archive:
        assert archive.testzip() is None


def test_another_models_checkpoint_is_refused_by_parts_as_by_a_whole(tmp_path, monkeypatch):
    """In one look at it, whether a run goes on from it or is tuned from it."""
    wide, narrow = (train_config("size=tiny", f"size.width={w}", "match=none") for w in (64, 32))
    folder = RunFolder.create(tmp_path / "run", wide, {})
    save(RunFolder.create(tmp_path / "other", narrow, {}), built(folder), in_parts=False)
    tuned = narrow.model_copy(update={"finetune": str(tmp_path / "other")})
    RunFolder.create(tmp_path / "tuned", tuned, {})
    looks, misfit = [], checkpoint.misfit
    monkeypatch.setattr(checkpoint, "misfit", lambda *given: looks.append(given) or misfit(*given))
    for name, rule in (
        ("other", "does not fit the checkpoint"),
        ("tuned", "do not fit this model"),
    ):
        said = []
        for cut in (None, Cut(0, 2)):
            with pytest.raises(UserError, match=rule) as caught:
                built(RunFolder.open(tmp_path / name), cut)
            said.append(str(caught.value))
        assert said[0] == said[1]
    assert len(looks) == 4


def test_a_part_of_a_base_is_read_under_todays_names(tmp_path):
    """As a whole is: weights have had other names."""
    config = train_config("size=tiny", "seq_len=64", "match=none", "model=t5")
    first = RunFolder.create(tmp_path / "base", config, {})
    save(first, built(first), in_parts=False)
    file = first.path / "checkpoints/step=1.ckpt"
    tree, old = torch.load(file), {new: old for old, new in WEIGHTS.items()}
    renamed = {
        next((n.removesuffix(new) + old[new] for new in old if n.endswith(new)), n): x
        for n, x in tree["state_dict"].items()
    }
    assert renamed.keys() != tree["state_dict"].keys()
    torch.save({**tree, "state_dict": renamed}, file)
    tuned = RunFolder.create(
        tmp_path / "run", config.model_copy(update={"finetune": str(first.path)}), {}
    )
    whole, cut = built(tuned), Cut(0, 1)
    check_whole([parts_of(built(tuned, cut), cut, whole)], whole)
    assert torch.equal(whole.head.weight, tree["state_dict"]["model.head.weight"])


def test_divided_weights_have_the_values_and_the_marks_of_the_whole(group):
    config = train_config("model=mamba", "size=tiny", "seq_len=32", "match=none")
    model = build_model(config, 256)[0]
    marks = [dict(vars(weight)) for weight in model.parameters()]
    values = [weight.detach().clone() for weight in model.parameters()]
    assert any(marks)
    (cut := Cut(0, 1))(model)
    shard(model, cut.parts, model.blocks, (), group, alike=True)
    for weight, mark, value in zip(model.parameters(), marks, values, strict=True):
        assert vars(weight).items() >= mark.items()
        assert isinstance(weight, DTensor)
        assert torch.equal(weight.full_tensor(), value)
    assert model.head.weight is model.embedding.weight
    assert not cut.parts


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("checkpoint", ["sharded", "whole"])
def test_processes_hold_their_parts_and_little_more(checkpoint, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("peaks.py")), "model=transformer"]
    command.append(f"trainer.checkpoint={checkpoint}")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = json.loads((tmp_path / f"memory-{rank}.json").read_text())
        assert found["weights"] > 200e6
        assert found["building"] < 0.65 * found["weights"]  # a half, and one block of twelve
        assert found["training"] < 2.6 * found["weights"]  # a half four times, and gathered ones


def test_a_whole_model_that_memory_does_not_hold_is_not_audited(tmp_path, monkeypatch, caplog):
    config = train_config("trainer=fsdp", "size=tiny", "seq_len=32", "match=none")
    folder = RunFolder.create(tmp_path / "run", config, {})
    model, data = built(folder), cast(Any, SimpleNamespace(vocab_size=256))
    size, audited = FROZEN_BYTES * numbers(model.parameters()), []
    monkeypatch.setattr(
        fit, "audit_trained", lambda whole, *_: audited.append(whole) or {"ok": True}
    )
    for memory, ok in ((2 * size - 1, None), (2 * size, True), (None, True)):
        monkeypatch.setattr(fit, "machine_memory", lambda memory=memory: memory)
        found = fit._audit(config, folder, data, model, torch.device("cpu"))
        assert found["ok"] is ok
        assert not leaked_in_training({"audit": found})
    assert len(audited) == 2
    assert model not in audited  # which is built anew, from the checkpoint
    (line,) = caplog.messages
    assert line.startswith("the audit for leaks could not be carried out: the model has 0.000")
    assert "GB, too much for one process" in line
