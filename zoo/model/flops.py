"""Floating-point operations of a model."""

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
    # Without gradients of their own: the counter hooks any input that seems to need one.
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def per_token(length: int) -> float:
        sample = torch.zeros(1, length, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, weights, (sample,))
        return counter.get_total_flops() / length

    count = per_token(long)
    if tokens == long:
        return count
    slope = (count - per_token(long // 2)) / (long - long // 2)
    return count + slope * (tokens - long)
