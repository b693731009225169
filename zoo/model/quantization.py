"""Weights in 8 or 4 bits: a quarter of the memory or less, and of what a token reads.

    int8   one scale per output:            w ~ s q,           q in -127 .. 127
    int4   scale and zero per group of 32:  w ~ s (q - 8) + z, q in 0 .. 15

rounded to nearest, scales and zeros in bfloat16: the weight-only forms of Dettmers 2022
(arXiv:2208.07339, section 2, without its outliers) and of Frantar 2022 (arXiv:2210.17323, "RTN").
Embeddings are int8 in both, as are matrices that do not cut into groups. Everything else, states
included, stays as it is, and so do matrices of a number of inputs that is no multiple of 16.

On the CPU a product takes PyTorch's own kernels for such weights: inputs are rounded to bfloat16,
sums are in float32, outputs in bfloat16. Elsewhere, and in float64, weights are restored for each
product: the memory is saved, time is not.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zoo.model.backbone import Backbone

log = logging.getLogger("zoo")

Bits = Literal["int8", "int4"]
GROUP = 32  # inputs that share a scale
LANES = 16  # inputs that the kernel of int8 reads at a time: it ends the process for others
ROWS = 64  # outputs that PyTorch's packed form keeps together
aten = torch.ops.aten


def quantize(model: Backbone, bits: Bits) -> Backbone:
    """Quantize the weights of a model's linear layers and embedding in place; return the model.

    The model can no longer be trained. What is quantized takes part in no gradient.
    """
    model.requires_grad_(False)
    before = weight_bytes(model)
    made: dict[tuple[int, Bits | None], nn.Parameter] = {}
    trained = {*model.frequencies.modules()} if model.frequencies is not None else set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module not in trained:
            form = _form(module, bits)
            key = id(module.weight), form  # a tied head is the embedding
            if form and key not in made:
                made[key] = nn.Parameter(QuantizedWeight.of(module.weight, form), False)
            module.weight = made.get(key, module.weight)
    model.rounding = torch.bfloat16
    sizes = f"{weight_bytes(model) / 2**20:,.1f} of {before / 2**20:,.1f} MiB"
    log.info("weights in %s: %s", bits, sizes)
    return model


def _form(module: nn.Linear | nn.Embedding, bits: Bits) -> Bits | None:
    """The form that a module's weight takes; None where PyTorch's kernels cannot have it."""
    outputs, inputs = module.weight.shape
    if isinstance(module, nn.Embedding):
        return "int8"
    if bits == "int4" and inputs % GROUP == 0 and outputs % ROWS == 0:
        return "int4"
    return "int8" if inputs % LANES == 0 else None


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a model's weights take, each tensor counted once."""
    found: dict[int, int] = {}
    for weight in model.parameters():
        parts = getattr(weight, "parts", (weight,))
        found |= {part.data_ptr(): part.numel() * part.element_size() for part in parts}
    return sum(found.values())


class QuantizedWeight(Tensor):
    """A matrix (n, k) that is kept in 8 or 4 bits and used like any other.

    Products and rows are taken from the bits; whatever else is done with it restores it first.
    `parts` are its tensors:

        int8   q (n, k) int8 and s (n,)
        int4   q packed by PyTorch, and (s, z) (k / GROUP, n, 2)
    """

    bits: Bits
    parts: tuple[Tensor, Tensor]

    @staticmethod
    def __new__(cls, bits: Bits, parts: tuple[Tensor, Tensor], dtype: torch.dtype) -> Any:
        values, scales = parts
        shape = values.shape if bits == "int8" else (scales.shape[1], GROUP * scales.shape[0])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=values.device)  # type: ignore[attr-defined]

    def __init__(self, bits: Bits, parts: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        del dtype
        self.bits, self.parts = bits, parts

    @classmethod
    def of(cls, weight: Tensor, bits: Bits) -> "QuantizedWeight":
        """The nearest one to a matrix (n, k) of floating point numbers."""
        w = weight.detach().float()
        if bits == "int8":
            scales = (w.abs().amax(1) / 127).clamp(min=2.0**-60).bfloat16()
            values = (w / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
            return cls(bits, (values, scales), weight.dtype)
        groups = w.unflatten(1, (-1, GROUP))
        low, high = groups.amin(2), groups.amax(2)
        scale = ((high - low) / 15).clamp(min=2.0**-60).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        steps = (groups - zero.float()[:, :, None]) / scale.float()[:, :, None]
        values = (steps.round_() + 8).clamp_(0, 15).to(torch.int32).flatten(1)
        packed = aten._convert_weight_to_int4pack_for_cpu(values.cpu(), 2).to(w.device)
        both = torch.stack([scale, zero], 2).transpose(0, 1).contiguous()
        return cls(bits, (packed, both), weight.dtype)

    def restored(self) -> Tensor:
        """The matrix that it stands for, in its dtype."""
        values, scales = self.parts
        if self.bits == "int8":
            return (values.float() * scales.float()[:, None]).to(self.dtype)
        scale, zero = scales.float().transpose(0, 1).unbind(2)
        steps = unpacked(values) - 8.0
        groups = steps.unflatten(1, (-1, GROUP)) * scale[:, :, None] + zero[:, :, None]
        return groups.flatten(1).to(self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x (.., k) times its transpose: (.., n), in bfloat16. On the CPU."""
        rows, (values, scales) = x.reshape(-1, x.shape[-1]).bfloat16(), self.parts
        shape = (*x.shape[:-1], self.shape[0])
        if not len(rows):
            return rows.new_empty(shape)
        if self.bits == "int8":
            y = aten._weight_int8pack_mm(rows, values, scales)
        else:
            y = aten._weight_int4pack_mm_for_cpu(rows, values, GROUP, scales)
        return y.view(shape)

    def rows(self, index: Tensor) -> Tensor:
        """The rows that an embedding looks up, of int8."""
        values, scales = (part[index] for part in self.parts)
        return (values.float() * scales.float()[..., None]).to(self.dtype)

    def cut(self, chunks: int) -> "list[QuantizedWeight]":
        """As `chunk` along the outputs, where parts of the packed form are whole."""
        size = -(-self.shape[0] // chunks)
        if self.bits == "int8":
            pairs = zip(*(part.split(size) for part in self.parts), strict=True)
        else:
            packed, both = self.parts
            pairs = zip(
                packed.split(size), (b.contiguous() for b in both.split(size, 1)), strict=True
            )
        return [QuantizedWeight(self.bits, pair, self.dtype) for pair in pairs]

    def __repr__(self, **_: Any) -> str:
        return f"QuantizedWeight({self.bits}, {tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1], cls):
            return _linear(args[0], args[1], *args[2:], **kwargs)
        if func is F.embedding and args[1].bits == "int8":
            return args[1].rows(args[0])
        if func in (Tensor.chunk, torch.chunk) and len(args) == 2 and not kwargs:
            weight, chunks = args
            if weight.bits == "int8" or weight.shape[0] % (ROWS * chunks) == 0:
                return weight.cut(chunks)
        if func in (Tensor.new_empty, Tensor.new_zeros):
            own = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
            return func(own, *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].bits, args[0].parts, args[0].dtype)
        if func is aten.clone.default:
            parts = tuple(part.clone() for part in args[0].parts)
            return cls(args[0].bits, parts, args[0].dtype)
        if func is aten._to_copy.default and kwargs.keys() <= {"dtype", "device", "non_blocking"}:
            dtype = kwargs.get("dtype") or args[0].dtype  # what is restored is restored to it
            place = {name: one for name, one in kwargs.items() if name != "dtype"}
            return cls(args[0].bits, tuple(part.to(**place) for part in args[0].parts), dtype)
        restored = functools.partial(tree_map_only, cls, cls.restored)
        return func(*restored(args), **restored(kwargs))


def _linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return F.linear(x, weight.restored().to(x.dtype), bias)
    y = weight.product(x)
    y = y if torch.is_autocast_enabled("cpu") else y.to(x.dtype)
    return y if bias is None else y + bias


def unpacked(packed: Tensor) -> Tensor:
    """The values 0 .. 15 (n, k), float32, of PyTorch's packed form on this machine.

    The form differs with the vector instructions, so that it is read by the product itself: each
    row of the identity picks a column. With scale 1 and zero 0 all products are small integers.
    """
    n, k = packed.shape[0], 2 * packed.shape[1]
    plain = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(k // GROUP, n, 2).contiguous()
    columns = torch.eye(k, dtype=torch.bfloat16)
    found = aten._weight_int4pack_mm_for_cpu(columns, packed.cpu(), GROUP, plain)
    return (found.float() + 8).T.to(packed.device)
