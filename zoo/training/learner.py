"""The one LightningModule: the loss of a step, its gradient and its learning rate."""

import hashlib
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from zoo.config.schedule import learning_rate_factor
from zoo.config.schema.optim import Optim
from zoo.errors import NonFiniteError, refuse_path
from zoo.model.backbone import Backbone, BackboneState
from zoo.model.chunks import chunk_loss
from zoo.model.lora import trained_names
from zoo.parallel.ranks import Ranks
from zoo.training.distillation import Distillation
from zoo.training.distributed import (
    all_gather,
    broadcast_text,
    check_versions,
    rank,
    ranks_of_window,
    whole,
    world_size,
)
from zoo.training.optimisers import make_optimiser
from zoo.training.partition import process_index


class Learner(lightning.LightningModule):
    """Trains next-token or masked-token prediction, with warm-up and a cosine decay.

    A step's loss is the mean over all its windows, which processes and `micro_batches` divide
    among themselves: "weight" in a batch is the weight of its own mean in that of the step.

    `state_passing="carry"` starts each window from the detached state after the row's previous
    window (truncated backpropagation through time, Williams & Peng 1990; for softmax attention
    Transformer-XL, arXiv 1901.02860), and from the empty state where the row's text begins anew.

    With `sequence_parallel` processes to a window each reads its chunk of every window it is given
    (zoo.parallel.hand_over), and its loss is its part of the mean, times their number: processes
    are averaged. `parts` are this process's of the weights, which all processes divide among
    themselves (zoo.training.sharding), and `empty` the state before one text, which has no such
    weights. `versions` are what all processes must have alike, those of other machines too.
    """

    def __init__(
        self,
        *,
        model: Backbone,
        optim: Optim,
        max_steps: int,
        seq_len: int,
        state_passing: str = "none",
        micro_batches: int = 1,
        rows: int | None = None,
        sequence_parallel: int = 1,
        distillation: Distillation | None = None,
        parts: dict[Tensor, Tensor] | None = None,
        empty: BackboneState | None = None,
        versions: Mapping[str, str | None] | None = None,
    ) -> None:
        super().__init__()
        self.parts, self.empty, self.versions = parts, empty, versions
        self.sharded = parts is not None
        self.sequence_parallel = sequence_parallel
        self.ranks = Ranks(1, 0)  # this process's place among those of a window
        self.model, self.optim = model, optim
        self.max_steps, self.seq_len = max_steps, seq_len
        self.passes_state = state_passing == "carry"
        self.micro_batches, self.rows = micro_batches, rows  # rows of a whole step
        # Micro-batch -> the state after its rows' window of the last whole step; of the next step,
        # which a stop may break off between two micro-batches, to be read from its start again.
        self.states: dict[int, Any] = {}
        self._after: dict[int, Any] = {}
        self.distillation = distillation
        self.strict_loading = all(weight.requires_grad for weight in model.parameters())
        self._losses: list[Tensor] = []  # of the step's micro-batches

    def configure_model(self) -> None:
        if self.parts is not None:
            from zoo.training.sharding import shard  # a second to import

            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            assert mesh.get_local_rank() == process_index()  # whose parts these are
            methods, alike = ("training_step", "validation_loss"), self.sequence_parallel == 1
            shard(self, self.parts, self.model.blocks, methods, mesh, alike)

    def on_fit_start(self) -> None:
        if self.versions is not None:
            check_versions(self.versions)
        self.ranks = ranks_of_window(self.sequence_parallel)

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        self.ranks.finish()  # what the step before has sent
        tokens = self._tokens = batch["tokens"]
        if self.passes_state:
            micro = batch.get("micro", 0)
            state = self.states.get(micro)
            if state is None or bool(batch["restart"].any()):
                state = self.model.empty_state(len(tokens))
            loss, state = self.model.loss(tokens, state)
            self._after[micro] = self.model.truncate_state(state, self.seq_len)
        elif self.distillation is not None:
            loss = self.distillation.loss(self.model, tokens)
        else:
            loss = self.loss(batch, batch.get("weight", 1.0))
        self._losses.append(self._checked("loss", loss.detach()))
        if len(self._losses) == self.micro_batches:
            self.log("train/loss", torch.stack(self._losses).mean())
            self._losses.clear()
            self.states, self._after = self._after, {}
        return loss

    def loss(self, batch: dict[str, Any], weight: float = 1.0) -> Tensor:
        """The mean loss over a batch, each window read from the empty state.

        `weight` is that of the mean over its labels, where batches differ in their number.
        """
        if self.ranks.size > 1:
            return self._chunk_loss(batch, weight)
        if "labels" in batch:
            placed = batch.get("positions")
            return self.model.labels_loss(batch["tokens"], batch["labels"], placed, weight)
        if "chosen" in batch:
            tokens = batch["tokens"][:, :-1]
            return self.model.masked_loss(batch["shown"], tokens, batch["chosen"], weight)
        return self.model.loss(batch["tokens"], positions=batch.get("positions"))

    def validation_loss(self, batch: dict[str, Any]) -> Tensor:
        """As `loss`, called from outside of a step."""
        return self.loss(batch)

    def _chunk_loss(self, batch: dict[str, Any], weight: float) -> Tensor:
        """This rank's part of the mean loss, times the number of ranks."""
        tokens, labels = batch["tokens"], batch.get("labels")
        if labels is None:
            tokens, labels = tokens[:, :-1], tokens[:, 1:]
        placed = batch.get("positions")
        part = chunk_loss(self.model, self.ranks, tokens, labels, placed, self.empty, weight)
        return part * self.ranks.size

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip to the configured norm. NonFiniteError before a bad gradient reaches the weights."""
        norm = whole(nn.utils.clip_grad_norm_(self.parameters(), self.optim.clip))
        self.log("train/grad_norm", self._checked("gradient norm", norm))
        self.learning_rate = optimizer.param_groups[0]["lr"]  # of this step
        self.log("train/learning_rate", self.learning_rate)

    def _checked(self, what: str, value: Tensor) -> Tensor:
        """The mean over all processes. All raise NonFiniteError where one value is not finite."""
        found = torch.stack(all_gather(value))
        bad = (~torch.isfinite(found)).nonzero()
        if len(bad):
            where = int(bad[0])
            tokens = self._tokens.cpu().numpy().tobytes()
            fingerprint = broadcast_text(hashlib.sha256(tokens).hexdigest()[:12], where)
            of = f" of process {where + 1} of {world_size()}" if world_size() > 1 else ""
            raise NonFiniteError(
                f"the {what} is {found[where].item()} at step {self.global_step + 1}, "
                f"batch {fingerprint}{of}"
            )
        return found.mean() if len(found) > 1 else value

    def configure_optimizers(self) -> Any:
        optimizer = make_optimiser(self.model, self.optim)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_start(self) -> None:
        """Set the next step's learning rate: the checkpoint's is that of the earlier options."""
        (scheduler,) = self.trainer.lr_scheduler_configs
        rates = scheduler.scheduler.base_lrs
        factor = self.learning_rate_factor(self.global_step)
        for group, rate in zip(self.trainer.optimizers[0].param_groups, rates, strict=True):
            group["lr"] = rate * factor

    def learning_rate_factor(self, step: int) -> float:
        """The factor of the peak learning rate in the step after `step` others."""
        return learning_rate_factor(self.optim, self.max_steps, step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"] = {}  # Lightning's own: the clock of trainer.max_time
        if not self.strict_loading:  # what is frozen is another run's
            trained = {f"model.{name}" for name in trained_names(self.model)}
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: weights[name] for name in weights if name in trained}
        if self.states:  # only the leaves, as a checkpoint holds plain containers
            checkpoint["carried"] = self._all_rows()

    def _all_rows(self) -> list[Any]:
        """The leaves of the passed state, each with the rows of the whole step in their order.

        Row i of micro-batch m in process r is row (i, m, r) of the step, see `train_loader`.
        """
        parts = [tree_flatten(self.states[micro])[0] for micro in range(self.micro_batches)]
        whole: list[Any] = []
        for leaves in zip(*parts, strict=True):
            if isinstance(leaves[0], Tensor):
                rows = [torch.stack(all_gather(leaf), 1) for leaf in leaves]
                whole.append(torch.stack(rows, 1).flatten(0, 2))
            else:
                whole.append(leaves[0])
        return whole

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"] = {}
        # Lightning counts batches, of which a step may have another number now.
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (batches["total"], batches["current"]):
            counts |= dict.fromkeys(counts, checkpoint["global_step"] * self.micro_batches)
        if "carried" not in checkpoint:
            return
        whole = checkpoint["carried"]
        shares = self.micro_batches * world_size()
        rows = next(leaf for leaf in whole if isinstance(leaf, Tensor)).shape[0]
        if rows != (self.rows or rows):
            refuse_path(
                "checkpoint",
                f"holds the state of {rows} of the step's {self.rows} rows, those of one process",
                "Train again with fresh=true",
            )
        structure = tree_flatten(self.model.empty_state(rows // shares))[1]
        for micro in range(self.micro_batches):
            mine = slice(micro * world_size() + rank(), None, shares)
            leaves = [
                x[mine].to(self.device).contiguous() if isinstance(x, Tensor) else x for x in whole
            ]
            self.states[micro] = tree_unflatten(leaves, structure)
