"""What a machine has and its devices do where a run does not say it: memory, precision, TF32.

Nothing heavy is imported where there is no NVIDIA driver.
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from zoo.errors import refuse


def cuda_devices() -> int:
    """How many CUDA devices PyTorch finds."""
    if not _driver():
        return 0
    import torch

    return torch.cuda.device_count()


def _driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def on_cuda(accelerator: Any) -> bool:
    """Whether Lightning's `accelerator` of this name is a CUDA device on this machine."""
    return accelerator in ("auto", "gpu", "cuda") and cuda_devices() > 0


def resolve_precision(accelerator: Any) -> str:
    """The precision that `auto` means here: mixed with bfloat16 on CUDA, else float32."""
    return "bf16-mixed" if on_cuda(accelerator) else "32-true"


def check_accelerator(accelerator: Any) -> None:
    """Raise UserError where the machine has no accelerator of this name."""
    on_mac = sys.platform == "darwin"
    needs_cuda = accelerator == "cuda" or (accelerator == "gpu" and not on_mac)
    if (needs_cuda and not cuda_devices()) or (accelerator == "mps" and not on_mac):
        refuse("trainer.accelerator", accelerator, "there is none here", "Use auto or cpu")


def check_device(name: str) -> None:
    """Raise UserError where the machine has no device of this name, such as cuda:1."""
    kind, _, number = name.partition(":")
    lacks_cuda = kind == "cuda" and int(number or 0) >= cuda_devices()
    if lacks_cuda or (kind == "mps" and sys.platform != "darwin"):
        refuse("device", name, "is not available here (there is none)", "Use device=auto")


def check_deterministic(accelerator: Any, deterministic: Any) -> None:
    """Raise UserError where deterministic algorithms are required that PyTorch has not got."""
    if deterministic is True and on_cuda(accelerator):
        refuse(
            "trainer.deterministic",
            True,
            "not available on CUDA, where cumsum has no deterministic form",
            "Use trainer.deterministic=warn, or trainer.accelerator=cpu",
        )


def prepare(device_type: str) -> str | None:
    """Let float32 matrix products on CUDA use TF32; returns the line to print, None elsewhere."""
    if device_type != "cuda":
        return None
    import torch

    torch.set_float32_matmul_precision("high")
    return "float32 matrix products take TF32 (NVIDIA_TF32_OVERRIDE=0 keeps them float32)"


def cuda_line(precision: str, used: int) -> str:
    """The line about how a run trains on CUDA."""
    found = cuda_devices()
    more = f"; trainer.devices={found} takes all" if used < found else ""
    return f"trainer.precision={precision} on {used} of {found} CUDA devices{more}"


def machine_memory() -> int | None:
    """Bytes of this machine's memory that a process may use; None where that is unknown."""
    try:
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(limit).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # none, or `max`
            continue
    return min(found)
