"""Random calls of every C kernel agree with the op's definition; none is without such calls."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.native_op import every_kernel

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
SOURCES = sorted(str(path.relative_to(KERNELS)) for path in KERNELS.glob("*/*.c"))
SEEDS, MORE_SEEDS, SANITIZED = 30, 500, 60  # calls of an op
NO_OP = {"bench/wkv4_steps.cu"}  # for comparison alone


def functions(source: str) -> set[str]:
    """What a kernel lets be called."""
    found = r"^(?:ENTRY\((\w+)\)|int (\w+)\(Sizes)"
    text = (KERNELS / source).read_text()
    return {name for match in re.findall(found, text, re.MULTILINE) for name in match if name}


def test_every_kernel_has_an_op_and_random_calls():
    kernels = every_kernel()
    assert sorted(on_cpu.source for on_cpu, _ in kernels.values()) == SOURCES
    assert set(fuzz.cases()) == set(kernels)
    sources = {on_cuda.source for _, on_cuda in kernels.values() if on_cuda}
    assert sources == {str(p.relative_to(KERNELS)) for p in KERNELS.glob("*/*.cu")} - NO_OP


@pytest.fixture
def called(monkeypatch) -> set[tuple[str, str]]:
    """The functions of kernels called so far."""
    called = set()

    def watched(method):
        def noted(kernel, function, *arguments, **tensors):
            called.add((kernel.source, function))
            return method(kernel, function, *arguments, **tensors)

        return noted

    for name in ("run", "bind"):
        monkeypatch.setattr(CpuKernel, name, watched(getattr(CpuKernel, name)))
    return called


@pytest.mark.parametrize("source", SOURCES)
def test_random_calls_give_what_the_definition_gives(source, poisoned, called):
    for seed in range(SEEDS):
        fuzz.examine(Path(source).parent.name, seed)
    assert functions(source) == {function for of, function in called if of == source}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_many_random_calls_give_what_the_definition_gives(source, poisoned):
    for seed in range(SEEDS, SEEDS + MORE_SEEDS):
        fuzz.examine(Path(source).parent.name, seed)


def test_a_kernel_that_is_wrong_anywhere_does_not_pass(monkeypatch):
    """One number of one output, by a thousandth."""
    run = CpuKernel.run

    def wrong(kernel, function, sizes, outputs, **tensors):
        found = run(kernel, function, sizes, outputs, **tensors)
        if outputs == ["y"] and found[0].numel():
            found[0].view(-1)[0] *= 1.001
        return found

    monkeypatch.setattr(CpuKernel, "run", wrong)
    problems = []
    for seed in range(10):
        try:
            fuzz.examine("rms_norm", seed)
        except AssertionError as error:
            problems.append(str(error))
    assert len(problems) >= 5  # of the rest the first number is none, or not finite
    assert all("off by" in problem for problem in problems)


SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]  # else minutes
SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from zoo.ops.runtime import build
build.FLAGS += {flags!r}
import fuzz
for seed in range({calls}):
    fuzz.examine({name!r}, seed)
print("all of them")
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_touches_memory_it_was_not_given(source, tmp_path):
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc, whose sanitizers these are")
    find = [compiler, "-print-file-name=libasan.so"]
    asan = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(asan):
        pytest.skip("gcc has no AddressSanitizer here")
    script = SCRIPT.format(
        tests=str(Path(__file__).parent), root=str(ROOT), flags=SANITIZE, calls=SANITIZED,
        name=Path(source).parent.name,
    )  # fmt: skip
    environment = os.environ | {
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "XDG_CACHE_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == "all of them\n", done.stderr[-3000:]
