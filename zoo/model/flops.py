"""Floating-point operations of a model."""

import functools
import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.model.backbone import Backbone

FLOP_PROBE = 1024  # tokens; a longer window's operations are extrapolated from here
MOST_COUNTED, PARAMETERS_READ = 2048, 2**32  # tokens, and tokens times parameters, of a small model
PER_OCTAVE = 8  # lengths at which operations are counted


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


class ReadingCost:
    """Operations of reading T tokens at once, by T.

    Counted at eight lengths of each octave as they are needed, the operations per token on a line
    in between: windows and blocks have kinks that no one line has. Beyond the longest length that
    is counted the line goes on through it and its half, as that of `forward_flops`.

    Args:
        per_token: the operations per token of reading so many at once.
        longest: the most tokens to count at.
    """

    def __init__(self, per_token: Callable[[int], float], longest: int) -> None:
        self._per_token, self.longest = functools.cache(per_token), longest

    def of(self, tokens: int, start: int = 0) -> float:
        """Operations of reading so many tokens behind `start` that were read."""
        return self._whole(start + tokens) - self._whole(start)

    def tokens(self, flops: float) -> int:
        """The most tokens that so many operations read, at least 0."""
        few, many = 0, 1
        while self._whole(many) <= flops:
            few, many = many, 2 * many
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if self._whole(middle) <= flops else (few, middle)
        return few

    def _whole(self, tokens: int) -> float:
        if tokens < 1:
            return 0.0
        low, high = self._around(tokens)
        least = self._per_token(low)
        if low == high:
            return least * tokens
        slope = (self._per_token(high) - least) / (high - low)
        return (least + slope * (tokens - low)) * tokens

    def _around(self, tokens: int) -> tuple[int, int]:
        """The lengths that are counted, at or below and at or above."""
        if tokens > self.longest:
            return max(1, self.longest // 2), self.longest
        place = math.floor(PER_OCTAVE * math.log2(tokens)) - 1
        places = (round(2 ** (n / PER_OCTAVE)) for n in range(max(place, 0), place + 4))
        counted = sorted({min(node, self.longest) for node in places})
        low = max(node for node in counted if node <= tokens)
        return low, min(node for node in counted if node >= tokens)


def reading_cost(model: Backbone) -> ReadingCost:
    """What reading a text of any length computes.

    Counted up to `FLOP_PROBE` tokens, and farther where the model is small enough for that to take
    no longer than reading them.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    longest = max(FLOP_PROBE, min(MOST_COUNTED, PARAMETERS_READ // size))
    longest = min(longest, model.max_length or longest)
    return ReadingCost(functools.partial(_per_token, model), longest)


def _per_token(model: Backbone, length: int) -> float:
    """Operations per token of reading `length` tokens at once, as PyTorch counts them."""
    # Without gradients of their own: the counter hooks any input that seems to need one.
    weights = {name: p.detach() for name, p in model.named_parameters()}
    device = next(iter(weights.values())).device
    sample = torch.zeros(1, length, dtype=torch.long, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, weights, (sample,))
    return counter.get_total_flops() / length
