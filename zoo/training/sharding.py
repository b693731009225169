"""Fully sharded data parallel training: each process keeps a part of every weight.

Before a block computes, its weights are gathered from all processes; afterwards each keeps its part
again, with that part's gradient and the optimiser's moments of it (ZeRO's third stage, Rajbhandari
2020, arXiv 1910.02054; FSDP, Zhao 2023, arXiv 2304.11277, by PyTorch's `fully_shard`). So memory
for weights, gradients and moments falls with the number of processes, and a step is that of one
process up to rounding.

No process has to hold the whole model. Each draws every weight from the run's seed, block by block
as one process does, and keeps its part of a block before it builds the next. Of a checkpoint it
reads its part of one tensor after another, and of one that it writes as a whole it holds one tensor
at a time besides (`trainer.checkpoint=sharded` writes parts). But the first process audits the
trained model as a whole where that fits.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from zoo.errors import refuse
from zoo.model.backbone import Backbone, check_tied
from zoo.model.checkpoint import read_file
from zoo.model.later import Later, read


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy, which hands on each process's parts for `zoo.model.shards` to write.

    Args:
        processes: among which the weights are divided, all of the run's.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)

    def model_to_device(self) -> None:
        """Nothing: `fully_shard` has moved it, and moving makes new weights without their marks."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This process's parts of the weights."""
        assert self.model is not None
        return self.model.state_dict(keep_vars=True)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """This process's parts of an optimiser's state."""
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> dict[str, Any]:
        """What a checkpoint holds, of the optimisers this process's parts.

        Its weights are left out: the model has its parts of them already.
        """
        del weights_only
        found = read_file(Path(checkpoint_path), mapped=True)
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


class Cut:
    """Takes a process's parts of a model's weights while it is built, and leaves these without
    memory.

    A part is what `fully_shard` gives that process: a chunk of the first dimension.

    Args:
        index: of the process among `count`, from 0.
    """

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        self.parts: dict[Tensor, Tensor] = {}  # by the weight without memory

    def chunk(self, x: Tensor) -> Tensor:
        """This process's chunk of a tensor, no view of it."""
        chunks = x.detach().chunk(self.count)
        return (chunks[self.index] if self.index < len(chunks) else x.detach()[:0]).clone()

    def __call__(self, module: nn.Module) -> None:
        """Cut those weights of a module that have memory."""
        without = {}
        for weight in module.parameters():
            if not weight.is_meta:
                without[weight] = nn.Parameter(weight.to("meta"), weight.requires_grad)
                self.parts[without[weight]] = self.chunk(weight)
        _replace(module, without)

    def load(self, model: Backbone, stored: Mapping[str, Any]) -> None:
        """Give the parts of a model's weights the values of stored ones, one after another.

        Args:
            stored: tensors, or each a `Later`, of the model's names and shapes, as `load_weights`
                has seen.

        Raises RuntimeError where its head is its embedding, and theirs is not.
        """
        loaded: set[Tensor] = set()
        for name, weight in model.named_parameters(remove_duplicate=False):
            part = self.chunk(read(stored[name]))
            if weight in loaded:  # the head that is the embedding
                check_tied(model, {name: part, "embedding.weight": self.parts[weight]}, "")
            self.parts[weight].copy_(part)
            loaded.add(weight)

    @contextmanager
    def zeros(self, module: nn.Module) -> Iterator[None]:
        """Give a module zeros for the weights that it left, which take no memory either: what
        depends on their shapes alone can be computed then."""
        zeros = {
            weight: nn.Parameter(weight.new_zeros((), device="cpu").expand(weight.shape))
            for weight in self.parts
        }
        _replace(module, zeros)
        try:
            yield
        finally:
            _replace(module, {zero: weight for weight, zero in zeros.items()})


def _replace(module: nn.Module, by: Mapping[Tensor, Tensor]) -> None:
    """Put other parameters in the places of a module's, with the marks of these."""
    for weight, new in by.items():
        vars(new).update(vars(weight))
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False, remove_duplicate=False):
            if weight in by:
                part.register_parameter(name, cast(nn.Parameter, by[weight]))


def shard(
    module: nn.Module,
    parts: dict[Tensor, Tensor],
    blocks: Iterable[nn.Module],
    methods: Iterable[str],
    mesh: DeviceMesh,
    alike: bool,
) -> None:
    """Divide a module's weights among the processes of a mesh, those of each block together.

    Args:
        parts: this process's, as a `Cut` has taken them; none are left in it.
        methods: of the module, which compute with its weights beside `forward`.
        alike: whether a step has a gradient of the same weights in all processes.
    """
    before = list(module.parameters())
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    divided: dict[Tensor, Tensor] = {}
    for old, weight in zip(before, module.parameters(), strict=True):
        vars(weight).update(vars(old))  # new ones have no marks
        like, mine = cast(DTensor, weight), parts.pop(old).to(mesh.device_type, weight.dtype)
        about = {"shape": like.shape, "stride": like.stride(), "run_check": False}
        whole = DTensor.from_local(mine, mesh, like.placements, **about)
        divided[weight] = nn.Parameter(whole, old.requires_grad)
    parts.clear()  # of layers that others have replaced
    _replace(module, divided)
    for method in methods:
        register_fsdp_forward_method(module, method)
    if not alike:
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            rule = "needs a newer PyTorch with trainer.sequence_parallel"
            refuse("trainer.strategy", "fsdp", rule, "Use PyTorch 2.13 or trainer=ddp")
        cast(FSDPModule, module).set_reduce_scatter_unused_params(True)


def part_of(value: Any, weight: Tensor) -> Any:
    """This process's part of a stored tensor of a weight's shape; any other value as it is."""
    if not isinstance(value, Tensor | Later):
        return value
    here = read(value)
    if here.shape != weight.shape:
        return here.clone()  # not mapped from a file any longer
    like = cast(DTensor, weight)
    mesh = like.device_mesh
    mine = Cut(mesh.get_local_rank(), mesh.size()).chunk(here).to(like.device)
    about = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(mine, mesh, like.placements, **about)
