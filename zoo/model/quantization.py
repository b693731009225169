"""Weights in 8 or 4 bits: a quarter of the memory or less, and of what a token reads.

    int8   one scale per output:            w ~ s q,           q in -127 .. 127
    int4   scale and zero per group of 32:  w ~ s q + z,       q in -8 .. 7

rounded to nearest, scales and zeros in bfloat16: the weight-only forms of Dettmers 2022
(arXiv:2208.07339, section 2, without its outliers) and of Frantar 2022 (arXiv:2210.17323, "RTN").
Embeddings are int8 in both, as are matrices whose inputs do not cut into groups. A tied head is a
matrix like the others: in int4 it is kept beside the embedding, of which a token reads one row,
and of the head all.

`quantize_cache` keeps the keys and values that softmax attention caches in as few bits, see
zoo.mixers.quantized_cache. Other states and everything else stay as they are.

Products are in `zoo.ops.quantized_linear`: on the CPU they read the bits, elsewhere weights are
restored for each: the memory is saved, time is not.
"""

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from zoo.errors import refuse
from zoo.mixers.quantized_cache import RECENT, CacheBits, QuantizedCache
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.backbone import Backbone
from zoo.ops.linear import OwnProducts, linear
from zoo.ops.quantized_linear import GROUP, quantized_linears, restored, shape

log = logging.getLogger("zoo")

Bits = Literal["int8", "int4"]
MANY = 2**40  # tokens, after which a cache that stops growing has its full size
aten = torch.ops.aten


def quantize(model: Backbone, bits: Bits) -> Backbone:
    """Quantize the weights of a model's linear layers and embedding in place; return the model.

    The model can no longer be trained. What is quantized takes part in no gradient.
    """
    model.requires_grad_(False)
    before = weight_bytes(model)
    made: dict[tuple[int, Bits], nn.Parameter] = {}
    trained = {*model.frequencies.modules()} if model.frequencies is not None else set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module not in trained:
            form = _form(module, bits)
            key = id(module.weight), form  # a tied head is the embedding
            if key not in made:
                made[key] = nn.Parameter(QuantizedWeight.of(module.weight, form), False)
            module.weight = made[key]
    model.quantized = bits
    sizes = f"{weight_bytes(model) / 2**20:,.1f} of {before / 2**20:,.1f} MiB"
    log.info("weights in %s: %s", bits, sizes)
    return model


def quantize_cache(model: Backbone, bits: CacheBits) -> Backbone:
    """Keep the cache of every layer of softmax attention in 8 or 4 bits; return the model.

    The model can no longer be trained.

    Raises:
        UserError: no layer has such a cache, or heads cannot be packed.
    """
    layers = [one for one in model.sublayers() if isinstance(one, SoftmaxAttention)]
    if not layers:
        kinds = ", ".join(sorted({type(block.mixer).__name__ for block in model.layers}))
        rule = f"acts on the cache of layers of SoftmaxAttention, and this model's are of {kinds}"
        refuse("kv_cache", bits, rule, "Leave it out.")
    if not model.causal:
        rule = "acts on cached keys and values, and a model that reads both ways caches none"
        refuse("kv_cache", bits, rule, "Leave it out.")
    if not any(map(_rounds, layers)):
        rule = f"leaves the last {RECENT} tokens as they are, and no layer caches more"
        refuse("kv_cache", bits, rule, "Leave it out.")
    model.requires_grad_(False)
    for layer in layers:
        sizes = {"heads": layer.kv_heads, "head_width": layer.head_width}
        layer.kv_cache = QuantizedCache(bits, layer.positions, **sizes)
    model.quantized_cache = bits
    return model


def _rounds(layer: SoftmaxAttention) -> bool:
    """Whether a layer caches more than the recent tokens, which stay as they are."""
    pattern = layer.positions.pattern
    return layer.positions.cached(MANY) > RECENT or bool(pattern is not None and pattern.sinks)


def _form(module: nn.Linear | nn.Embedding, bits: Bits) -> Bits:
    """The form that a module's weight takes."""
    cuts = isinstance(module, nn.Linear) and module.in_features % GROUP == 0
    return bits if cuts else "int8"


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a model's weights take, each tensor counted once."""
    found: dict[int, int] = {}
    for weight in model.parameters():
        parts = getattr(weight, "parts", (weight,))
        found |= {part.data_ptr(): part.numel() * part.element_size() for part in parts}
    return sum(found.values())


class QuantizedWeight(OwnProducts):
    """A matrix (n, k) that is kept in 8 or 4 bits and read like any other.

    Products and rows are taken from the bits; whatever else is done with it restores it first, so
    that a slice or view of it is a copy. It is neither written to nor trained, and has no memory of
    its own, both of which raise `RuntimeError`: `parts` are what is kept, the q and scales of
    `zoo.ops.quantized_linear`.
    """

    parts: tuple[Tensor, Tensor]

    @staticmethod
    def __new__(cls, parts: tuple[Tensor, Tensor], dtype: torch.dtype) -> Any:
        size, device = shape(*parts), parts[0].device
        made = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)  # type: ignore[attr-defined]
        # What is written in C, such as torch.utils.dlpack.to_dlpack, would take a null pointer.
        torch._C._set_throw_on_mutable_data_ptr(made)
        return made

    def __init__(self, parts: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        del dtype
        self.parts = parts  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def of(cls, weight: Tensor, bits: Bits) -> "QuantizedWeight":
        """The nearest one to a matrix (n, k) of floating point numbers."""
        w = weight.detach().float()
        if bits == "int8":
            scale = (w.abs().amax(1, keepdim=True) / 127).clamp(min=2.0**-60).bfloat16()
            q = (w / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
            return cls((q, scale), weight.dtype)
        groups = w.unflatten(1, (-1, GROUP))
        low, high = groups.amin(2), groups.amax(2)
        scale = ((high - low) / 15).clamp(min=2.0**-60).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        steps = (groups - zero.float()[:, :, None]) / scale.float()[:, :, None]
        first, second = steps.round_().clamp_(-8, 7).to(torch.int8).chunk(2, 2)
        q = ((second << 4) | (first & 15)).flatten(1)
        return cls((q, torch.stack([scale, zero], 2).flatten(1)), weight.dtype)

    def restored(self) -> Tensor:
        """The matrix that it stands for, in its dtype."""
        return restored(*self.parts, self.dtype)

    def rows(self, index: Tensor) -> Tensor:
        """The rows that an embedding looks up."""
        q, scale = (F.embedding(index, part) for part in self.parts)
        return restored(q, scale, self.dtype)

    def share_memory_(self) -> "QuantizedWeight":
        """Move what is kept into memory that processes share; return the weight."""
        for part in self.parts:
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether `share_memory_` was called."""
        return all(part.is_shared() for part in self.parts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.parts, self.dtype, isinstance(self, nn.Parameter))

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedWeight":
        if id(self) not in memo:  # Tensor's own takes the address
            parts = copy.deepcopy(self.parts, memo)
            memo[id(self)] = _rebuild(parts, self.dtype, isinstance(self, nn.Parameter))
        return memo[id(self)]

    def cut(self, chunks: int) -> "list[QuantizedWeight]":
        """As `chunk` along the outputs."""
        pairs = zip(*(part.chunk(chunks) for part in self.parts), strict=True)
        return [QuantizedWeight(pair, self.dtype) for pair in pairs]

    @staticmethod
    def products(
        x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        matrices = [weight.parts for weight in weights if isinstance(weight, QuantizedWeight)]
        if len(matrices) < len(weights):
            return [linear(x, *one) for one in zip(weights, biases, strict=True)]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ys = quantized_linears(x, matrices)
        pairs = zip(ys, biases, strict=True)
        return [y if bias is None else y + bias.to(y.dtype) for y, bias in pairs]

    def __repr__(self, **_: Any) -> str:
        bits = "int8" if self.parts[1].shape[1] == 1 else "int4"
        return f"QuantizedWeight({bits}, {tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.linear, F.embedding):
            # whichever way they are given
            given = dict(zip(_ARGUMENTS[func], args, strict=False)) | kwargs
            if given.get("max_norm") is not None:
                raise RuntimeError(READ_ONLY)
            if isinstance(given["weight"], cls):
                if func is F.embedding:
                    return given["weight"].rows(given["input"])
                bias = given.get("bias")
                return cls.products(given["input"], (given["weight"],), (bias,))[0]
        if func in _READ:
            return getattr(args[0].restored(), func.__name__)(*args[1:], **kwargs)
        if func in _ADDRESSES:
            raise RuntimeError(NO_MEMORY)
        if func == _SET_DATA and isinstance(args[1], cls):
            args[0].parts = args[1].parts  # as nn.Module.to and share_memory assign
        elif func in _WRITES or (func in _TRAINS and (len(args) < 2 or args[1])):
            raise RuntimeError(READ_ONLY)
        if func in (Tensor.chunk, torch.chunk) and len(args) == 2 and not kwargs:
            return args[0].cut(args[1])
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
        parts = func.decompose(*args, **kwargs)  # inference mode passes composite operations whole
        if parts is not NotImplemented:
            return parts
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].parts, args[0].dtype)
        if func is aten.clone.default:
            q, scale = args[0].parts
            return cls((q.clone(), scale.clone()), args[0].dtype)
        if func is aten._to_copy.default:
            dtype = kwargs.get("dtype") or args[0].dtype  # what is restored is restored to it
            place = {name: kwargs[name] for name in ("device", "non_blocking") if name in kwargs}
            strided = kwargs.get("layout", torch.strided) in (None, torch.strided)
            if strided and dtype.is_floating_point and not kwargs.get("pin_memory"):
                q, scale = args[0].parts
                return cls((q.to(**place), scale.to(**place)), dtype)
        if func._schema.is_mutable and _is_written(func._schema, args, kwargs):
            raise RuntimeError(READ_ONLY)
        restored = functools.partial(tree_map_only, cls, cls.restored)
        return func(*restored(args), **restored(kwargs))


READ_ONLY = "a quantized weight is not written to or trained: quantize the model again"
NO_MEMORY = "a quantized weight has no memory of its own: `parts` have, or a copy, `restored()`"

_ARGUMENTS: dict[Callable, list[str]] = {
    F.linear: ["input", "weight", "bias"],
    F.embedding: ["input", "weight", "padding_idx", "max_norm"],
}
_READ = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}
_ADDRESSES = {Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage, Tensor._typed_storage}
_ADDRESSES |= {Tensor.const_data_ptr}  # type: ignore[attr-defined]
_SET_DATA, _SET_REQUIRES_GRAD = (getattr(Tensor, x).__set__ for x in ("data", "requires_grad"))
_WRITES = {Tensor.__setitem__, Tensor.apply_, Tensor.map_, _SET_DATA}
_TRAINS = {Tensor.requires_grad_, _SET_REQUIRES_GRAD}  # without a word or with True


def _is_written(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call writes to a quantized weight, alone or in a list."""
    given = dict(zip((one.name for one in schema.arguments), args, strict=False)) | kwargs
    return any(
        isinstance(value, QuantizedWeight)
        for one in schema.arguments
        if one.alias_info is not None and one.alias_info.is_write
        for value in tree_leaves(given.get(one.name))
    )


def _rebuild(
    parts: tuple[Tensor, Tensor], dtype: torch.dtype, is_parameter: bool
) -> QuantizedWeight:
    """Restore one that was pickled, also by `torch.load` with weights_only."""
    weight = QuantizedWeight(parts, dtype)
    return nn.Parameter(weight, False) if is_parameter else weight  # type: ignore[return-value]


torch.serialization.add_safe_globals([_rebuild])
