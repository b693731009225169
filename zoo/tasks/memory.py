"""Memory, as PyTorch's allocators hand it out: exact, and the same each time.

The resident set of a process is not: it depends on what the heap kept of freed tensors. It serves
only to see a leak.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from zoo.errors import UserError


def check_memory(option: str, needed: int, what: str) -> None:
    """Refuse a length of which the data alone is larger than the machine's memory (Unix).

    Raises UserError: `option` as `<option>=<value>`, `what` of that length takes `needed` bytes.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not known here
        return
    if needed > memory:
        raise UserError(
            f"{option}: {what} of this length take {needed / 2**30:,.0f} GiB, more than the "
            f"machine's {memory / 2**30:,.0f}. Use shorter lengths or fewer of them."
        )


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int | None:
    """Most bytes of tensors that `call` held at a time, beyond those from before it.

    What a native kernel allocates by itself is not seen. None where the device does not report it.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - held
    if device.type != "cpu":
        call()
        return None
    watch: Any = profile(profile_memory=True)  # its results have no types
    with _quiet(), watch:
        call()
    events = [event for event in watch.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is given back
        peak = max(peak, held)
    return peak


def held_bytes(device: torch.device) -> int | None:
    """Bytes the process holds now: of the device's allocator, or its resident set (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's C++ writes to file descriptor 2 past all of Python's settings."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
