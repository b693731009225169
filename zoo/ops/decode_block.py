"""Computes half of a block for one token in one call (CPU, forward only): kernels/decode_block.

    feed_forward    onto + norm'(W_last (f(W_1 u) * W_0 u))           u = norm(x)
    attention       onto + norm'(W_last (softmax(scale q k^T) v * sigmoid(W_3 u)))
                    q, k = R norm_q(W_0 u), R norm_k(W_1 u),  v = W_2 u, over all cached keys
    selective state onto + norm'(W_last ((C h + D c) * silu(z)))
                    (p, z) = W_0 u,  c = silu(convolution of p),  (r, B, C) = W_x c
                    h = exp(-dt exp(A_log)) h' + dt B c,  dt = softplus(W_dt r + b)

Without the gates W_1 and W_3, the norms, the biases and the rotation R where there are none.
Matrices are plain numbers or in 8 or 4 bits (zoo.ops.quantized_linear). In bfloat16 all is computed
in float32, and only what leaves the call is rounded. Whether the kernel computes a half is decided
by what it is made of (`half`); the caller has the same half operation by operation, for all else:
gradients, transforms, autocast, hooks, other types, several tokens.
"""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.ops.dtypes import wide_dtype
from zoo.ops.linear import Linear, OwnProducts, globally_hooked, is_hooked
from zoo.ops.rms_norm import OffsetRMSNorm, RMSNorm
from zoo.ops.runtime.cpu import BoundCall, CpuKernel, numbers
from zoo.ops.runtime.dispatch import is_transformed, record
from zoo.ops.runtime.native_op import can_bypass_dispatcher

MAX_MATRICES = 4  # that read u
MAX_HEADS = 128
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")  # as the kernel counts them
NORMS: dict[type[nn.Module], int] = {RMSNorm: 0, OffsetRMSNorm: 1, nn.LayerNorm: 2}  # likewise
LAYER = NORMS[nn.LayerNorm]
PLAIN, BFLOAT16, INT8, INT4 = 0, 1, 2, 3  # forms of a matrix, likewise

_FIRST = ("", *range(1, MAX_MATRICES))


def _matrix(rows: str, columns: str, form: str, place: object = "", prefix: str = "") -> dict:
    """The arrays of a matrix, as the kernel has them: their names and shapes."""
    shapes = f"{rows} {columns}", rows, f"{rows} {form}bytes", f"{rows} {form}scales"
    return {f"{prefix}{n}{place}": x for n, x in zip(_KINDS, shapes, strict=True)}


_KINDS = ("weight", "bias", "bits", "scale")
_MATRICES = [_matrix(f"outputs{i}", "width", "", i) for i in _FIRST]
_LAST = _matrix("width", "inner", "last_", prefix="last_")
_SELECTION = _matrix("rank+2*states", "inner", "selection_", prefix="selection_")
_STEP = _matrix("inner", "rank", "step_", prefix="step_")
_ALL_MATRICES = [*_MATRICES, _LAST, _SELECTION, _STEP]
_VECTORS = ("conv_weight", "conv_bias", "A_log", "D")
_BITS = {
    name: torch.int8 if "bits" in name else torch.bfloat16
    for matrix in _ALL_MATRICES
    for name in matrix
    if "bits" in name or "scale" in name
}
KERNEL = CpuKernel(
    "decode_block/decode_block.c",
    sizes=" ".join(["width inner", *(f"outputs{i}" for i in _FIRST)])
    + "".join(f" {m}form {m}bytes {m}scales" for m in ("", "last_", "selection_", "step_"))
    + " norm post_norm head_norm activation"
    " heads<=max_heads kv_heads head_width pairs keys states rank taps narrow",
    rows={},
    pointers={name: shape for matrix in _ALL_MATRICES for name, shape in matrix.items()}
    | {
        "x onto y": "1 1 width",
        "norm_weight norm_bias post_norm_weight post_norm_bias": "width",
        "q_norm k_norm": "head_width",
        "numbers": "5",
        "cos sin": "1 1 pairs",
        "k v": "1 keys kv_heads head_width",
        "conv_weight": "inner taps",
        "conv_bias": "inner",
        "A_log": "inner states",
        "D": "inner",
        "conv": "1 taps-1 inner",
        "h": "1 inner states",
        "conv_after": "1 taps-1 inner",
        "h_after": "1 inner states",
    },
    outputs="y k v conv_after h_after",
    dtypes=_BITS,
)
_WIDE = ("numbers", "cos", "sin", "h", "h_after")  # in float32 where all else is in bfloat16
NARROW = KERNEL.with_dtypes(
    {name: torch.bfloat16 for name in KERNEL.pointers if name not in _WIDE} | _BITS
)
INNER, KEYS = map([*KERNEL.bounds].index, ("inner", "keys"))

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MAX_BOUND = 4096  # halves of blocks whose calls are remembered


class HalfEnds(NamedTuple):
    """What is around a sublayer: onto + post_norm(sublayer(norm(x)))."""

    x: Float[Tensor, "b t d"]
    onto: Float[Tensor, "b t d"]
    norm: nn.Module
    post_norm: nn.Module | None = None


class FeedForward(NamedTuple):
    """W_last (f(W_1 u) * W_0 u), or W_last f(W_0 u) where one matrix is given."""

    activation: str


class Attention(NamedTuple):
    """W_last softmax(scale q k^T) v, of the matrices of q, k, v and, if any, the output's gate."""

    heads: int
    kv_heads: int
    head_width: int
    pairs: int  # of channels that are rotated
    scale: float


class SelectiveState(NamedTuple):
    """W_last ((C h + D c) * silu(z)), of a matrix that makes c's inputs and z of u."""

    states: int  # of each channel
    rank: int  # of the matrix that makes the step
    taps: int  # of the convolution
    eps: float  # under the root by which r, B and C are normalised each; 0 where they are not


Between = FeedForward | Attention | SelectiveState


class _Bound(NamedTuple):
    """A half's call, and all that it depends on; None where the kernel does not compute it."""

    key: list[Any]
    call: BoundCall | None
    numbers: Tensor | None = None  # which the call reads


_bound: dict[int, _Bound] = {}


def half(
    ends: HalfEnds,
    between: Between,
    layers: Sequence[nn.Module],
    last: nn.Module,
    within: Sequence[nn.Module] = (),
) -> "Half | None":
    """The half of a block that is made of these; None where the kernel does not compute it.

    `layers` read the normalised x, `last` what is made of these. What is `within` are the norms of
    queries and keys, or W_x, W_dt and the module that has the parameters of a selective state. A
    call is checked and its words are written once; after that it is looked up by all that they were
    made of: the addresses, types and shapes of the weights.
    """
    x, onto, norm, post_norm = ends
    dtype, shape = x.dtype, x.shape
    if not can_bypass_dispatcher(x, onto) or is_transformed() or globally_hooked():
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if len(shape) != 3 or shape[0] != 1 or shape[1] != 1 or not shape[2] or onto.shape != shape:
        return None
    if dtype not in DTYPES or onto.dtype != dtype or not (_dense(x) and _dense(onto)):
        return None
    key: list[Any] = [dtype, shape[2], torch.get_num_threads(), between, len(layers)]
    modules = (norm, *layers, last, *within, *([] if post_norm is None else [post_norm]))
    for module in modules:
        if is_hooked(module):
            return None
        key += (type(module), module.__dict__.get("eps"))
        for weight in module._parameters.values():
            for part in weight.parts or () if isinstance(weight, OwnProducts) else (weight,):
                if part is None:
                    key.append(None)
                elif part.layout != torch.strided:
                    return None
                else:
                    place = part.data_ptr(), part.is_contiguous()
                    key += (type(part), *place, part.dtype, part.shape)
    bound = _bound.get(id(last))
    if bound is None or bound.key != key:
        if len(_bound) >= MAX_BOUND:
            _bound.clear()
        bound = _bound[id(last)] = _bind(key, ends, between, layers, last, within)
    return None if bound.call is None else Half(x, onto, between, bound.call, modules)


def _dense(x: Tensor) -> bool:
    return x.is_cpu and x.layout == torch.strided and x.is_contiguous() and not x.is_neg()


class Half:
    """One call of the kernel, made by `half`."""

    def __init__(
        self,
        x: Float[Tensor, "1 1 d"],
        onto: Float[Tensor, "1 1 d"],
        between: Between,
        call: BoundCall,
        modules: Sequence[nn.Module],
    ) -> None:
        self.x, self.onto, self.between, self.call = x, onto, between, call
        self.wide = wide_dtype(x)  # of cosines and sines, and of h
        self.modules = modules  # whose weights the call reads

    def feed_forward(self) -> Float[Tensor, "1 1 d"]:
        """The output of one whose `between` is a FeedForward."""
        return self._run(self.call.sizes, self.call.words[:])

    def attention(
        self,
        k: Float[Tensor, "1 n g d"],
        v: Float[Tensor, "1 n g d"],
        cos: Float[Tensor, "1 1 pairs"],
        sin: Float[Tensor, "1 1 pairs"],
    ) -> Float[Tensor, "1 1 d"]:
        """The output of one whose `between` is an Attention.

        The last of the n keys and values are written here, the token's own; those before it are
        what is cached. Raises `ValueError` on shapes that do not fit.
        """
        assert isinstance(self.between, Attention)
        _, kv_heads, width, pairs, _ = self.between
        sizes, words, at, _ = self.call
        keys, sizes, words, dtype = k.shape[1], sizes[:], words[:], self.x.dtype
        cached, angles = ((1, max(keys, 1), kv_heads, width), dtype), ((1, 1, pairs), self.wide)
        for x, (shape, wanted) in ((k, cached), (v, cached), (cos, angles), (sin, angles)):
            if x.shape != shape or x.dtype != wanted or not x.is_contiguous():
                raise ValueError(f"decode_block: {tuple(x.shape)} {x.dtype} must be {shape}")
        words[at["k"]], words[at["v"]] = k.data_ptr(), v.data_ptr()
        words[at["cos"]], words[at["sin"]] = cos.data_ptr(), sin.data_ptr()
        sizes[KEYS] = keys
        return self._run(sizes, words)

    def selective_state(
        self, conv: Float[Tensor, "1 w c"], h: Float[Tensor, "1 c n"]
    ) -> tuple[Float[Tensor, "1 1 d"], Float[Tensor, "1 w c"], Float[Tensor, "1 c n"]]:
        """The output of one whose `between` is a SelectiveState, and its two states after it.

        `conv` are the last inputs of the convolution. Raises `ValueError` on shapes that do not
        fit.
        """
        assert isinstance(self.between, SelectiveState)
        states, _, taps, _ = self.between
        sizes, words, at, _ = self.call
        words, inner = words[:], sizes[INNER]
        after = []
        for name, x, shape, dtype in (
            ("conv", conv, (1, taps - 1, inner), self.x.dtype),
            ("h", h, (1, inner, states), self.wide),
        ):
            if x.shape != shape or x.dtype != dtype or not _dense(x):
                raise ValueError(f"decode_block: {tuple(x.shape)} {x.dtype} must be {shape}")
            y = torch.empty_like(x)
            words[at[name]], words[at[f"{name}_after"]] = x.data_ptr(), y.data_ptr()
            after.append(y)
        return self._run(sizes, words), *after

    def _run(self, sizes: "array[int]", words: "array[int]") -> Tensor:
        record("decode_block", "native")
        at, x, onto, y = self.call.at, self.x, self.onto, torch.empty_like(self.x)
        words[at["x"]], words[at["onto"]] = x.data_ptr(), onto.data_ptr()
        words[at["y"]] = y.data_ptr()
        if self.call.run(sizes, words):
            raise MemoryError("decode_block: no memory for a token")
        return y


def _bind(
    key: list[Any],
    ends: HalfEnds,
    between: Between,
    layers: Sequence[nn.Module],
    last: nn.Module,
    within: Sequence[nn.Module],
) -> _Bound:
    """Check what a half is made of, and bind a call to it."""
    x = ends.x
    parts = _Parts(x)
    matrices = [parts.add_matrix(*one) for one in zip(layers, _MATRICES, strict=False)]
    complete = all(matrices) and len(matrices) == len(layers) and parts.add_matrix(last, _LAST)
    complete = complete and parts.add_norm(ends.norm, "norm", 0)
    if ends.post_norm is not None:
        complete = complete and parts.add_norm(ends.post_norm, "post_norm", 1)
    if isinstance(between, SelectiveState):
        complete = complete and parts.add_selection(between, *within)
    else:
        for norm, name in zip(within, ("q_norm", "k_norm"), strict=False):
            complete = complete and parts.add_head_norm(norm, name)
    if not (complete and parts.fit(between)) or KERNEL.usable() is not True:
        return _Bound(key, None)
    outputs = (*parts.outputs, *[0] * (MAX_MATRICES - len(parts.outputs)))
    forms = [*parts.forms[:1], *parts.forms[len(layers) :], *[(0, 0, 0)] * 2][:4]
    activation, heads, state = 0, (0, 0, 0, 0, 1), (0, 0, 0)
    if isinstance(between, FeedForward):
        function, activation = "feed_forward", ACTIVATIONS.index(between.activation)
    elif isinstance(between, Attention):
        function, heads = "attention", (*between[:4], 1)
        parts.numbers[3] = between.scale
    else:
        function, state = "selective_state", between[:3]
        parts.numbers[4] = between.eps
    sizes = (parts.width, parts.inner, *outputs, *(n for form in forms for n in form))
    narrow = x.dtype == torch.bfloat16
    sizes += (*parts.norms, activation, *heads, *state, int(narrow))
    all_numbers = numbers(wide_dtype(x), *parts.numbers)
    call = (NARROW if narrow else KERNEL).bind(function, sizes, numbers=all_numbers, **parts.given)
    return _Bound(key, call, all_numbers)


class _Parts:
    """What a half is made of, as far as the kernel computes it; False for what it does not."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self.width, self.inner = x.dtype, x.shape[2], 0
        self.given: dict[str, Tensor] = {}
        self.outputs: list[int] = []
        self.forms: list[tuple[int, int, int]] = []  # of each matrix: form, columns of its parts
        self.norms, self.numbers = [0, 0, 0], [1.0, 1.0, 1.0, 1.0, 0.0]

    def add_matrix(self, layer: nn.Module, of: dict[str, str]) -> bool:
        """What a layer multiplies by, if it does no more than that."""
        names = [*of]
        if type(layer) is not Linear:
            return False
        weight, bias = layer.weight, layer.bias
        if weight.dim() != 2:
            return False
        n, k = weight.shape
        if isinstance(weight, OwnProducts):
            if weight.parts is None or not all(self._reads(x, x.dtype) for x in weight.parts):
                return False
            bits, scale = weight.parts
            self.given[names[2]], self.given[names[3]] = bits, scale
            columns = scale.shape[1]
            form = INT8 if columns == 1 else INT4, bits.shape[1], columns
        elif self._reads(weight, self.dtype):
            self.given[names[0]] = weight
            form = BFLOAT16 if self.dtype == torch.bfloat16 else PLAIN, 0, 0
        else:
            return False
        if bias is not None:
            whole = bias.shape == (n,)  # PyTorch broadcasts another
            if not whole or not self._reads(bias, self.dtype):
                return False
            self.given[names[1]] = bias
        self.forms.append(form)
        if of is _LAST:
            self.inner = k
            return n == self.width
        if of is _SELECTION or of is _STEP:
            return True
        self.outputs.append(n)
        return k == self.width and form == self.forms[0]

    def add_norm(self, norm: nn.Module, name: str, place: int) -> bool:
        """A norm over the width."""
        kind = NORMS.get(type(norm))
        if kind is None or (kind == LAYER and norm.normalized_shape != (self.width,)):
            return False
        self.norms[place], self.numbers[place] = place + kind, norm.eps  # type: ignore[assignment]
        for parameter, one in norm.named_parameters():
            if not self._reads(one, self.dtype) or one.shape != (self.width,):
                return False
            self.given[f"{name}_{parameter}"] = one
        return True

    def add_head_norm(self, norm: Any, name: str) -> bool:
        """A norm over the channels of each head; that of keys is of the kind of that of queries."""
        kind = NORMS.get(type(norm), LAYER)
        first = not self.norms[2]
        alike = first or (self.norms[2], self.numbers[2]) == (kind + 1, norm.eps)
        if kind == LAYER or not alike or not self._reads(norm.weight, self.dtype):
            return False
        self.given[name], self.norms[2], self.numbers[2] = norm.weight, kind + 1, norm.eps
        return True

    def add_selection(
        self, sizes: SelectiveState, selection: Any, step: Any, parameters: nn.Module
    ) -> bool:
        """W_x, W_dt and the parameters of a selective state."""
        states, rank, taps, _ = sizes
        inner, own = self.inner, parameters._parameters
        shapes = dict(
            zip(_VECTORS, ((inner, taps), (inner,), (inner, states), (inner,)), strict=True)
        )
        if not (self.add_matrix(selection, _SELECTION) and self.add_matrix(step, _STEP)):
            return False
        for name, shape in shapes.items():
            one = own.get(name)
            if one is None or one.shape != shape or not self._reads(one, self.dtype):
                return False
            self.given[name] = one
        matrices = (selection.weight.shape, step.weight.shape)
        return matrices == ((rank + 2 * states, inner), (inner, rank)) and taps > 1

    def fit(self, between: Between) -> bool:
        """Whether the matrices' shapes are those of a half."""
        if isinstance(between, FeedForward):
            return len(self.outputs) in (1, 2) and {*self.outputs} == {self.inner}
        if isinstance(between, SelectiveState):
            return self.outputs == [2 * self.inner]
        heads, kv_heads, width, pairs, _ = between
        inner, narrow = heads * width, kv_heads * width
        fits = self.inner == inner and self.outputs[:3] == [inner, narrow, narrow]
        fits = fits and self.outputs[3:] in ([], [inner]) and 2 * pairs <= width
        return fits and heads <= MAX_HEADS and not heads % kv_heads

    def _reads(self, x: Tensor, dtype: torch.dtype) -> bool:
        plain = type(x) in (nn.Parameter, Tensor)
        return plain and x.dtype == dtype and x.is_cpu and x.is_contiguous() and not x.is_neg()
