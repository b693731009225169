"""`python -m zoo doctor`: shows which backend every op would take on this machine, and why.

Builds nothing. Exit code 0: every op has one that runs; what is missing is only slower.
"""

import sys
from collections.abc import Sequence

import torch

from zoo.cli.guard import explains
from zoo.errors import refuse_path
from zoo.ops.runtime import build, cuda, libraries, nvrtc
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.native_op import every_kernel

# Ops that are matrix products, or library kernels, in PyTorch's own hands.
BY_TORCH = {
    "attend": "PyTorch's fused attention on the CPU, tiles of matrix products elsewhere",
    "linear_attention, delta_rule, kernel_attention": "chunked matrix products",
}


def report() -> list[str]:
    """Return the lines to print."""
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]
    try:
        lines.append(f"C compiler: {' '.join([*build.compiler(), *build.FLAGS])}")
        no_compiler = None
    except build.BuildError as error:
        no_compiler = str(error)
        lines.append(f"C compiler: none ({no_compiler}); install gcc or clang for the CPU kernels")
    lines.append(f"cache of kernels: {_cache()}")
    no_cuda = cuda.absent()
    lines.append(f"CUDA: {no_cuda}" if no_cuda else f"CUDA: NVRTC {nvrtc.nvrtc_version()}")
    if not no_cuda:
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            name = torch.cuda.get_device_name(i)
            lines.append(f"  {name}: kernels for {nvrtc.architecture(major, minor)}")
    lines.append("backends that `auto` takes:")
    for op, (on_cpu, on_cuda) in every_kernel().items():
        lines.append(f"  {op}")
        lines.append(f"    cpu   {_on_cpu(on_cpu, no_compiler)}")
        if not no_cuda:
            kernel = "native (compiled on first use)" if on_cuda else "torch (PyTorch's own kernel)"
            lines.append(f"    cuda  {kernel}")
    lines += [f"  {ops}\n    torch ({why})" for ops, why in BY_TORCH.items()]
    lines.append("libraries that backend=<name> takes, on CUDA only:")
    lines += [f"  {name:<15}{_library(name)} ({ops})" for name, ops in libraries.OPS.items()]
    return lines


def _library(name: str) -> str:
    return "installed" if libraries.installed(name) else f"pip install {libraries.PACKAGES[name]}"


def _on_cpu(kernel: CpuKernel, no_compiler: str | None) -> str:
    if no_compiler:
        return f"torch ({no_compiler})"
    built = build.read_intact(build.library(kernel.source)) is not None
    return f"native ({'built' if built else 'built on first use, in a second or two'})"


def _cache() -> str:
    """Return the folder of the cache, or what to do where there is none."""
    wanted, folder = build.user_cache_folder(), build.cache_folder()
    if folder == wanted:
        return str(folder)
    try:
        reason = build.others_can_write(wanted) or f"{wanted} cannot be written"
    except OSError:
        reason = f"{wanted} cannot be written"
    return f"{reason}, so every process builds its own; set XDG_CACHE_HOME"


def main(argv: Sequence[str] = ()) -> int:
    """Print the report; it takes no arguments but --help."""
    if explains(argv, f"{__doc__}"):
        return 0
    if argv:
        refuse_path(f"zoo doctor {argv[0]}", "must be `zoo doctor`, without arguments")
    sys.stdout.write("\n".join(report()) + "\n")
    return 0
