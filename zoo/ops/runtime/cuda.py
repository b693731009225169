"""Compiles, caches, loads and launches the CUDA kernels with what PyTorch's CUDA wheels bring.

NVRTC compiles a header-free `.cu` for the device's architecture the first time it is wanted; the
driver loads it and launches it on PyTorch's current stream. Both are called by ctypes: no nvcc, no
host compiler, no package whose version would have to match PyTorch's. Binaries lie in the cache of
`zoo.ops.runtime.cpu`, under a name made of source, options, architecture and NVRTC's version.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import sys
import threading
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.runtime import cpu as native
from zoo.ops.runtime.cpu import BuildError

log = logging.getLogger("zoo")

# Denormals mean nothing in a decaying state, and exp2f without them is one instruction.
OPTIONS = ["--std=c++17", "--ftz=true"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `DTYPE` of common.cuh
WARP = 32  # threads that run in step
MAX_GRID = (2**31 - 1, 65535, 65535)  # of a grid (CUDA programming guide, compute capabilities)

Macros = tuple[tuple[str, int], ...]


class Binary(NamedTuple):
    image: bytes
    log: str


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """The compiler's library, of PyTorch's own CUDA version where there is a choice.

    Raises `BuildError` where there is none.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [p for f in folders for p in sorted(Path(f).glob("*/lib/libnvrtc.so.*[0-9]"))]
    major = (torch.version.cuda or "13").split(".")[0]
    found.sort(key=lambda path: path.suffix != f".{major}")
    for name in (*map(str, found), f"libnvrtc.so.{major}", "libnvrtc.so"):
        try:
            library = _open_nvrtc(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise BuildError("no CUDA compiler: pip install nvidia-cuda-nvrtc brings NVRTC")


def _open_nvrtc(name: str) -> ctypes.CDLL:
    """Load NVRTC and before it its builtins, which not every release finds beside itself."""
    folder = Path(name).parent
    if folder.is_absolute():
        for builtins in sorted(folder.glob("libnvrtc-builtins.so*[0-9]")):
            ctypes.CDLL(str(builtins))
    return ctypes.CDLL(name)


def _nvrtc(function: str, *arguments) -> None:
    code = getattr(nvrtc(), function)(*arguments)
    if code:
        raise BuildError(f"{function}: {nvrtc().nvrtcGetErrorString(code).decode()}")


@functools.cache
def nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def architecture(major: int, minor: int) -> str:
    """What to compile for: the newest that NVRTC knows and a device of this capability runs."""
    count = ctypes.c_int()
    _nvrtc("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _nvrtc("nvrtcGetSupportedArchs", known)
    fit = [a for a in known if a // 10 == major and a % 10 <= minor]
    if not fit:
        raise BuildError(f"NVRTC {nvrtc_version()} does not compile for sm_{major}{minor}")
    return f"sm_{max(fit)}"


def compile_source(source: str, macros: Macros, target: str, extra: tuple[str, ...] = ()) -> Binary:
    """The binary of `kernels/<source>` for a target as "sm_90". Needs no device, reads no cache.

    Raises `BuildError` with the first error of the compiler's log.
    """
    folder = native.kernels_folder()
    text = (folder / source).read_bytes()
    common = (folder / "common.cuh").read_bytes()
    program = ctypes.c_void_p()
    _nvrtc(
        "nvrtcCreateProgram",
        ctypes.byref(program),
        ctypes.c_char_p(text),
        ctypes.c_char_p(source.encode()),
        1,
        (ctypes.c_char_p * 1)(common),
        (ctypes.c_char_p * 1)(b"../common.cuh"),
    )
    try:
        options = [*OPTIONS, *extra, f"--gpu-architecture={target}", *_defines(macros)]
        encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        failed = nvrtc().nvrtcCompileProgram(program, len(options), encoded)
        report = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            lines = report.splitlines()
            error = next((line for line in lines if "error" in line), "no message")
            raise BuildError(f"NVRTC {nvrtc_version()} failed: {error}")
        return Binary(_read(program, "CUBIN"), report)
    finally:
        nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _nvrtc(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _nvrtc(f"nvrtcGet{what}", program, buffer)
    return buffer.raw


def _defines(macros: Macros) -> list[str]:
    return [f"-D{name}={value}" for name, value in macros]


def binary(source: str, macros: Macros, target: str) -> bytes:
    """The same by way of the cache; a damaged file there is replaced, a full disk no obstacle."""
    folder = native.kernels_folder()
    key = hashlib.sha256()
    for part in (
        (folder / source).read_bytes(),
        (folder / "common.cuh").read_bytes(),
        *(text.encode() for text in (*OPTIONS, *_defines(macros), target, nvrtc_version())),
    ):
        key.update(part + b"\0")
    name = f"{Path(source).stem}-{target}-{key.hexdigest()[:20]}.cubin"
    kept = native.cache_folder() / name
    image = native.read_intact(kept)
    if image is None:
        image = compile_source(source, macros, target).image
        try:
            native.keep(kept, image)
        except OSError as error:
            log.info("%s is not kept: %s", name, error)
    return image


@functools.cache
def driver() -> ctypes.CDLL:
    """The driver's library. Raises `BuildError` where there is none."""
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


class Module:
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


_loaded: dict[tuple[str, Macros, int], Module] = {}
_loading = threading.Lock()


def load(source: str, macros: Macros, device: torch.device) -> Module:
    """`kernels/<source>` on a device, built if need be. Raises `BuildError`."""
    index = torch.cuda.current_device() if device.index is None else device.index
    key = source, macros, index
    if key not in _loaded:
        with _loading:
            if key not in _loaded:
                target = architecture(*torch.cuda.get_device_capability(index))
                _loaded[key] = Module(binary(source, macros, target), index)
    return _loaded[key]


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device: what a launch should fill."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def absent() -> str | None:
    """Why no kernel can run on this machine's CUDA devices, or None. Builds nothing."""
    if torch.version.hip:
        return "this PyTorch is built for ROCm"
    if not torch.version.cuda:
        return "this PyTorch is built without CUDA"
    try:
        driver()
        nvrtc()
    except BuildError as error:
        return str(error)
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


class CudaKernel:
    """A `.cu` whose kernels take one structure of 64-bit words by value.

    Its fields: `sizes`, integers; then sequences (b, t, width) of the type `DTYPE` names: `rows`,
    which may be slices, as a pointer and the strides of batch and token, and `sequences`, which are
    contiguous; then `pointers`, to contiguous float32.
    """

    def __init__(
        self, source: str, *, sizes: str, rows: str, sequences: str, pointers: str
    ) -> None:
        self.source, self.sizes = source, sizes.split()
        self.rows, self.sequences, self.pointers = rows.split(), sequences.split(), pointers.split()
        self._reasons: dict[tuple[Macros, torch.device], bool | str] = {}

    def missing(self, macros: Macros, device: torch.device) -> bool | str:
        """True where the kernel can run, else the reason why not, for `select_backend`."""
        key = macros, device
        if key not in self._reasons:
            reason = absent()
            try:
                self._reasons[key] = reason or bool(load(self.source, macros, device))
            except (BuildError, RuntimeError) as error:
                self._reasons[key] = str(error)
        return self._reasons[key]

    def pack(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> array:
        """The argument's words. Raises `TypeError` on a name or a type that has no place there."""
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
        macros: Macros,
        sizes: Mapping[str, int],
        **tensors: Tensor | None,
    ) -> None:
        """Launch on the device the tensors lie on; those not given are null.

        They may be freed at once: PyTorch's allocator hands memory on in the stream's order.
        """
        devices = {tensor.device for tensor in tensors.values() if tensor is not None}
        if len(devices) != 1:
            raise ValueError(f"{self.source}: tensors on {', '.join(sorted(map(str, devices)))}")
        if any(not 0 < blocks <= most for blocks, most in zip(grid, MAX_GRID, strict=True)):
            raise ValueError(f"{self.source}: CUDA runs no grid of {grid} blocks")
        words = self.pack(sizes, tensors)
        load(self.source, macros, devices.pop()).launch(function, grid, threads, words)


def native_here(
    on_cpu: native.CpuKernel,
    on_cuda: CudaKernel,
    device: torch.device,
    dtype: torch.dtype,
    macros: Callable[[torch.dtype], Macros],
) -> bool | Callable[[], bool | str]:
    """Whether a kernel of ours reads this type on this device, for `select_backend`."""
    if device.type == "cpu":
        return on_cpu.missing
    if device.type != "cuda" or dtype not in DTYPES:
        return False
    return functools.partial(on_cuda.missing, macros(dtype), device)


def dense(tensor: Tensor | None) -> Tensor | None:
    """With neighbouring channels, as a `CudaKernel`'s rows are."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def time_chunks(tokens: int, tile: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a chunk of time, a multiple of `tile`, and the chunks that makes.

    So many that, with `blocks` thread blocks to each, a device is filled several times over.
    """
    wanted = -(-8 * processors(device) // blocks)
    tiles = -(-tokens // tile)
    chunk = -(-tiles // min(wanted, tiles)) * tile
    return chunk, -(-tokens // chunk)
