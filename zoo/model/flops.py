"""Floating-point operations of a model."""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.model.backbone import Backbone

FLOP_PROBE = 1024  # tokens; a longer window's operations are extrapolated from here


def forward_flops(model: Backbone, tokens: int) -> float:
    """Floating-point operations per token of reading `tokens` tokens once.

    Counted at that length up to `FLOP_PROBE`; beyond, at it and at its half: where a model is
    quadratic its cost per token is a + b * tokens.
    """
    long = min(tokens, FLOP_PROBE)
    count = _per_token(model, long)
    if tokens == long:
        return count
    slope = (count - _per_token(model, long // 2)) / (long - long // 2)
    return count + slope * (tokens - long)


class ReadingCost(NamedTuple):
    """Operations per token of reading T tokens at once: `fixed` + `growing` * T."""

    fixed: float
    growing: float

    def of(self, tokens: int, start: int = 0) -> float:
        """Operations of reading so many tokens behind `start` that were read."""
        end = start + tokens
        return self.fixed * tokens + self.growing * (end * end - start * start)

    def tokens(self, flops: float) -> int:
        """The most tokens that so many operations read, at least 0."""
        if flops <= 0:
            return 0
        if self.growing <= 0:
            return int(flops / self.fixed)
        half = self.fixed / (2 * self.growing)
        return int((half * half + flops / self.growing) ** 0.5 - half)


def reading_cost(model: Backbone) -> ReadingCost:
    """What `forward_flops` has for every length: a line through the probe and its half."""
    long = min(FLOP_PROBE, model.max_length or FLOP_PROBE)
    half = max(1, long // 2)
    if long == half:
        return ReadingCost(_per_token(model, long), 0.0)
    least, count = _per_token(model, half), _per_token(model, long)
    growing = (count - least) / (long - half)
    return ReadingCost(count - growing * long, growing)


def _per_token(model: Backbone, length: int) -> float:
    """Operations per token of reading `length` tokens at once, as PyTorch counts them."""
    # Without gradients of their own: the counter hooks any input that seems to need one.
    weights = {name: p.detach() for name, p in model.named_parameters()}
    device = next(iter(weights.values())).device
    sample = torch.zeros(1, length, dtype=torch.long, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, weights, (sample,))
    return counter.get_total_flops() / length
