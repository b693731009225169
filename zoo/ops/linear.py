"""Computes products of rows x with matrices W (n, k), y = x W^T + b, fast for a few rows.

Backends: `reference` multiplies in float32 or better, `torch` is `F.linear`, `native` is
kernels/linear (CPU, at most MAX_ROWS rows, no gradient): one token's products cost one read of W.
`auto` takes the kernel where it is faster, and has `torch`'s own numbers everywhere else: in
training, for a prompt, for small matrices. Several matrices that read the same x are one call of
the kernel (`linears`), and stay where they are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from zoo.ops.dtypes import wide_dtype
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.dispatch import record, select_backend
from zoo.ops.runtime.native_op import can_bypass_dispatcher

MAX_ROWS = 2  # of x, for which the kernel is the faster one
MIN_WEIGHTS = 2**15  # numbers of W; a call of the kernel costs as much as reading so many
MAX_MATRICES = 4  # of one call of the kernel

_NUMBERS = ("", *range(1, MAX_MATRICES))
KERNEL = CpuKernel(
    "linear/linear.c",
    sizes=" ".join(["rows<=max_rows inputs", *(f"outputs{i}" for i in _NUMBERS)]),
    rows={"x": "1 rows inputs"} | {f"y{i}": f"1 rows outputs{i}" for i in _NUMBERS},
    pointers={f"weight{i}": f"outputs{i} inputs" for i in _NUMBERS}
    | {f"narrow{i}": f"outputs{i} inputs" for i in _NUMBERS}
    | {f"bias{i}": f"outputs{i}" for i in _NUMBERS},
    outputs=" ".join(f"y{i}" for i in _NUMBERS),
    dtypes={f"narrow{i}": torch.bfloat16 for i in _NUMBERS},
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_OUTPUTS = [f"y{i}" for i in _NUMBERS]
_ARRAYS = {kind: [(f"{kind}{i}", f"bias{i}") for i in _NUMBERS] for kind in ("weight", "narrow")}


class OwnProducts(Tensor):
    """A matrix that is no array of its numbers and computes its products itself.

    `parts` are the bits and scales of zoo.ops.quantized_linear, where it is kept as these.
    """

    parts: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def products(
        x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The products of x with several matrices, of which the first is one of this kind."""
        raise NotImplementedError


def linear(
    x: Float[Tensor, "... k"],
    weight: Float[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "... n"]:
    """The product, in x's dtype.

    Raises `ValueError` on shapes that do not fit, `UserError` where the backend is not available.
    """
    if backend == "auto":
        if isinstance(weight, OwnProducts):
            return weight.products(x, (weight,), (bias,))[0]
        ys = _by_kernel(x, (weight,), (bias,), MIN_WEIGHTS)
        return F.linear(x, weight, bias) if ys is None else ys[0]
    check("linear", {"x": "* k", "weight": "n k", "bias": "n?"}, x, weight, bias)
    accepted = KERNEL.usable if _accepts(x, (weight,), (bias,)) else False
    name = select_backend("linear", backend, {"native": accepted, "torch": True, "reference": True})
    if name == "torch":
        return F.linear(x, weight, bias)
    if name == "native" and (ys := _by_kernel(x, (weight,), (bias,), 0)):
        return ys[0]
    wide = wide_dtype(x)
    b_wide = None if bias is None else bias.to(wide)
    return F.linear(x.to(wide), weight.to(wide), b_wide).to(x.dtype)


def linears(
    x: Float[Tensor, "... k"],
    weights: Sequence[Float[Tensor, "_ k"]],
    biases: Sequence[Float[Tensor, "_"] | None],
) -> list[Float[Tensor, "... _"]]:
    """The products of x with several matrices, each as `linear` returns it."""
    if isinstance(weights[0], OwnProducts):
        return weights[0].products(x, weights, biases)
    ys = _by_kernel(x, weights, biases, MIN_WEIGHTS)
    if ys is None:
        return [linear(x, *one) for one in zip(weights, biases, strict=True)]
    return ys


def _by_kernel(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], least: int
) -> list[Tensor] | None:
    """The products by one call of the kernel; None where it does not take them, or where all
    matrices together have fewer numbers than `least`."""
    lead, k, dtype = x.shape[:-1], x.shape[-1], x.dtype
    if x.numel() > MAX_ROWS * k or len(weights) > MAX_MATRICES:
        return None
    narrow = dtype == torch.bfloat16
    arrays, outputs, numbers = _ARRAYS["narrow" if narrow else "weight"], [0] * MAX_MATRICES, 0
    rows = x if len(lead) == 2 and lead[0] == 1 else None
    given: dict[str, Tensor | None] = {"x": rows}
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != k:
            return None
        name, bias_name = arrays[i]
        given[name], given[bias_name] = weight, biases[i]
        outputs[i] = weight.shape[0]
        numbers += outputs[i] * k
    if numbers < least or not _accepts(x, weights, biases):
        return None
    if KERNEL.usable() is not True:
        select_backend("linear", "auto", {"native": KERNEL.usable, "torch": True})
        return None
    record("linear", "native")
    if rows is None:
        given["x"] = x.reshape(1, lead.numel(), k)
    if narrow:
        for name in ("x", *(f"bias{i}" for i in _NUMBERS)):
            one = given.get(name)
            given[name] = None if one is None else one.float()
    function, count = "bfloat16" if narrow else "real", lead.numel()
    ys = KERNEL.run(function, (count, k, *outputs), _OUTPUTS[: len(weights)], **given)
    if narrow:
        ys = [y.bfloat16() for y in ys]
    return ys if rows is not None else [y.view(*lead, y.shape[-1]) for y in ys]


def _accepts(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether the kernel reads these, whose shapes fit."""
    dtype = x.dtype
    if dtype not in _DTYPES or not x.is_cpu or x.layout != torch.strided:
        return False
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dtype != dtype or not weight.is_cpu or weight.layout != torch.strided:
            return False
        if bias is not None and (
            bias.dtype != dtype
            or bias.layout != torch.strided
            or bias.shape != weight.shape[:1]  # PyTorch broadcasts another
        ):
            return False
    few = x.shape[:-1].numel() <= MAX_ROWS
    return (
        few and can_bypass_dispatcher(x, *weights, *biases) and not torch.is_autocast_enabled("cpu")
    )


class Linear(nn.Linear):
    """PyTorch's layer, whose products are `linear`."""

    def forward(self, input: Float[Tensor, "... k"]) -> Float[Tensor, "... n"]:
        return linear(input, self.weight, self.bias)


def project(x: Float[Tensor, "... k"], *layers: nn.Module) -> list[Float[Tensor, "... _"]]:
    """What each layer makes of x, in one call of `linears` where all are no more than products."""
    weights, biases = [], []
    for layer in layers:
        if type(layer) is not Linear or is_hooked(layer):
            return [one(x) for one in layers]
        weights.append(layer.weight)
        biases.append(layer.bias)
    if globally_hooked() or torch.is_grad_enabled():
        return [one(x) for one in layers]
    return linears(x, weights, biases)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward: hooks, or one of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def globally_hooked() -> bool:
    """Whether there are hooks of all modules."""
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
