"""Builds, caches and loads the C kernels; hands tensors to them; tunes the memory allocator.

A kernel is one C file, built by the system's compiler the first time it is wanted (under 2 s) into
$XDG_CACHE_HOME/zoo (or ~/.cache/zoo), under a name made of everything that could change it: source,
flags, compiler, CPU. The library's SHA-256 stands beside it, so a damaged one is built again.
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
from pathlib import Path

import torch
from torch import Tensor

from zoo.ops.backends import Available
from zoo.options import shipped

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
    """The user's cache, or where that cannot be written a folder that lasts as long as we do."""
    folder = wanted_cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log.info(
            "kernels are built for this process only: %s cannot be written (%s)", folder, error
        )
        _temporary.append(tempfile.TemporaryDirectory(prefix="zoo-"))
        return Path(_temporary[-1].name)


_temporary: list[tempfile.TemporaryDirectory] = []  # removed at exit


def _checksum(library: Path) -> Path:
    return library.with_suffix(".sha256")


def read_intact(library: Path) -> bytes | None:
    """What `keep` wrote, or None where it is missing or damaged."""
    try:
        content = library.read_bytes()
        whole = hashlib.sha256(content).hexdigest() == _checksum(library).read_text(
            encoding="utf-8"
        )
    except OSError:
        return None
    return content if whole else None


def keep(library: Path, content: bytes) -> None:
    """Write beside `library` and rename: another process sees a whole file or none."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        built = Path(folder) / library.name
        built.write_bytes(content)
        built.chmod(0o700)
        _checksum(built).write_text(hashlib.sha256(content).hexdigest(), encoding="utf-8")
        built.replace(library)
        _checksum(built).replace(_checksum(library))


def _build(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        built = Path(folder) / library.name
        done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.splitlines()
            error = next((line for line in lines if "error" in line), "no message")
            raise BuildError(f"{command[0]} failed: {error}")
        keep(library, built.read_bytes())


class Kernel:
    """A C file with functions `int f(Sizes, Arrays)`, 0 for success.

    `sizes` names the int64 fields of its `Sizes`, to which the number of threads is added last.
    `rows`, then `pointers`, name the fields of its `Arrays`: sequences (b, t, width), which may be
    slices, and contiguous tensors.
    """

    def __init__(self, source: str, *, sizes: str, rows: str, pointers: str) -> None:
        self.source, self.rows, self.pointers = source, rows.split(), pointers.split()
        self._sizes = _words(len(sizes.split()) + 1)
        self._arrays = _words(3 * len(self.rows) + len(self.pointers))
        self.missing = functools.cache(self._missing)

    def _missing(self) -> bool | str:
        """True where the kernel can run, else the reason why not, for `backends.pick`."""
        try:
            load(self.source)
        except (BuildError, OSError) as error:
            return str(error)
        return True

    def takes(self, *tensors: Tensor) -> Available:
        """Whether it can read these, for `backends.pick`: of one type, on the CPU, none empty."""
        kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors}
        fits = kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})
        return self.missing if fits and all(tensor.numel() for tensor in tensors) else False

    def constant(self, name: str, dtype: torch.dtype) -> int:
        """An int64 that the kernel publishes."""
        return ctypes.c_int64.in_dll(load(self.source, dtype), name).value

    def call(self, function: str, sizes: tuple[int, ...], **tensors: Tensor | None) -> None:
        """Run on float32 or float64 CPU tensors, all of one dtype; those not given are null.

        Inputs that do not lie as `rows` and `pointers` say are copied, so outputs must.
        """
        words, alive = [], []
        for name in self.rows:  # `Rows` of common.h: a pointer and the strides of batch and token
            tensor = tensors.pop(name, None)
            if tensor is None:
                words += (0, 0, 0)
                continue
            batch, row, dense = tensor.stride()
            if dense != 1:
                tensor = tensor.contiguous()
                batch, row, _ = tensor.stride()
            words += (tensor.data_ptr(), batch, row)
            alive.append(tensor)
        for name in self.pointers:
            tensor = tensors.pop(name, None)
            if tensor is None:
                words.append(0)
                continue
            tensor = tensor.contiguous()
            words.append(tensor.data_ptr())
            alive.append(tensor)
        if tensors:
            raise TypeError(f"{self.source} takes no {', '.join(tensors)}")
        (dtype,) = {tensor.dtype for tensor in alive}
        entry = getattr(load(self.source, dtype), function)
        if entry.argtypes is None:
            entry.argtypes = [self._sizes, self._arrays]
        filled = self._sizes.from_buffer_copy(array("q", (*sizes, torch.get_num_threads())))
        if entry(filled, self._arrays.from_buffer_copy(array("q", words))):
            raise MemoryError(f"{self.source}: no memory for {function}")


def _words(count: int) -> type[ctypes.Structure]:
    """A structure of so many 64-bit fields, integers or pointers, filled as a whole."""
    return type("Words", (ctypes.Structure,), {"_fields_": [("words", ctypes.c_int64 * count)]})


# Parts of PyTorch that every call passes through, whoever is watching.
_ALWAYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.ADInplaceOrView
)


def unwatched(*tensors: Tensor | None) -> bool:
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
