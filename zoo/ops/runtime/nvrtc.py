"""Compiles CUDA sources with NVRTC, which PyTorch's CUDA wheels bring, and caches the binaries.

Called by ctypes: no nvcc, no host compiler, no package whose version would have to match PyTorch's.
Binaries are stored in the cache of `zoo.ops.runtime.build`, under a name derived from source,
header, options, architecture and NVRTC's version.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import NamedTuple

import torch

from zoo.ops.runtime import build
from zoo.ops.runtime.build import BuildError

log = logging.getLogger("zoo")

# Denormals mean nothing in a decaying state, and exp2f without them is one instruction.
OPTIONS = ["--std=c++17", "--ftz=true"]

Macros = tuple[tuple[str, int], ...]


class Binary(NamedTuple):
    image: bytes
    log: str


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """Load the compiler's library, preferring PyTorch's own CUDA version.

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
    """Return the target for a device of this capability: the newest that NVRTC compiles for."""
    count = ctypes.c_int()
    _nvrtc("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _nvrtc("nvrtcGetSupportedArchs", known)
    fit = [a for a in known if a // 10 == major and a % 10 <= minor]
    if not fit:
        raise BuildError(f"NVRTC {nvrtc_version()} does not compile for sm_{major}{minor}")
    return f"sm_{max(fit)}"


def compile_source(source: str, macros: Macros, target: str, extra: tuple[str, ...] = ()) -> Binary:
    """Compile `kernels/<source>` for a target such as "sm_90". Needs no device, reads no cache.

    Raises `BuildError` with the first error of the compiler's log.
    """
    folder = build.kernels_folder()
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
    """Return what `compile_source` does, from the cache where it is there and intact."""
    folder = build.kernels_folder()
    key = hashlib.sha256()
    for part in (
        (folder / source).read_bytes(),
        (folder / "common.cuh").read_bytes(),
        *(text.encode() for text in (*OPTIONS, *_defines(macros), target, nvrtc_version())),
    ):
        key.update(part + b"\0")
    name = f"{Path(source).stem}-{target}-{key.hexdigest()[:20]}.cubin"
    path = build.cache_folder() / name
    image = build.read_intact(path)
    if image is None:
        image = compile_source(source, macros, target).image
        try:
            build.store(path, image)
        except OSError as error:  # a full disk, say
            log.info("%s is not cached: %s", name, error)
    return image
