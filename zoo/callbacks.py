"""What happens beside the training steps: validation, metrics, progress, checkpoints, a stop."""

import os
import signal
import sys
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from zoo.checkpoints import seal
from zoo.run import RunFolder, replacing

SECONDS_BETWEEN_LINES = 5.0
KEEP = 2  # checkpoints; the one before the last is there should the last be damaged
COLUMNS = ("tokens", "train_loss", "valid_loss", "learning_rate", "grad_norm", "tokens_per_second")


class Checkpoints(Callback):
    """Saves every so many steps, at the end, and before a stop by SIGTERM or Ctrl-C."""

    def __init__(self, folder: RunFolder, *, every: int, tokens_per_step: int) -> None:
        self.folder, self.every, self.tokens_per_step = folder, every, tokens_per_step
        self.interrupted = False
        self._saved = 0

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        def stop(*_: Any) -> None:
            self.interrupted = trainer.should_stop = True
            signal.signal(signal.SIGINT, self._before)  # a second one ends it at once

        self._before = signal.signal(signal.SIGINT, stop)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0 or trainer.received_sigterm or self.interrupted:
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        step = trainer.global_step
        if step <= self._saved:
            return
        folder = self.folder.path / "checkpoints"
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()  # what save_checkpoint writes
        if trainer.is_global_zero:
            with replacing(folder / f"step={step:08d}.ckpt") as file:
                torch.save(checkpoint, file)
                seal(file, self.folder.info.get("id"), step)
            for old in sorted(folder.glob("step=*.ckpt"))[:-KEEP]:
                os.remove(old)
            self.folder.update(step=step, tokens_seen=step * self.tokens_per_step)
        self._saved = step


class Metrics(Callback):
    """Validates every so many steps; writes metrics.csv and a progress line on stderr."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        valid: dict[str, Tensor],
        valid_every: int,
        tokens_per_step: int,
    ) -> None:
        self.folder, self.valid, self.valid_every = folder, valid, valid_every
        self.tokens_per_step = tokens_per_step

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._first, self._began = trainer.global_step, time.monotonic()
        self._said, self._validating = -SECONDS_BETWEEN_LINES, 0.0
        if trainer.is_global_zero:
            self._writer = self.folder.metrics(COLUMNS, step=self._first)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        step, last = trainer.global_step, trainer.max_steps
        row: dict[str, Any] = {}
        if step % trainer.log_every_n_steps == 0 or step == last:  # type: ignore[attr-defined]
            figures = trainer.callback_metrics
            row = {
                "train_loss": figures["train/loss"].item(),
                "grad_norm": figures["train/grad_norm"].item(),
                "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                "tokens_per_second": round(self._speed(step)),
            }
        if step % self.valid_every == 0 or step == last:
            row["valid_loss"] = self._validate(trainer, module)
        if trainer.is_global_zero:
            if row:
                self._writer.write({"step": step, "tokens": step * self.tokens_per_step, **row})
            self._say(step, last, trainer.callback_metrics["train/loss"])

    def _speed(self, step: int) -> float:
        """Tokens per second of training since this process began, validation left out."""
        spent = time.monotonic() - self._began - self._validating
        return (step - self._first) * self.tokens_per_step / spent

    def _validate(self, trainer: lightning.Trainer, module: Any) -> float:
        """Mean loss over the fixed windows, in nats per token."""
        start, total = time.monotonic(), 0.0
        module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for pieces in zip(*(x.split(8) for x in self.valid.values()), strict=True):
                rows = (piece.to(module.device) for piece in pieces)
                batch = dict(zip(self.valid, rows, strict=True))
                total += float(module.loss(batch)) * len(batch["tokens"])
        module.train()
        self._validating += time.monotonic() - start
        loss = total / len(self.valid["tokens"])
        module.log("valid/loss", loss)
        return loss

    def _say(self, step: int, last: int, loss: Tensor) -> None:
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES and step < last:
            return
        self._said, speed = now, self._speed(step)
        left = time.strftime("%H:%M:%S", time.gmtime((last - step) * self.tokens_per_step / speed))
        sys.stderr.write(
            f"step {step}/{last}  loss {loss:.4f}  {speed:,.0f} tokens/s  {left} left\n"
        )
