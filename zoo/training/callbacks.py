"""Lightning callbacks: validation, metrics, progress lines, checkpoints and stops by signal."""

import os
import shutil
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from zoo.console import say
from zoo.data.synthetic import NO_LABEL
from zoo.model.checkpoint import read_file
from zoo.ops.runtime.sizes import ceil_div
from zoo.parallel.ranks import Ranks
from zoo.runs.checkpoints import seal, shards_of
from zoo.runs.files import replacing
from zoo.runs.folder import RunFolder
from zoo.runs.stopping import Stop
from zoo.training.distributed import all_gather, any_process, rank, world_size

SECONDS_BETWEEN_LINES = 5.0
MAX_CHECKPOINTS = 2  # the one before the last serves if the last is damaged
COLUMNS = ("tokens", "train_loss", "valid_loss", "learning_rate", "grad_norm", "tokens_per_second")
# Limits of one validation batch. Models with a large vocabulary need most memory for one or two
# float32 copies of the logits.
MAX_ROWS, MAX_TOKENS, MAX_LOGITS = 8, 2**16, 2**24


class AtStepEnds(Callback):
    """Calls `on_step_end` once for each optimiser step, after its last micro-batch."""

    _step = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.on_step_end(trainer, pl_module)

    def on_step_end(self, trainer: lightning.Trainer, module: Any) -> None:
        raise NotImplementedError


class Checkpoints(AtStepEnds):
    """Saves a checkpoint every `every` steps, at the end, and before a stop by signal.

    Signals reach processes one by one: at the end of each step all processes agree whether to go
    on, so that none waits for another that has left.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        every: int,
        tokens_per_step: int,
        stop: Stop,
        divided: str | None = None,
    ) -> None:
        self.folder, self.every, self.tokens_per_step = folder, every, tokens_per_step
        self.divided = divided  # weights: write them `whole`, or `sharded` by every process its own
        self.stop, self.interrupted = stop, False
        self._saved = 0

    def on_step_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.interrupted = any_process(self.stop.requested is not None, module.device)
        if self.interrupted:
            trainer.should_stop = True
            self.stop.allow_time()
        if trainer.global_step % self.every == 0 or self.interrupted:
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        step = trainer.global_step
        if step <= self._saved:
            return
        folder = self.folder.path / "checkpoints"
        path = folder / f"step={step:08d}.ckpt"
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()  # what save_checkpoint writes
        # Lightning counts it after its callbacks: what goes on from here would be one behind.
        checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] = step
        checkpoint = _unshared(checkpoint)
        hashes = None  # of the files of its parts
        write: Callable[[Any, BinaryIO | None], None] = _write
        if self.divided:
            from zoo.model import shards  # torch.distributed.checkpoint

            if self.divided == "whole":
                write = shards.write_whole
            else:
                checkpoint = shards.write(checkpoint, shards_of(path))
                hashes = checkpoint[shards.HASHES]
        if not trainer.is_global_zero:
            write(checkpoint, None)
        else:
            with replacing(path) as file:
                write(checkpoint, file)
                seal(file, self.folder.info.get("id"), step, hashes)
            for old in sorted(folder.glob("step=*.ckpt"))[:-MAX_CHECKPOINTS]:
                os.remove(old)
            for parts in folder.glob("step=*.shards"):
                if not parts.with_suffix(".ckpt").exists():
                    shutil.rmtree(parts)
            self.folder.update(step=step, tokens_seen=step * self.tokens_per_step)
        self._saved = step


def _write(checkpoint: Any, file: BinaryIO | None) -> None:
    if file:
        torch.save(checkpoint, file)


def _unshared(tree: Any) -> Any:
    """The same containers with one object for equal texts, and no other one in two places.

    Pickled, they depend on their values alone: a run that went on from a checkpoint writes the
    bytes that an unbroken one writes, and what names its weights by their hash finds them again.
    """
    if isinstance(tree, str):
        return sys.intern(tree)
    if type(tree) is list or type(tree) is tuple:
        return type(tree)(map(_unshared, tree))
    if type(tree) is dict or type(tree) is OrderedDict:
        copy = type(tree)((_unshared(key), _unshared(value)) for key, value in tree.items())
        for name, value in getattr(tree, "__dict__", {}).items():
            setattr(copy, name, _unshared(value))  # a state_dict's versions of its modules
        return copy
    return tree


class CheckpointReader(TorchCheckpointIO):
    """Lets Lightning read checkpoints whose tensors are in parts, under any strategy."""

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return read_file(Path(path))


class MetricsLogger(AtStepEnds):
    """Validates every `valid_every` steps; writes metrics.csv, and progress lines to stderr."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        valid: dict[str, Tensor],
        valid_every: int,
        reached: int,
        tokens_per_step: int,
        stop: Stop,
    ) -> None:
        self.folder, self.valid, self.valid_every = folder, valid, valid_every
        self.reached = reached  # the step that training goes on from
        self.tokens_per_step, self.stop = tokens_per_step, stop
        self.valid_loss: float | None = None  # the last

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Of a run that has all its steps Lightning trains none, and calls nothing below."""
        if self.reached >= trainer.max_steps > 0:
            self._begin(trainer, pl_module, self.reached)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._begin(trainer, pl_module, trainer.global_step)
        if self.valid_loss is not None:
            pl_module.log("valid/loss", self.valid_loss)

    def _begin(self, trainer: lightning.Trainer, module: Any, step: int) -> None:
        """Open metrics.csv after `step`; validate there where a stop had cut that short."""
        self._first, self._began = step, time.monotonic()
        self._said, self._validating = -SECONDS_BETWEEN_LINES, 0.0
        missing = False
        if trainer.is_global_zero:
            self._writer = self.folder.metrics(COLUMNS, step=step)
            here = [row for row in self._writer.rows if int(row["step"]) == step]
            due = bool(here) and (step % self.valid_every == 0 or step == trainer.max_steps)
            missing = due and not any(row.get("valid_loss") for row in here)
        if any_process(missing, module.device):
            self.valid_loss = self._validate(trainer, module)
            if self.valid_loss is None:
                by = self.stop.requested or "SIGTERM"  # which another process may have received
                raise KeyboardInterrupt(f"stopped by {by} at step {step}")
            if trainer.is_global_zero:
                self._writer.complete({"step": step, "valid_loss": self.valid_loss})

    def on_step_end(self, trainer: lightning.Trainer, module: Any) -> None:
        step, last = trainer.global_step, trainer.max_steps
        figures = trainer.callback_metrics
        row: dict[str, Any] = {}
        if step % trainer.log_every_n_steps == 0 or step == last:  # type: ignore[attr-defined]
            row = {
                "train_loss": figures["train/loss"].item(),
                "grad_norm": figures["train/grad_norm"].item(),
                "learning_rate": module.learning_rate,
                "tokens_per_second": round(self._speed(step)),
            }
            module.log("train/tokens_per_second", float(row["tokens_per_second"]))
        if step % self.valid_every == 0 or step == last:
            row["valid_loss"] = self.valid_loss = self._validate(trainer, module)
            if self.valid_loss is not None:
                module.log("valid/loss", self.valid_loss)
        if trainer.is_global_zero:
            if row:
                self._write(step, row)
            self._say(step, last, figures["train/loss"])

    def _write(self, step: int, row: dict[str, Any]) -> None:
        self._writer.write({"step": step, "tokens": step * self.tokens_per_step, **row})

    def _speed(self, step: int) -> float:
        """Tokens per second since this process began to train, without the time for validation."""
        spent = time.monotonic() - self._began - self._validating
        return (step - self._first) * self.tokens_per_step / spent

    def _validate(self, trainer: lightning.Trainer, module: Any) -> float | None:
        """Mean loss over the fixed windows, in nats per token; None where a stop cut it short.

        Processes take batches in turn, those of a window together; all add up the same numbers in
        the same order.
        """
        ranks: Ranks = module.ranks
        start = time.monotonic()
        batches = self._batches(module.model.vocab_size)
        sums = torch.zeros(len(batches) + 1, dtype=torch.float64)
        module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for index in self._own_batches(len(batches), module):
                stopped = self.stop.requested is not None
                if any_process(stopped, module.device) if module.sharded else stopped:
                    sums[-1] = 1
                    break
                batch = batches[index % len(batches)]
                here = {name: x.to(module.device) for name, x in batch.items()}
                loss = float(module.validation_loss(here))
                if index < len(batches):
                    sums[index] = loss * _weight(batch) / ranks.size
        module.train()
        self._validating += time.monotonic() - start
        if world_size() > 1:
            sums = torch.stack(all_gather(sums.to(module.device))).sum(0).cpu()
        if sums[-1]:
            return None
        return sum(sums[:-1].tolist()) / sum(_weight(batch) for batch in batches)

    def _own_batches(self, count: int, module: Any) -> range:
        """Which of so many batches this process reads.

        Processes that gather their weights from one another read equally many: the last ones may
        begin again, at numbers from `count` on.
        """
        groups, own = world_size() // module.ranks.size, rank() // module.ranks.size
        return range(own, ceil_div(count, groups) * groups if module.sharded else count, groups)

    def _batches(self, vocab_size: int) -> list[dict[str, Tensor]]:
        """The validation windows in batches within the limits above."""
        tokens = self.valid["tokens"].shape[1] - 1
        rows = min(MAX_ROWS, MAX_TOKENS // tokens, MAX_LOGITS // (tokens * vocab_size))
        parts = zip(*(x.split(max(1, rows)) for x in self.valid.values()), strict=True)
        return [dict(zip(self.valid, part, strict=True)) for part in parts]

    def _say(self, step: int, last: int, loss: Tensor) -> None:
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES and step < last:
            return
        self._said, speed = now, self._speed(step)
        left = timedelta(seconds=round((last - step) * self.tokens_per_step / speed))
        valid = "" if self.valid_loss is None else f"  valid {self.valid_loss:.4f}"
        say(f"step {step}/{last}  loss {loss:.4f}{valid}  {speed:,.0f} tokens/s  {left} left")


def _weight(batch: dict[str, Tensor]) -> int:
    """The weight of a batch's mean loss: its labels, its masked tokens, or its windows."""
    if "labels" in batch:
        return int((batch["labels"] != NO_LABEL).sum())
    return int(batch["chosen"].sum()) if "chosen" in batch else len(batch["tokens"])
