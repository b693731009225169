"""CUDA kernels without a GPU: `kernels/emulator` runs them on the CPU, thread by thread."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from array import array
from pathlib import Path

import pytest

from zoo.ops.runtime import cuda, nvrtc
from zoo.ops.runtime.sizes import ceil_div

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
COMPILER = shutil.which("g++")
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-x", "c++", "-"]

needed = pytest.mark.skipif(COMPILER is None, reason="no g++ for the emulator")


class Program:
    """A `.cu` in the emulator, in the place of a `cuda.LoadedModule`."""

    def __init__(self, library: ctypes.CDLL, reverse: bool) -> None:
        self.library, self.reverse = library, reverse

    def launch(self, function: str, grid: tuple[int, int, int], threads: int, words: array) -> None:
        emulate = self.library.emulate
        emulate.restype = ctypes.c_char_p
        address, count = words.buffer_info()
        entry = ctypes.cast(getattr(self.library, function), ctypes.c_void_p)
        size = ctypes.c_uint64(8 * count)
        error = emulate(entry, *grid, threads, self.reverse, ctypes.c_void_p(address), size)
        if error:
            raise RuntimeError(f"{function}: {error.decode()}")


@functools.cache
def build(text: str, folder: str, macros: nvrtc.Macros) -> ctypes.CDLL:
    """The library of the text of a `.cu` in a folder of kernels/."""
    name = hashlib.sha256(repr((text, macros)).encode()).hexdigest()[:20]
    with tempfile.TemporaryDirectory() as scratch:
        library = f"{scratch}/{name}.so"
        includes = [f"-I{KERNELS}", f"-I{KERNELS / folder}"]
        defines = [f"-D{name}={value}" for name, value in macros]
        command = [str(COMPILER), *defines, *includes, *FLAGS, "-o", library]
        source = f'#include "emulator/emulator.h"\n{text}\nEMULATE\n'
        done = subprocess.run(command, input=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(library)


def install(
    monkeypatch,
    *,
    split: bool = True,
    reverse: bool = False,
    change: tuple[str, str] | None = None,
) -> None:
    """CUDA kernels run in the emulator, on CPU tensors, time in several chunks or in one.

    `change` replaces text in their source.
    """

    def load(source, macros, device):
        del device
        path = KERNELS / source
        text = (KERNELS / "common.cuh").read_text() + path.read_text()
        text = text.replace('#include "../common.cuh"', "").replace("#pragma once", "")
        if change:
            assert change[0] in text
            text = text.replace(*change)
        return Program(build(text, path.parent.name, macros), reverse)

    monkeypatch.setattr(cuda, "load", load)
    monkeypatch.setattr(cuda, "processors", lambda _: 1)
    if not split:
        monkeypatch.setattr(
            cuda, "time_chunks", lambda tokens, tile, *_: (ceil_div(tokens, tile) * tile, 1)
        )
