"""The arithmetic that a run's model is measured in: no gradients, and the run's own precision."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from zoo.model.audit import AUTOCAST
from zoo.model.backbone import Backbone


@contextmanager
def arithmetic(model: Backbone, precision: str, device: torch.device) -> Iterator[None]:
    """No gradients, and `precision` by Lightning's name for it (zoo.model.audit.AUTOCAST)."""
    with ExitStack() as stack:
        if precision in AUTOCAST:
            # Autocast casts a weight once, not at each call, where it takes a gradient and
            # inference mode is off.
            model.requires_grad_(True)
            stack.callback(model.requires_grad_, False)
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(device.type, AUTOCAST[precision]))
        else:
            stack.enter_context(torch.inference_mode())
        yield
