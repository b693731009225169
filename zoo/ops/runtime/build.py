"""Builds the C kernels and caches what was built, for the C and the CUDA kernels.

A kernel is one C file. The system's compiler builds it on first use (under 2 s) into
$XDG_CACHE_HOME/zoo (or ~/.cache/zoo), under a name derived from everything that could change it:
source, headers, flags, compiler and CPU. Its SHA-256 is stored beside it, so that a damaged file is
built again. Nothing is loaded from a folder that belongs to another user or that others can write.
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
from pathlib import Path

import torch

from zoo.paths import shipped

log = logging.getLogger("zoo")

FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-Wno-psabi"]
OPENMP = ["-fopenmp"]  # GCC's libgomp has the soname of PyTorch's own: one pool of threads


class BuildError(RuntimeError):
    """A kernel cannot be built on this machine; the message is one line that says why."""


def kernels_folder() -> Path:
    """Return the folder of the sources. Raises `BuildError` where they are not installed."""
    folder = shipped("kernels")
    if not (folder / "common.h").is_file():
        raise BuildError("the kernel sources are not installed")
    return folder


@functools.cache
def load(source: str, dtype: torch.dtype = torch.float32) -> ctypes.CDLL:
    """Load the library of `kernels/<source>` for float32 or float64, building it if need be.

    Raises `BuildError` without a working compiler.
    """
    path = library(source, dtype)
    if read_intact(path) is None:
        _build([*_command(dtype), str(kernels_folder() / source), "-lm"], path)
    return ctypes.CDLL(str(path))


def library(source: str, dtype: torch.dtype = torch.float32) -> Path:
    """Return the path at which `load` caches a library. Raises `BuildError` without a compiler."""
    path = kernels_folder() / source
    texts = [file.read_bytes() for file in (path, *_headers())]
    key = hashlib.sha256()
    for part in (*texts, *_command(dtype), _cpu()):
        key.update(part if isinstance(part, bytes) else part.encode())
        key.update(b"\0")
    kind = "double" if dtype == torch.float64 else "float"
    return cache_folder() / f"{path.stem}-{kind}-{key.hexdigest()[:20]}.so"


def _headers() -> list[Path]:
    """Return all headers: a source includes those of other kernels too."""
    folder = kernels_folder()
    return sorted([*folder.glob("*.h"), *folder.glob("*/*.h")])


def _command(dtype: torch.dtype) -> list[str]:
    return [*compiler(), *FLAGS, *(["-DDOUBLE"] if dtype == torch.float64 else [])]


@functools.cache
def compiler() -> tuple[str, ...]:
    """Return the first working compiler, with the flags that depend on it and on the machine.

    Raises `BuildError` where there is none.
    """
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
            threads = OPENMP if gcc else ["-pthread"]
            return (path, machine, *threads, f"-DCOMPILER_{tag}")
    raise BuildError("no C compiler (cc, gcc or clang) on the PATH")


def _cpu() -> str:
    """Describe what -march=native depends on: several machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(x for x in lines if x.startswith(("model name", "flags", "CPU", "Features")))


def _build(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        built = Path(folder) / path.name
        done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.splitlines()
            error = next((line for line in lines if "error" in line), "no message")
            raise BuildError(f"{command[0]} failed: {error}")
        store(path, built.read_bytes())


def user_cache_folder() -> Path:
    """Return the folder that the cache is kept in where the user can write it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo"


@functools.cache
def cache_folder() -> Path:
    """Return the user's cache, or a private folder that lasts as long as this process.

    The latter where the cache cannot be written, or where others could put a library into it.
    """
    folder = user_cache_folder()
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


_temporary: list[tempfile.TemporaryDirectory] = []  # removed at exit


def others_can_write(path: Path) -> str | None:
    """Return why another user may have written what is at `path`, or None.

    Raises `OSError` where it cannot be read.
    """
    if not hasattr(os, "getuid"):  # Windows, where the folder is the user's own
        return None
    found = path.stat()
    if found.st_uid != os.getuid():
        return f"{path} belongs to user {found.st_uid}, not to user {os.getuid()}"
    if found.st_mode & 0o022:
        return f"{path} can be written by others; chmod go-w {path}"
    return None


def _checksum(path: Path) -> Path:
    return path.with_suffix(".sha256")


def read_intact(path: Path) -> bytes | None:
    """Return what `store` wrote; None where it is missing, damaged or may be another user's."""
    try:
        content = path.read_bytes()
        reason = others_can_write(path)
        if hashlib.sha256(content).hexdigest().encode() != _checksum(path).read_bytes():
            reason = reason or f"{path} or its checksum beside it is damaged"
        if reason is None:
            return content
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = f"{path} cannot be read ({error})"
    log.warning("a kernel is built again: %s", reason)
    return None


def store(path: Path, content: bytes) -> None:
    """Write a file and its checksum to the cache; other processes see whole files or none."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        built = Path(folder) / path.name
        built.write_bytes(content)
        built.chmod(0o700)
        _checksum(built).write_text(hashlib.sha256(content).hexdigest(), encoding="utf-8")
        for new, old in ((built, path), (_checksum(built), _checksum(path))):
            if old.is_dir() and not old.is_symlink():  # a file cannot replace a folder
                shutil.rmtree(old)
            new.replace(old)
