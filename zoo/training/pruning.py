"""Keeps the zeros of a pruned model while it is trained further."""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from zoo.model.backbone import Backbone
from zoo.model.shrink import pruned


class KeepZeros(Callback):
    """Zeros of the matrices stay: they get no gradient, and no optimiser's step moves them.

    Which numbers are zero is read from the weights, as they are opened or resumed.
    """

    def __init__(self, model: Backbone) -> None:
        self.found = [*pruned(model)]

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any
    ) -> None:
        """Before the gradient is clipped, so that its norm is that of what is trained."""
        for weight, nonzero in self.found:
            if weight.grad is not None:
                weight.grad.mul_(nonzero.to(weight.grad))

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for weight, nonzero in self.found:
                weight.mul_(nonzero.to(weight))
