"""Fully sharded data parallel training: each process keeps a part of every weight.

Before a block computes, its weights are gathered from all processes; afterwards each keeps its part
again, with that part's gradient and the optimiser's moments of it (ZeRO's third stage, Rajbhandari
2020, arXiv 1910.02054; FSDP, Zhao 2023, arXiv 2304.11277, by PyTorch's `fully_shard`). So memory
for weights, gradients and moments falls with the number of processes, and a step is that of one
process up to rounding.

Each process builds the whole model, from the same seed or checkpoint, and keeps its part of it;
those of a run and a machine do so one after another, so that memory must hold the whole for one of
them, whatever their number. So they read whole checkpoints. When training ends the first process
builds the whole once more, to audit it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from zoo.errors import refuse
from zoo.locks import alone_on_machine
from zoo.model.checkpoint import read_file
from zoo.training.distributed import rank, whole


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy, with checkpoints that hold whole tensors as those of one process do.

    Args:
        processes: among which the weights are divided, all of the run's.
        run: its folder.
        in_parts: hand on each process's parts instead, for `zoo.model.shards` to write.
    """

    def __init__(self, processes: int, run: Path, in_parts: bool = False) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)
        self.run, self.in_parts = run, in_parts

    def model_to_device(self) -> None:
        """Nothing: `fully_shard` has moved it, and moving makes new weights without their marks."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights in the first process, None for each in the others; all must call it."""
        assert self.model is not None
        weights = self.model.state_dict(keep_vars=True)
        return weights if self.in_parts else gathered(weights)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As `lightning_module_state_dict`, of an optimiser."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state if self.in_parts else gathered(state)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> dict[str, Any]:
        """What a checkpoint holds, of the optimisers this process's parts.

        Its weights are left out: the model has its parts of them already.
        """
        del weights_only
        with alone_on_machine(self.run):
            found = read_file(Path(checkpoint_path))
            saved = zip(self.optimizers, found["optimizer_states"], strict=True)
            states = [_parts_of_state(*each) for each in saved]
            return {**found, "state_dict": {}, "optimizer_states": states}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)


def _parts_of_state(optimizer: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's saved state with this process's part of every moment."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    of = dict(zip(numbers, weights, strict=True))
    state = {
        number: {name: part_of(value, of[number]) for name, value in moments.items()}
        for number, moments in saved["state"].items()
    }
    return {**saved, "state": state}


Parts = dict[int, Tensor]  # of weights, by their number among a module's


def cut(module: nn.Module, index: int, count: int) -> Parts:
    """Return a process's parts of a module's weights, and leave these without memory.

    A part is what `fully_shard` gives that process: a chunk of the first dimension.

    Args:
        index: of the process among `count`, from 0.
    """
    parts, without = {}, {}
    for number, weight in enumerate(module.parameters()):
        chunks = weight.detach().chunk(count)
        mine = chunks[index] if index < len(chunks) else weight.detach()[:0]
        parts[number] = mine.clone()
        without[weight] = torch.empty_like(weight, device="meta")
    _replace(module, without)
    return parts


def _replace(module: nn.Module, by: Mapping[Tensor, Tensor]) -> None:
    """Put other tensors in the places of a module's weights, with the marks of these."""
    new = {}
    for weight, tensor in by.items():
        new[weight] = nn.Parameter(tensor, weight.requires_grad)
        vars(new[weight]).update(vars(weight))
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False, remove_duplicate=False):
            part.register_parameter(name, new[weight])


def shard(
    module: nn.Module,
    parts: Parts,
    blocks: Iterable[nn.Module],
    methods: Iterable[str],
    mesh: DeviceMesh,
    alike: bool,
) -> None:
    """Divide a module's weights among the processes of a mesh, those of each block together.

    Args:
        parts: this process's, as `cut` has returned them.
        methods: of the module, which compute with its weights beside `forward`.
        alike: whether a step has a gradient of the same weights in all processes.
    """
    marks = [dict(vars(weight)) for weight in module.parameters()]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    divided: dict[Tensor, Tensor] = {}
    for number, weight in enumerate(module.parameters()):  # new ones, without the marks of the old
        vars(weight).update(marks[number])
        like, mine = cast(DTensor, weight), parts.pop(number).to(mesh.device_type)
        about = {"shape": like.shape, "stride": like.stride(), "run_check": False}
        divided[weight] = DTensor.from_local(mine, mesh, like.placements, **about)
    _replace(module, divided)
    for method in methods:
        register_fsdp_forward_method(module, method)
    if not alike:
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            rule = "needs a newer PyTorch with trainer.sequence_parallel"
            refuse("trainer.strategy", "fsdp", rule, "Use PyTorch 2.13 or trainer=ddp")
        cast(FSDPModule, module).set_reduce_scatter_unused_params(True)


def gathered(tree: Any) -> Any:
    """The tree with its parts of tensors as whole tensors in the first process, None in others."""
    known: dict[int, Tensor | None] = {}  # of weights that are tied, once

    def put_together(part: DTensor) -> Tensor | None:
        if id(part) not in known:
            found = whole(part.detach())
            known[id(part)] = None if rank() else found.cpu()
        return known[id(part)]

    return tree_map_only(DTensor, put_together, tree)


def part_of(value: Any, weight: Tensor) -> Any:
    """This process's part of a whole tensor of a weight's shape; any other value as it is."""
    if not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    like = cast(DTensor, weight)
    here, mesh = value.to(like.device), like.device_mesh
    mine = distribute_tensor(here, mesh, like.placements, src_data_rank=None)
    return mine.clone()  # not a view of the whole
