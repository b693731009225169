"""Builds, caches and loads the C kernels; hands tensors to them; tunes the memory allocator.

A kernel is one C file, built by the system's compiler the first time it is wanted (under 2 s) into
$XDG_CACHE_HOME/zoo (or ~/.cache/zoo), under a name made of everything that could change it: source,
flags, compiler, CPU. The library's SHA-256 stands beside it, so a damaged one is built again.
Nothing is loaded from a folder that belongs to another user or that others can write.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from zoo.ops.runtime.dispatch import Available
from zoo.paths import shipped

log = logging.getLogger("zoo")

FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-Wno-psabi"]
THREADS = ["-fopenmp"]  # GCC's libgomp has the soname of PyTorch's own: one pool of threads


class BuildError(RuntimeError):
    """The kernel cannot be built here; the message is one line that says why."""


def kernels_folder() -> Path:
    """The sources. Raises `BuildError` where they were left behind."""
    folder = shipped("kernels")
    if not (folder / "common.h").is_file():
        raise BuildError("the kernel sources are not installed")
    return folder


@functools.cache
def load(source: str, dtype: torch.dtype = torch.float32) -> ctypes.CDLL:
    """The library of `kernels/<source>` for float32 or float64, built if need be.

    Raises `BuildError` without a working compiler.
    """
    path = library(source, dtype)
    if read_intact(path) is None:
        _build([*_command(dtype), str(kernels_folder() / source), "-lm"], path)
    return ctypes.CDLL(str(path))


def library(source: str, dtype: torch.dtype = torch.float32) -> Path:
    """Where `load` keeps it. Raises `BuildError` without a compiler."""
    path = kernels_folder() / source
    command = _command(dtype)
    key = hashlib.sha256()
    for part in (path.read_bytes(), (kernels_folder() / "common.h").read_bytes(), *command, _cpu()):
        key.update(part if isinstance(part, bytes) else part.encode())
        key.update(b"\0")
    kind = "double" if dtype == torch.float64 else "float"
    return cache_folder() / f"{path.stem}-{kind}-{key.hexdigest()[:20]}.so"


def _command(dtype: torch.dtype) -> list[str]:
    return [*_compiler(), *FLAGS, *(["-DDOUBLE"] if dtype == torch.float64 else [])]


@functools.cache
def _compiler() -> tuple[str, ...]:
    """The command of the first working compiler, its own identity and machine flags included."""
    if sys.platform == "win32":
        raise BuildError("the C kernels are built on Linux and macOS, and under Windows in WSL")
    found = [path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    for path in found:
        version = subprocess.run([path, "--version"], capture_output=True, text=True)
        if version.returncode == 0:
            arm = platform.machine() in ("arm64", "aarch64")
            gcc = "Free Software Foundation" in version.stdout
            tag = hashlib.sha256(version.stdout.encode()).hexdigest()[:12]
            machine = "-mcpu=native" if arm else "-march=native"
            threads = THREADS if gcc else ["-pthread"]
            return (path, machine, *threads, f"-DCOMPILER_{tag}")
    raise BuildError("no C compiler (cc, gcc or clang) on the PATH")


def _cpu() -> str:
    """What -march=native depends on: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(x for x in lines if x.startswith(("model name", "flags", "CPU", "Features")))


def wanted_cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo"


@functools.cache
def cache_folder() -> Path:
    """The user's cache, or a private folder that lasts as long as we do.

    That where the cache cannot be written, or where somebody else could put a library into it.
    """
    folder = wanted_cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            reason = others_can_write(folder)
    except OSError as error:
        reason = f"{folder} cannot be written ({error})"
    if reason is None:
        return folder
    log.warning("kernels are built for this process only: %s", reason)
    _temporary.append(tempfile.TemporaryDirectory(prefix="zoo-"))
    return Path(_temporary[-1].name)


def others_can_write(path: Path) -> str | None:
    """Why what is there may be another user's, in words, or None.

    Raises `OSError` where it cannot be told.
    """
    if not hasattr(os, "getuid"):  # Windows, where the folder is the user's own
        return None
    found = path.stat()
    if found.st_uid != os.getuid():
        return f"{path} belongs to user {found.st_uid}, not to user {os.getuid()}"
    if found.st_mode & 0o022:
        return f"{path} can be written by others; chmod go-w {path}"
    return None


_temporary: list[tempfile.TemporaryDirectory] = []  # removed at exit


def _checksum(library: Path) -> Path:
    return library.with_suffix(".sha256")


def read_intact(library: Path) -> bytes | None:
    """What `keep` wrote, or None where it is missing, damaged or may be another user's."""
    try:
        content = library.read_bytes()
        reason = others_can_write(library)
        if hashlib.sha256(content).hexdigest().encode() != _checksum(library).read_bytes():
            reason = reason or f"{library} or its checksum beside it is damaged"
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = f"{library} cannot be read ({error})"
    if reason is None:
        return content
    log.warning("a kernel is built again: %s", reason)
    return None


def keep(library: Path, content: bytes) -> None:
    """Write beside `library` and rename: another process sees a whole file or none."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        built = Path(folder) / library.name
        built.write_bytes(content)
        built.chmod(0o700)
        _checksum(built).write_text(hashlib.sha256(content).hexdigest(), encoding="utf-8")
        for new, old in ((built, library), (_checksum(built), _checksum(library))):
            if old.is_dir() and not old.is_symlink():  # a file cannot take its place
                shutil.rmtree(old)
            new.replace(old)


def _build(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        built = Path(folder) / library.name
        done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.splitlines()
            error = next((line for line in lines if "error" in line), "no message")
            raise BuildError(f"{command[0]} failed: {error}")
        keep(library, built.read_bytes())


MAX_THREADS = max(64, os.cpu_count() or 1)  # more gain nothing, and a system has no more to give


class CpuKernel:
    """A C file with functions `int f(Sizes, Arrays)`, 0 for success, and the one way into it.

    `sizes` names the int64 fields of its `Sizes`, to which the number of threads is added last;
    `1<=window<=most` bounds one, above by a constant of the kernel. `rows`, then `pointers`, name
    the fields of its `Arrays` and their shapes: sequences (b, t, width), which may be slices, and
    contiguous tensors. A dimension is a number, a size, a constant of the kernel, or made of such:
    `heads*width`, `window-1`, and `tokens/chunk` rounded up. `outputs` are those that it writes.
    """

    def __init__(
        self,
        source: str,
        *,
        sizes: str,
        rows: Mapping[str, str],
        pointers: Mapping[str, str],
        outputs: str,
    ) -> None:
        self.source, self.outputs = source, frozenset(outputs.split())
        self.rows, self.pointers = (
            {name: shape.split() for names, shape in arrays.items() for name in names.split()}
            for arrays in (rows, pointers)
        )
        self._names = frozenset((*self.rows, *self.pointers))
        self.bounds = dict(map(_bounds, sizes.split()))
        self._sizes = _words(len(self.bounds) + 1)
        self._arrays = _words(3 * len(self.rows) + len(self.pointers))
        self.missing = functools.cache(self._missing)
        self._shapes = functools.lru_cache(256)(self._shapes_of)

    def _missing(self) -> bool | str:
        """True where the kernel can run, else the reason why not, for `select_backend`."""
        try:
            load(self.source)
        except (BuildError, OSError) as error:
            return str(error)
        return True

    def takes(self, *tensors: Tensor) -> Available:
        """Whether it can read these, for `select_backend`: of one type, on the CPU."""
        kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors}
        fits = kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})
        return self.missing if fits else False

    def has_room(self, dtype: torch.dtype, **sizes: int) -> bool | str:
        """True where the kernel is there and these are within its bounds, else the reason."""
        reason = self.missing()
        for name, size in sizes.items() if reason is True else ():
            most = self.constant(self.bounds[name][1], dtype)
            if size > most:
                return f"it has at most {most} {name}, not {size}"
        return reason

    def constant(self, name: str, dtype: torch.dtype) -> int:
        """An int64 that the kernel publishes."""
        return ctypes.c_int64.in_dll(load(self.source, dtype), name).value

    def call(self, function: str, sizes: tuple[int, ...], **tensors: Tensor | None) -> None:
        """Run on float32 or float64 CPU tensors, all of one dtype; those not given are null.

        Inputs that do not lie as `rows` and `pointers` say are copied. Does nothing where all
        outputs are empty. Raises `TypeError` and `ValueError` on anything the kernel would read or
        write out of bounds, `MemoryError` where it gets no memory.
        """
        if forward_ad._current_level >= 0:  # else they would be lost without a word
            raise NotImplementedError(f"{self.source}: no forward gradients; take backend=torch")
        if not tensors.keys() <= self._names:
            unknown = sorted(tensors.keys() - self._names)
            raise TypeError(f"{self.source} takes no {', '.join(unknown)}")
        dtype = next(tensor.dtype for tensor in tensors.values() if tensor is not None)
        words, alive, work = [], [], False
        for name, shape in self._shapes(sizes, dtype).items():
            tensor = tensors.get(name)
            if tensor is None:
                words += (0, 0, 0) if name in self.rows else (0,)
                continue
            if not tensor.is_cpu or tensor.dtype != dtype or tensor.shape != shape:
                self._refuse(name, tensor, shape, dtype)
            if name in self.outputs:
                work = work or tensor.numel() > 0
                if not tensor.is_contiguous():
                    raise ValueError(f"{self.source}: {name} is not contiguous")
            elif tensor.is_neg() or tensor._is_zerotensor():
                tensor = _in_memory(tensor)
            if name in self.rows:  # `Rows` of common.h: a pointer, the strides of batch and token
                batch, row, dense = tensor.stride()
                if dense != 1:
                    tensor = tensor.contiguous()
                    batch, row, _ = tensor.stride()
                words += (tensor.data_ptr(), batch, row)
            else:
                tensor = tensor.contiguous()
                words.append(tensor.data_ptr())
            alive.append(tensor)
        if not work:
            return
        entry = getattr(load(self.source, dtype), function)
        if entry.argtypes is None:
            entry.argtypes = [self._sizes, self._arrays]
        threads = min(torch.get_num_threads(), MAX_THREADS)
        filled = self._sizes.from_buffer_copy(array("q", (*sizes, threads)))
        if entry(filled, self._arrays.from_buffer_copy(array("q", words))):
            raise MemoryError(f"{self.source}: no memory for {function}")

    def _refuse(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> NoReturn:
        if not tensor.is_cpu:
            raise ValueError(f"{self.source}: {name} is on {tensor.device}, must be cpu")
        if tensor.dtype != dtype:
            raise TypeError(f"{self.source}: {name} is {tensor.dtype}, must be {dtype}")
        raise ValueError(f"{self.source}: {name} is {tuple(tensor.shape)}, must be {shape}")

    def _shapes_of(self, sizes: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
        """The shape of each array, in the order of the structure."""
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
            for sign, form in _OPERATIONS.items():
                if sign in text:
                    return form(*map(dimension, text.split(sign)))
            if text.isdigit():
                return int(text)
            return known[text] if text in known else self.constant(text, dtype)

        arrays = {**self.rows, **self.pointers}
        return {name: tuple(map(dimension, shape)) for name, shape in arrays.items()}


def _bounds(size: str) -> tuple[str, tuple[int, str]]:
    """The name in "1<=window<=most", and its bounds: 1 and "most"; by default 0 and "" for none."""
    *least, name, most = size.split("<=") if "<=" in size else (size, "")
    return name, (int(least[0]) if least else 0, most)


_OPERATIONS: dict[str, Callable[[int, int], int]] = {  # the first binds least
    "/": lambda a, b: -(-a // b),
    "-": lambda a, b: a - b,
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
}


def _in_memory(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its negated numbers, or is none for zeros, written out."""
    return torch.zeros_like(tensor) if tensor._is_zerotensor() else tensor.resolve_neg()


def _words(count: int) -> type[ctypes.Structure]:
    """A structure of so many 64-bit fields, integers or pointers, filled as a whole."""
    return type("Words", (ctypes.Structure,), {"_fields_": [("words", ctypes.c_int64 * count)]})


# Parts of PyTorch that every call passes through, whoever is watching.
_ALWAYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.ADInplaceOrView
)


def can_bypass_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether an op may call its kernel itself, past PyTorch's dispatcher, which takes 0.1 ms.

    So where no gradient is recorded and nothing acts on operators: no compiler or tracer, no
    dispatch mode (a FLOP counter, fake tensors), no function transform, no kind of tensor but
    PyTorch's own.
    """
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter) or (grad and tensor.requires_grad):
            return False
    return (torch._C._dispatch_tls_local_include_set() - _ALWAYS).raw_repr() == 0


def tune_allocator() -> str | None:
    """Let glibc keep freed memory instead of returning it to the kernel; once per process.

    A training step frees and asks for the same large buffers again, and the kernel hands out
    fresh pages slowly, zeroing each. Returns the line to log, or None where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return None
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4  # <malloc.h>
    gigabyte = 1 << 30
    kept = mallopt(mmap_threshold, gigabyte) or mallopt(mmap_max, 0)  # older ones refuse the first
    if not (kept and mallopt(trim_threshold, 2 * gigabyte - 1) and mallopt(top_pad, 64 << 20)):
        return None
    return "glibc keeps freed memory for reuse (mallopt)"
