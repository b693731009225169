"""Compares random calls of every op that has a C kernel with its definition in float64.

The tests of an op define `random_<folder>_call(draw)`, by its folder of kernels/, which draws one
call: shapes with zeros, ones, odd sizes and several chunks, tensors that lie anyhow in memory,
strong decays.
"""

import functools
import importlib
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.wkv4 import LOG_ZERO

# Of the norm of a result, besides what the definition itself loses in that type.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2.0**-8}
FLOOR = 0.01  # of the rounding of 1, to which terms of a sum that cancels are rounded
WORSE = 10  # times the definition's own error

Layout = Callable[[Tensor], Tensor]


class Call(NamedTuple):
    """`run(backend, *tensors)` -> results; of each tensor its leaf and how it lies in memory."""

    run: Callable[..., tuple[Tensor, ...]]
    tensors: list[tuple[Tensor, Layout]]
    definition: str = "reference"
    gradients: bool = True
    unspoilt: tuple[int, ...] = ()  # whose NaN may go further than the definition's
    # Tensors whose gradient is a sum that cancels of products of that of another, and itself
    cancelling: tuple[tuple[int, ...], int] = ((), 0)
    spoilt: bool = False


class Draw:
    """Random choices of one case."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.random, self.dtype = random.Random(seed), dtype
        self.torch = torch.Generator().manual_seed(seed)
        self.wide = torch.promote_types(dtype, torch.float32)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def size(self, *more: int, zero: bool = True) -> int:
        """Mostly small; `more` are sizes at which something begins anew."""
        around = [m + i for m in more for i in (-1, 0, 1)]
        pool = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, *around, *around]
        return self.random.choice(pool + [0] * zero)

    def batch(self) -> int:
        return self.random.choice([0, 1, 1, 2, 2, 3])

    def values(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.torch, dtype=torch.float64)
        return values.to(dtype or self.dtype)

    def maybe(self, tensor: Tensor) -> Tensor | None:
        return tensor if self.chance(0.6) else None

    def layout(self, tensor: Tensor) -> tuple[Tensor, Layout]:
        """The leaf of a tensor, and a form of it in memory; what lies around it is NaN."""
        forms: list[Layout] = [_dense, _dense, _offset, _spread, _among_others]
        if tensor.dim() >= 2:
            forms += [_transposed, functools.partial(_cut, step=2), _reversed_twice]
            axis = self.random.randrange(tensor.dim())
            if tensor.shape[axis] > 1:
                return (
                    self._expanded(tensor, axis)
                    if self.chance(0.1)
                    else (tensor, self.random.choice(forms))
                )
        return tensor, self.random.choice(forms)

    def _expanded(self, tensor: Tensor, axis: int) -> tuple[Tensor, Layout]:
        shape = tensor.shape
        return tensor.narrow(axis, 0, 1).clone(), lambda leaf: leaf.expand(shape)

    def spoil(self, tensors: list[Tensor]) -> None:
        """NaN and infinities in one or two places."""
        for _ in range(self.random.choice([1, 1, 2])):
            tensor = self.random.choice(tensors)
            if tensor.numel():
                value = self.random.choice([math.nan, math.inf, -math.inf])
                tensor.view(-1)[self.random.randrange(tensor.numel())] = value


def _dense(a: Tensor) -> Tensor:
    return a


def _offset(a: Tensor) -> Tensor:
    """Not at the start of its storage, nor aligned."""
    return torch.cat([a.new_full((3,), math.nan), a.reshape(-1)])[3:].view(a.shape)


def _spread(a: Tensor) -> Tensor:
    """No two numbers are neighbours."""
    return torch.stack([a, torch.full_like(a, math.nan)], -1)[..., 0]


def _among_others(a: Tensor) -> Tensor:
    """Part of a wider tensor, as of one projection that makes several."""
    if not a.dim():
        return a
    wall = a.new_full((*a.shape[:-1], 2), math.nan)
    return torch.cat([wall, a, wall], -1)[..., 2 : 2 + a.shape[-1]]


def _transposed(a: Tensor) -> Tensor:
    return a.transpose(-1, -2).contiguous().transpose(-1, -2)


def _cut(a: Tensor, step: int) -> Tensor:
    """Every other row of a tensor."""
    return torch.stack([a, torch.full_like(a, math.nan)], 1).flatten(0, 1)[::step]


def _reversed_twice(a: Tensor) -> Tensor:
    """Dimensions in another order in memory."""
    order = [*range(a.dim())][::-1]
    return a.permute(order).contiguous().permute(order)


def averages(op: Callable) -> Callable:
    """`op` with its state given as what it represents: the average, and how much it weighs.

    Where two weights are the largest, the gradient of the state's own numbers is anyone's choice.
    """

    def run(*args, **options):
        y, state = op(*args, **options)
        p, q, o = state.unbind(1)
        some = q != 0
        q = q.masked_fill(~some, 1)
        return y, (p / q).masked_fill(~some, 0), (q.log() + o).masked_fill(~some, 0)

    return run


def average_so_far(draw: Draw, b: int, d: int) -> Tensor:
    """Numerator, denominator and maximum of a state, of which some have seen no token."""
    state = draw.values(b, 3, d, dtype=draw.wide)
    state[:, 1] = state[:, 1].abs() + 0.5
    if draw.chance(0.3):
        state[:1] = torch.tensor([0.0, 0.0, LOG_ZERO], dtype=draw.wide)[:, None]
    return state


def by_name(draw: Draw, op: Callable, tensors: dict[str, Tensor | None]) -> Call:
    given = {name: x for name, x in tensors.items() if x is not None}

    def run(backend, *values):
        return op(**dict(zip(given, values, strict=True)), backend=backend)

    return Call(run, [draw.layout(x) for x in given.values()])


@functools.cache
def cases() -> dict[str, tuple[Callable[[Draw], Call], tuple[torch.dtype, ...]]]:
    """Find `random_<folder>_call` in the tests beside this file, and the NARROW types it may draw.

    Returns folder of kernels/ -> (that function, types).
    """
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        pattern = r"^def (random_(\w+)_call)\("
        for name, folder in re.findall(pattern, path.read_text(), re.MULTILINE):
            module = importlib.import_module(path.stem)
            found[folder] = getattr(module, name), getattr(module, "NARROW", ())
    return found


def examine(name: str, seed: int, share: float = 0.3) -> None:
    """Draw a call of an op and assert that its kernel gives what the definition gives.

    Outputs, states and all gradients, with one to three threads, with and without a gradient. A
    `share` of the calls has NaN or infinities in it, which must show where they do by the
    definition, and nowhere else; gradients are then compared in the rows without any.
    """
    rng, (case, narrow) = random.Random(seed), cases()[name]
    draw = Draw(seed, rng.choice([torch.float32, torch.float64, *narrow]))
    call = case(draw)
    spoilt = rng.random() < share
    if spoilt:
        leaves = [leaf for leaf, _ in call.tensors]
        draw.spoil([x for i, x in enumerate(leaves) if i not in call.unspoilt])
        call = call._replace(spoilt=True)
    with_gradients = call.gradients and rng.random() < 0.7
    threads = torch.get_num_threads()
    torch.set_num_threads(rng.choice([1, 1, 2, 3]))
    try:
        found = results(call, "native", seed, with_gradients)
    finally:
        torch.set_num_threads(threads)
    exact = results(call, call.definition, seed, with_gradients, torch.float64)
    same_type = results(call, call.definition, seed, with_gradients)
    outputs = len(found) - len(call.tensors) * with_gradients
    sound = sound_rows(exact[:outputs])
    for index, triple in enumerate(zip(found, exact, same_type, strict=True)):
        assert triple[0].dtype == triple[2].dtype
        assert triple[0].shape == triple[1].shape
        if spoilt and index >= outputs:
            triple = [x[sound] if len(x) == len(sound) else x[:0] for x in triple]
        terms = 0.0
        if index - outputs in call.cancelling[0]:
            other = call.cancelling[1]
            values = call.tensors[other][0].detach().double().nan_to_num(0, 0, 0)
            size = exact[outputs + other].detach().norm().nan_to_num(0, 0, 0)
            terms = float(size * values.norm(torch.inf)) if values.numel() else 0.0
        problem = difference(*(x.double() for x in triple), draw.dtype, terms)
        assert not problem, f"{name}, seed {seed}, result {index} of {len(found)}: {problem}"


def sound_rows(outputs: list[Tensor]) -> Tensor:
    """Which rows of the batch are finite, by the definition: of no other is a gradient defined."""
    finite = [x.isfinite().flatten(1).all(1) for x in outputs if len(x) == len(outputs[0])]
    return torch.stack(finite).all(0)


def results(
    call: Call, backend: str, seed: int, gradients: bool, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """What the call returns, then the gradients of a random function of some of it."""
    leaves = [leaf.to(dtype or leaf.dtype).requires_grad_(gradients) for leaf, _ in call.tensors]
    given = [layout(leaf) for leaf, (_, layout) in zip(leaves, call.tensors, strict=True)]
    with torch.set_grad_enabled(gradients):
        returned = call.run(backend, *given)
    if not gradients:
        return list(returned)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in returned]
    weights = [w.bfloat16().to(x.dtype) for w, x in zip(weights, returned, strict=True)]
    used = (
        range(len(returned))
        if call.spoilt
        else rng.sample(range(len(returned)), rng.randint(1, len(returned)))
    )
    grads = torch.autograd.grad(
        [returned[i] for i in used], leaves, [weights[i] for i in used], allow_unused=True
    )
    zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [x.detach() for x in (*returned, *zeros)]


def difference(
    value: Tensor, wanted: Tensor, defined: Tensor, dtype: torch.dtype, terms: float = 0
) -> str | None:
    """What is wrong with `value`, or None; `terms` is the size of what cancels in it."""
    # What is beyond the narrower type's range but not float64's may come out either way.
    flawed = value.isfinite() != wanted.isfinite()
    flawed &= value.isfinite() != defined.isfinite()
    if flawed.any():
        return f"{int(flawed.sum())} of {value.numel()} are finite here or by the definition alone"
    finite = wanted.isfinite() & value.isfinite() & defined.isfinite()
    value, wanted, defined = (x[finite] for x in (value, wanted, defined))
    error, lost = (value - wanted).norm(), (defined - wanted).norm()
    smallest = FLOOR * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    size = max(float(wanted.norm()), terms)
    allowed = TOLERANCE[dtype] * size + WORSE * lost.nan_to_num(0, 0, 0)
    allowed = max(allowed, smallest * wanted.numel() ** 0.5)
    return (
        None
        if error <= allowed
        else f"off by {error:.1e} of {wanted.norm():.1e}, not {allowed:.1e}"
    )
