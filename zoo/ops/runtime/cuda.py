"""Loads and launches the CUDA kernels: on PyTorch's current stream, by the driver's own calls."""

import ctypes
import functools
import sys
import threading
from array import array
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.ops.runtime import nvrtc
from zoo.ops.runtime.build import BuildError
from zoo.ops.runtime.dispatch import shapes_only
from zoo.ops.runtime.nvrtc import Macros
from zoo.ops.runtime.sizes import ceil_div

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `DTYPE` of common.cuh
WARP = 32  # threads that run in step
MAX_WARPS = 32  # of a thread block
MAX_GRID = (2**31 - 1, 65535, 65535)  # blocks (CUDA programming guide, compute capabilities)


@functools.cache
def driver() -> ctypes.CDLL:
    """Load the driver's library. Raises `BuildError` where there is none."""
    if sys.platform == "win32":
        raise BuildError("the CUDA kernels are launched on Linux, and under Windows in WSL")
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise BuildError("no NVIDIA driver (libcuda.so.1)") from None


def _driver(function: str, *arguments) -> None:
    code = getattr(driver(), function)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{function}: {(text.value or b'unknown error').decode()} ({code})")


class LoadedModule:
    """A binary loaded into one device's primary context, the one PyTorch works in."""

    def __init__(self, image: bytes, device: int) -> None:
        self.device = device
        self._context, self._module = ctypes.c_void_p(), ctypes.c_void_p()
        self._functions: dict[str, ctypes.c_void_p] = {}
        torch.cuda.init()
        _driver("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), ctypes.c_int(device))
        self._enter()
        _driver("cuModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(image))
        _driver("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _enter(self) -> None:
        """A thread that has done no CUDA work yet, as autograd's, has no context."""
        _driver("cuCtxPushCurrent_v2", self._context)

    def launch(self, function: str, grid: tuple[int, int, int], threads: int, words: array) -> None:
        """Queue on PyTorch's current stream; `words` is the kernel's one argument."""
        self._enter()
        try:
            if function not in self._functions:
                entry = ctypes.c_void_p()
                name = function.encode()
                _driver("cuModuleGetFunction", ctypes.byref(entry), self._module, name)
                self._functions[function] = entry
            stream = torch.cuda.current_stream(self.device).cuda_stream
            address, _ = words.buffer_info()
            arguments = (ctypes.c_void_p * 1)(address)
            shape = (ctypes.c_uint(x) for x in (*grid, threads, 1, 1, 0))
            _driver(
                "cuLaunchKernel",
                self._functions[function],
                *shape,
                ctypes.c_void_p(stream),
                arguments,
                None,
            )
        finally:
            _driver("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


_loaded: dict[tuple[str, Macros, int], LoadedModule] = {}
_loading = threading.Lock()


def load(source: str, macros: Macros, device: torch.device) -> LoadedModule:
    """Load `kernels/<source>` on a device, building it if need be. Raises `BuildError`."""
    index = torch.cuda.current_device() if device.index is None else device.index
    key = source, macros, index
    if key not in _loaded:
        with _loading:
            if key not in _loaded:
                target = nvrtc.architecture(*torch.cuda.get_device_capability(index))
                _loaded[key] = LoadedModule(nvrtc.binary(source, macros, target), index)
    return _loaded[key]


def processors(device: torch.device) -> int:
    """Count the streaming multiprocessors of a device, which a launch should fill."""
    if shapes_only.on:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def absent() -> str | None:
    """Return why no kernel can run on this machine's CUDA devices, or None. Builds nothing."""
    if torch.version.hip:
        return "this PyTorch is built for ROCm"
    if not torch.version.cuda:
        return "this PyTorch is built without CUDA"
    try:
        driver()
        nvrtc.nvrtc()
    except BuildError as error:
        return str(error)
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


class CudaKernel:
    """A `.cu` whose kernels take one structure of 64-bit words by value.

    Args:
        source: path under kernels/.
        sizes: names of the integers that come first.
        rows: names of sequences (b, t, width) of the type that the macro DTYPE names; they may be
            slices, and are passed as a pointer and the strides of batch and token.
        sequences: names of contiguous sequences of the same type.
        pointers: names of contiguous float32 tensors.
        macros: what a source needs besides DTYPE, with the values of the size that models use.
    """

    def __init__(
        self,
        source: str,
        *,
        sizes: str,
        rows: str,
        sequences: str,
        pointers: str,
        macros: Macros = (),
    ) -> None:
        self.source, self.sizes, self.macros = source, sizes.split(), macros
        self.rows, self.sequences, self.pointers = rows.split(), sequences.split(), pointers.split()
        self._reasons: dict[tuple[Macros, torch.device], bool | str] = {}

    def usable(self, device: torch.device, dtype: torch.dtype, macros: Macros = ()) -> bool | str:
        """Return True where the kernel can run, else the reason why not, for `select_backend`."""
        key = (("DTYPE", DTYPES[dtype]), *macros), device
        if key not in self._reasons:
            reason = absent()
            try:
                self._reasons[key] = reason or bool(load(self.source, *key))
            except (BuildError, RuntimeError) as error:
                self._reasons[key] = str(error)
        return self._reasons[key]

    def laid_out(self, **tensors: Tensor | None) -> dict[str, Any]:
        """Copy rows whose channels are not neighbours, and others that are not contiguous."""
        return {
            name: x if x is None or (name in self.rows and x.stride(-1) == 1) else x.contiguous()
            for name, x in tensors.items()
        }

    def pack(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> array:
        """Return the argument's words. Raises `TypeError` on an unknown name or a wrong type."""
        known = {*self.rows, *self.sequences, *self.pointers}
        unknown = [*(sizes.keys() ^ set(self.sizes)), *(tensors.keys() - known)]
        if unknown:
            raise TypeError(f"{self.source} does not take just {', '.join(unknown)}")
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        types = {given[name].dtype for name in (*self.rows, *self.sequences) if name in given}
        if len(types) > 1 or not types <= DTYPES.keys():
            raise TypeError(f"{self.source}: sequences of {', '.join(sorted(map(str, types)))}")
        words = array("q", (sizes[name] for name in self.sizes))
        for name in self.rows:
            words.extend(self._row(name, given[name]) if name in given else (0, 0, 0))
        for name in (*self.sequences, *self.pointers):
            tensor = given.get(name)
            if tensor is not None and not tensor.is_contiguous():
                raise TypeError(f"{self.source}: {name} is not contiguous")
            if tensor is not None and name in self.pointers and tensor.dtype != torch.float32:
                raise TypeError(f"{self.source}: {name} is {tensor.dtype}, not float32")
            words.append(0 if tensor is None else tensor.data_ptr())
        return words

    def _row(self, name: str, tensor: Tensor) -> tuple[int, int, int]:
        batch, row, dense = tensor.stride()
        if dense != 1 and tensor.shape[2] > 1:
            raise TypeError(f"{self.source}: the channels of {name} are not neighbours")
        return tensor.data_ptr(), batch, row

    def call(
        self,
        function: str,
        grid: tuple[int, int, int],
        threads: int,
        sizes: Mapping[str, int],
        macros: Macros = (),
        **tensors: Tensor | None,
    ) -> None:
        """Launch on the device of the tensors; those not given are null.

        They may be freed at once: PyTorch's allocator reuses memory in the stream's order. Does
        nothing under `shapes_only`.
        """
        if shapes_only.on:
            return
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        devices = {tensor.device for tensor in given.values()}
        if len(devices) != 1:
            raise ValueError(f"{self.source}: tensors on {', '.join(sorted(map(str, devices)))}")
        if any(not 0 < blocks <= most for blocks, most in zip(grid, MAX_GRID, strict=True)):
            raise ValueError(f"{self.source}: CUDA runs no grid of {grid} blocks")
        words = self.pack(sizes, tensors)
        dtype = next(given[name].dtype for name in (*self.rows, *self.sequences) if name in given)
        macros = (("DTYPE", DTYPES[dtype]), *macros)
        load(self.source, macros, devices.pop()).launch(function, grid, threads, words)


def time_chunks(tokens: int, tile: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """Cut time into chunks of whole tiles: (tokens of a chunk, number of chunks).

    There are so many that, with `blocks` thread blocks to each, they fill a device several times.
    """
    wanted = ceil_div(8 * processors(device), blocks)
    tiles = ceil_div(tokens, tile)
    chunk = ceil_div(tiles, min(wanted, tiles)) * tile
    return chunk, ceil_div(tokens, chunk)


def composition(chunks: int, batch: int, width: int) -> tuple[int, tuple[int, int, int]]:
    """Return threads and grid of a kernel that composes chunks: a warp of channels per block."""
    return WARP * min(MAX_WARPS, chunks), (ceil_div(width, WARP), 1, batch)
