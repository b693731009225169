"""Floating-point operations of a model."""

import functools
import math
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention.pattern import BLOCK_QUERIES, AttentionPattern
from zoo.model.backbone import Backbone
from zoo.ops.linear import OwnProducts

CHUNK = 512  # tokens: a multiple of the chunks of recurrences and of bounded windows
FARTHEST = 2**20  # tokens at which a state is looked at
STRAIGHT = 0.01  # of a state's bytes: what the rounding of blocks may add to a straight line
PER_OCTAVE = 8  # lengths at which operations are counted


def forward_flops(model: Backbone, tokens: int) -> float:
    """Floating-point operations per token of reading `tokens` tokens once.

    Counted at that length, or continued from two or three shorter ones (see `ReadingCost`).
    """
    cost = reading_cost(model)
    return _per_token(model, tokens) if tokens <= cost.longest else cost.of(tokens) / tokens


class ReadingCost:
    """Operations of reading T tokens at once, by T.

    Counted at eight lengths of each octave as they are needed, the operations per token on a line
    in between. Behind the longest window each token adds as many operations as the one before, or,
    where the number of keys goes on growing, by the same more: the operations of longer texts go
    on from the counted ones as a line or as a parabola.

    Args:
        per_token: the operations per token of reading so many at once.
        longest: the most tokens to count at, an even number: every window is full within half.
        grows: whether the keys that a token sees become more without end.
    """

    def __init__(
        self, per_token: Callable[[int], float], longest: int, *, grows: bool = True
    ) -> None:
        self._per_token, self.longest = functools.cache(per_token), longest
        self.grows = grows

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
        if tokens > self.longest:
            return self._beyond(tokens)
        low, high = self._around(tokens)
        least = self._per_token(low)
        if low == high:
            return least * tokens
        slope = (self._per_token(high) - least) / (high - low)
        return (least + slope * (tokens - low)) * tokens

    def _beyond(self, tokens: int) -> float:
        """On the line or parabola through the counts at the longest length, at its half and, of a
        parabola, in the middle of these."""
        half = self.longest // 2
        middle, last = (half + self.longest) // 2, self.longest
        least, most = self._per_token(half) * half, self._per_token(last) * last
        slope = (most - least) / (last - half)
        whole = most + slope * (tokens - last)
        if not self.grows:
            return whole
        between = self._per_token(middle) * middle
        bend = ((most - between) / (last - middle) - slope) / (middle - half)
        return whole + bend * (tokens - half) * (tokens - last)

    def _around(self, tokens: int) -> tuple[int, int]:
        """The lengths that are counted, at or below and at or above."""
        place = math.floor(PER_OCTAVE * math.log2(tokens)) - 1
        places = (round(2 ** (n / PER_OCTAVE)) for n in range(max(place, 0), place + 4))
        counted = sorted({min(node, self.longest) for node in places})
        low = max(node for node in counted if node <= tokens)
        return low, min(node for node in counted if node >= tokens)


def reading_cost(model: Backbone) -> ReadingCost:
    """What reading a text of any length computes."""
    found = (getattr(module, "pattern", None) for module in model.modules())
    patterns = [pattern for pattern in found if isinstance(pattern, AttentionPattern)]
    # Windows bend the growth of the state, but for patterns that keep keys beyond them.
    windows = [1, *(pattern.longest_window for pattern in patterns)]
    full = max(_full_from(model.state_bytes), *(1 << (n - 1).bit_length() for n in windows))
    grows = model.state_bytes(FARTHEST) > model.state_bytes(FARTHEST // 2)
    steps = [step for pattern in patterns for step in pattern.steps]
    block = max([*steps, BLOCK_QUERIES if grows or patterns else CHUNK])
    longest = 2 * max((1 + grows) * block, 2 * full)  # a parabola has its middle at a whole block
    count = functools.partial(_per_token, model)
    return ReadingCost(count, min(longest, model.max_length or longest), grows=grows)


def _full_from(state_bytes: Callable[[int], int]) -> int:
    """The power of two from which on a state grows on one line, if at all: every window is full."""
    lengths = [2**n for n in range(FARTHEST.bit_length())]
    sizes = [state_bytes(length) for length in lengths]
    for at in reversed(range(len(lengths) - 2)):
        one, two, four = sizes[at : at + 3]
        if abs((four - two) - 2 * (two - one)) > STRAIGHT * four:
            return lengths[at + 1]
    return 1


def _per_token(model: Backbone, length: int) -> float:
    """Operations per token of reading `length` tokens at once, as PyTorch counts them.

    Nothing is computed: PyTorch's fake tensors have shapes and no values.
    """
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    device = next(iter(weights.values())).device
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    fake_weights = {name: _fake(x, fakes) for name, x in weights.items()}
    with torch.no_grad(), fakes, FlopCounterMode(display=False) as counter:
        sample = torch.zeros(1, length, dtype=torch.long, device=device)
        torch.func.functional_call(model, fake_weights, (sample,))
    return counter.get_total_flops() / length


def _fake(weight: torch.Tensor, fakes: FakeTensorMode) -> torch.Tensor:
    """A tensor of its shape, whose products count as what they compute, however it is kept.

    Without a gradient of its own: the counter hooks any input that seems to need one.
    """
    if isinstance(weight, OwnProducts):
        with fakes:
            return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return fakes.from_tensor(weight.detach())
