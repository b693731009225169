"""Finds out whether a training step leaves weights without a gradient, which DDP must know."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.config.schema.train import TrainConfig
from zoo.model.backbone import Backbone
from zoo.ops.runtime import dispatch
from zoo.training.partition import ranks_per_window


def every_weight_learns(model: Backbone, config: TrainConfig) -> bool:
    """Whether each trained weight has a gradient in every step of every process.

    Read off the graphs of losses over the fewest tokens that all weights of the model can learn
    from: at the start of a text and, where windows are read on from a state, after it.
    """
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    log = logging.getLogger("zoo")
    level = log.level
    log.setLevel(logging.ERROR)  # which kernels run is the run's to say
    try:
        with torch.random.fork_rng(devices=[]):
            ranks = ranks_per_window(config)  # which may read two chunks each
            chunk = config.seq_len // (2 * ranks if ranks > 1 else 1)
            losses = _losses(model, config, max(1, min(chunk, model.min_window)))
            return all(trained <= _leaves(loss) for loss in losses)
    finally:
        log.setLevel(level)
        dispatch.reset()


def _losses(model: Backbone, config: TrainConfig, length: int) -> Iterator[Tensor]:
    """The losses of every kind of step over a text of so many tokens."""
    tokens = torch.zeros((1, length + 1), dtype=torch.long)
    first = whole = None
    if config.extension.positions is not None:
        whole = torch.arange(2 * length)[None]
        first = whole[:, :length]
    if config.objective == "masked":
        shown = tokens[:, 1:]
        yield model.masked_loss(shown, shown, torch.ones_like(shown, dtype=torch.bool))
    elif ranks_per_window(config) > 1 or config.state_passing == "carry":
        loss, state = model.loss(tokens, model.empty_state(1), first)
        yield loss
        yield model.loss(tokens, model.truncate_state(state, length), whole)[0]
    else:
        yield model.loss(tokens, positions=first)


def _leaves(loss: Tensor) -> set[int]:
    """The ids of the tensors that a loss has a gradient for."""
    found, seen, left = set(), set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        left += [below for below, _ in node.next_functions]
    return found
