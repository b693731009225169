"""Calls the C kernels on CPU tensors, after checking all that a kernel would read or write."""

import copy
import ctypes
import functools
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from zoo.ops.runtime import build
from zoo.ops.runtime.build import BuildError
from zoo.ops.runtime.dispatch import UNTRANSFORMED, Available, is_transformed, shapes_only
from zoo.ops.runtime.sizes import ceil_div

MAX_THREADS = max(64, os.cpu_count() or 1)  # more gain nothing, and a system has no more to give


class _Field(NamedTuple):
    """An array as a function reads or writes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    at: int  # its first word of `Arrays`
    in_rows: bool
    written: bool


class _Plan(NamedTuple):
    """What all calls of a function with the same sizes have in common."""

    fields: dict[str, _Field]
    entry: Callable[..., int]  # the function itself
    sizes: ctypes.Structure  # its first argument


class BoundCall(NamedTuple):
    """A checked call of a kernel: the words of its two arguments, to copy and complete."""

    sizes: "array[int]"
    words: "array[int]"
    at: dict[str, int]  # word of each array
    run: "Callable[[array[int], array[int]], int]"  # with words as these


class CpuKernel:
    """A C file of functions `int f(Sizes, Arrays)`, which return 0 for success.

    Args:
        source: path under kernels/.
        sizes: names of the int64 fields of `Sizes`, to which the number of threads is added last.
            `1<=window<=max_window` bounds one, above by a constant that the kernel publishes.
        rows: names -> shape of the first fields of `Arrays`: sequences (b, t, width), which may be
            slices, passed as a pointer and the strides of batch and token.
        pointers: names -> shape of the other fields, contiguous arrays.
        outputs: names of the arrays that the kernel writes.
        dtypes: of arrays that are not in the dtype of the first one.

    A dimension is a number, a size, a constant of the kernel, or made of such: `heads*width`,
    `window-1`, and `tokens/chunk`, which is rounded up.
    """

    def __init__(
        self,
        source: str,
        *,
        sizes: str,
        rows: Mapping[str, str],
        pointers: Mapping[str, str],
        outputs: str,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.source, self.outputs, self.dtypes = source, frozenset(outputs.split()), dtypes or {}
        self.rows, self.pointers = _declared(rows), _declared(pointers)
        self._names = frozenset((*self.rows, *self.pointers))
        self.bounds = dict(map(_bounds, sizes.split()))
        self._sizes = _words(len(self.bounds) + 1)
        self._count = 3 * len(self.rows) + len(self.pointers)
        self._arrays = _words(self._count)
        self.usable = functools.cache(self._usable)
        self._cached_plan = functools.lru_cache(256)(self._plan)

    def with_dtypes(self, dtypes: Mapping[str, torch.dtype]) -> "CpuKernel":
        """Return the same kernel, for arrays in other dtypes."""
        other = copy.copy(self)
        other.dtypes = dtypes
        other._cached_plan = functools.lru_cache(256)(other._plan)
        return other

    def _usable(self) -> bool | str:
        """Return True where the kernel can run, else the reason why not, for `select_backend`."""
        try:
            build.load(self.source)
        except (BuildError, OSError) as error:
            return str(error)
        return True

    def accepts(self, *tensors: Tensor) -> Available:
        """For `select_backend`: whether the kernel reads these: all of one type, on the CPU."""
        dtype = tensors[0].dtype
        if dtype != torch.float32 and dtype != torch.float64:
            return False
        for tensor in tensors:
            if not tensor.is_cpu or tensor.dtype != dtype:
                return False
        return self.usable

    def has_room(self, dtype: torch.dtype, **sizes: int) -> bool | str:
        """Return True where the kernel can run with these sizes, else the reason why not."""
        reason = self.usable()
        for name, size in sizes.items() if reason is True else ():
            largest = self.constant(self.bounds[name][1], dtype)
            if size > largest:
                return f"it has at most {largest} {name}, not {size}"
        return reason

    def constant(self, name: str, dtype: torch.dtype) -> int:
        """Return an int64 that the kernel publishes."""
        return ctypes.c_int64.in_dll(build.load(self.source, dtype), name).value

    def run(
        self,
        function: str,
        sizes: tuple[int, ...],
        outputs: Sequence[str],
        **tensors: Tensor | None,
    ) -> list[Tensor]:
        """Run on CPU tensors of one dtype, float32 or float64, but for those that `dtypes` names.

        All but the first may be None.

        Allocates `outputs` and returns them; the caller gives the other arrays that the kernel
        writes, which must be contiguous. Inputs whose layout differs from `rows` and `pointers` are
        copied. The kernel does not run where all that it writes is empty, or under `shapes_only`.
        Raises `TypeError` and `ValueError` on anything that it would read or write out of bounds,
        `MemoryError` where it gets no memory.
        """
        if is_transformed():  # forward gradients would be lost silently
            raise NotImplementedError(f"{self.source}: {UNTRANSFORMED}. Use backend=reference")
        if not tensors.keys() <= self._names:
            unknown = sorted(tensors.keys() - self._names)
            raise TypeError(f"{self.source} takes no {', '.join(unknown)}")
        like = next(iter(tensors.values()))
        assert like is not None
        dtype = like.dtype
        if shapes_only.on:
            shapes = self._shapes(sizes, dtype)
            return [like.new_empty(shapes[name]) for name in outputs]
        threads = min(torch.get_num_threads(), MAX_THREADS)
        plan = self._cached_plan(function, sizes, dtype, threads)
        words, alive, work = [0] * self._count, [], False
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            shape, wanted, at, in_rows, written = plan.fields[name]
            if not tensor.is_cpu or tensor.dtype != wanted or tensor.shape != shape:
                self._refuse(name, tensor, shape, wanted)
            if written:
                work = work or tensor.numel() > 0
                if not tensor.is_contiguous():
                    raise ValueError(f"{self.source}: {name} is not contiguous")
            elif tensor.is_neg() or tensor._is_zerotensor():
                tensor = _in_memory(tensor)
            if in_rows:  # `Rows` of common.h: a pointer, the strides of batch and token
                batch, row, dense = tensor.stride()
                if dense != 1:
                    tensor = tensor.contiguous()
                    batch, row, _ = tensor.stride()
                words[at + 1], words[at + 2] = batch, row
            else:
                tensor = tensor.contiguous()
            words[at] = tensor.data_ptr()
            alive.append(tensor)
        made = []
        for name in outputs:
            shape, _, at, in_rows, _ = plan.fields[name]
            tensor = like.new_empty(shape)
            work = work or tensor.numel() > 0
            if in_rows:
                words[at + 1], words[at + 2] = shape[1] * shape[2], shape[2]
            words[at] = tensor.data_ptr()
            made.append(tensor)
        if work and plan.entry(plan.sizes, self._arrays.from_buffer_copy(array("q", words))):
            raise MemoryError(f"{self.source}: no memory for {function}")
        return made

    def bind(self, function: str, sizes: tuple[int, ...], **tensors: Tensor) -> BoundCall:
        """Return a call as `run` makes it, checked once for tensors that stay where they are.

        Whoever uses it sees to it that they do, and that what is filled in later fits.
        """
        like, threads = next(iter(tensors.values())), min(torch.get_num_threads(), MAX_THREADS)
        plan = self._cached_plan(function, sizes, like.dtype, threads)
        words = array("q", bytes(8 * self._count))
        for name, tensor in tensors.items():
            shape, wanted, at, in_rows, _ = plan.fields[name]
            if not tensor.is_cpu or tensor.dtype != wanted or tensor.shape != shape:
                self._refuse(name, tensor, shape, wanted)
            if in_rows or not tensor.is_contiguous() or tensor.is_neg():
                raise ValueError(f"{self.source}: {name} is not an array that a call is bound to")
            words[at] = tensor.data_ptr()
        in_sizes, in_arrays, entry = self._sizes.from_buffer, self._arrays.from_buffer, plan.entry

        def run(sizes: "array[int]", words: "array[int]") -> int:
            return entry(in_sizes(sizes), in_arrays(words))

        at = {name: field.at for name, field in plan.fields.items()}
        return BoundCall(array("q", (*sizes, threads)), words, at, run)

    def _plan(
        self, function: str, sizes: tuple[int, ...], dtype: torch.dtype, threads: int
    ) -> "_Plan":
        """Work out what all calls of a function with these sizes have in common."""
        fields, at = {}, 0
        for name, shape in self._shapes(sizes, dtype).items():
            in_rows, wanted = name in self.rows, self.dtypes.get(name, dtype)
            fields[name] = _Field(shape, wanted, at, in_rows, name in self.outputs)
            at += 3 if in_rows else 1
        entry = getattr(build.load(self.source, dtype), function)
        if entry.argtypes is None:
            entry.argtypes = [self._sizes, self._arrays]
        return _Plan(fields, entry, self._sizes.from_buffer_copy(array("q", (*sizes, threads))))

    def _refuse(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> NoReturn:
        if not tensor.is_cpu:
            raise ValueError(f"{self.source}: {name} is on {tensor.device}, must be cpu")
        if tensor.dtype != dtype:
            raise TypeError(f"{self.source}: {name} is {tensor.dtype}, must be {dtype}")
        raise ValueError(f"{self.source}: {name} is {tuple(tensor.shape)}, must be {shape}")

    def _shapes(self, sizes: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array, in the order of the structure."""
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{self.source}: tensors are {dtype}, must be float32 or float64")
        if len(sizes) != len(self.bounds):
            raise ValueError(f"{self.source}: sizes are {sizes}, must be {', '.join(self.bounds)}")
        known = dict(zip(self.bounds, sizes, strict=True))
        for name, size in known.items():
            least, bound = self.bounds[name]
            most = self.constant(bound, dtype) if bound else size
            if not least <= size <= most:
                raise ValueError(f"{self.source}: {name} is {size}, must be {least} to {most}")

        def dimension(text: str) -> int:
            for sign, operation in _OPERATIONS.items():
                if sign in text:
                    return operation(*map(dimension, text.split(sign)))
            if text.isdigit():
                return int(text)
            return known[text] if text in known else self.constant(text, dtype)

        arrays = {**self.rows, **self.pointers}
        return {name: tuple(map(dimension, shape)) for name, shape in arrays.items()}


_OPERATIONS: dict[str, Callable[[int, int], int]] = {  # the first binds least
    "/": ceil_div,
    "-": lambda a, b: a - b,
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
}


def number(value: float, dtype: torch.dtype) -> Tensor:
    """Return a number as kernels read it, (1,), which is not to be written."""
    return numbers(dtype, value)


@functools.lru_cache(256)
def numbers(dtype: torch.dtype, *values: float) -> Tensor:
    """Return several numbers side by side, which are not to be written."""
    with _disable_current_modes(), torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype)


def _declared(arrays: Mapping[str, str]) -> dict[str, list[str]]:
    """{"x y": "batch width"} -> {"x": ["batch", "width"], "y": ["batch", "width"]}."""
    return {name: shape.split() for names, shape in arrays.items() for name in names.split()}


def _bounds(size: str) -> tuple[str, tuple[int, str]]:
    """Read the name and the bounds in "1<=window<=most", by default 0 and ""."""
    *least, name, most = size.split("<=") if "<=" in size else (size, "")
    return name, (int(least[0]) if least else 0, most)


def _in_memory(tensor: Tensor) -> Tensor:
    """Write out a tensor whose memory holds its negated numbers, or that has none for its zeros."""
    return torch.zeros_like(tensor) if tensor._is_zerotensor() else tensor.resolve_neg()


def _words(count: int) -> type[ctypes.Structure]:
    """Make a structure of so many 64-bit fields, integers or pointers, filled as a whole."""
    return type("Words", (ctypes.Structure,), {"_fields_": [("words", ctypes.c_int64 * count)]})
