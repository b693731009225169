"""The CUDA route as far as it goes without a GPU: compiling, keeping, packing, refusing."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import emulator
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo.cli import doctor
from zoo.errors import UserError
from zoo.ops import aft_kernel as aft_module
from zoo.ops import causal_conv as conv_module
from zoo.ops import linear_recurrence as recurrence_module
from zoo.ops import selective_scan as scan_module
from zoo.ops import wkv4 as wkv_module
from zoo.ops.runtime import build, cuda, nvrtc
from zoo.ops.runtime.native_op import every_kernel
from zoo.ops.selective_scan import CUDA

ROOT = Path(__file__).resolve().parents[2]
SCAN = "selective_scan/selective_scan.cu"
WKV = "wkv4/wkv4.cu"
AFT = "aft/aft.cu"
RECURRENCE = "linear_recurrence/linear_recurrence.cu"
TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120"]
ENDS = ("sm_80", "sm_120")  # the targets between them are of the slow half


def macros(dtype: int, **others: int) -> nvrtc.Macros:
    return ("DTYPE", dtype), *others.items()


# Each kernel once per target in the size models use; and in its largest.
KERNELS = [(SCAN, macros(1, STATES=16)), ("causal_conv/causal_conv.cu", macros(1, WINDOW=4))]
KERNELS += [(WKV, macros(1)), (AFT, macros(1, TILES=4)), (RECURRENCE, macros(1))]
BUILDS = [
    pytest.param(*kernel, target, marks=[] if target in ENDS else pytest.mark.slow)
    for kernel in KERNELS
    for target in TARGETS
]
BUILDS += [(SCAN, macros(0, STATES=64), "sm_90"), ("bench/wkv4_steps.cu", macros(1), "sm_90")]
# Registers, of 65536: three blocks of 128 threads to a multiprocessor, or ten of 64.
CEILINGS = {WKV: 96, RECURRENCE: 96}


def nvrtc_missing() -> str:
    try:
        nvrtc.nvrtc()
    except build.BuildError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(nvrtc_missing()), reason=nvrtc_missing())


@needs_nvrtc
@pytest.mark.parametrize(("source", "defines", "target"), BUILDS)
def test_kernels_keep_to_their_registers(source, defines, target):
    log = nvrtc.compile_source(source, defines, target, ("--ptxas-options=-v",)).log
    used = [int(line.split("Used")[1].split()[0]) for line in log.splitlines() if "Used" in line]
    spills = [line for line in log.splitlines() if "spill" in line]
    assert used
    assert len(spills) == len(used)
    assert max(used) <= CEILINGS.get(source, 168)
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), log


@pytest.mark.mistyped
def test_nvrtc_is_loaded_after_its_builtins(tmp_path, monkeypatch):
    folder = tmp_path / "cu13" / "lib"
    folder.mkdir(parents=True)
    for name in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc-builtins.alt.so.13.0"):
        (folder / name).touch()
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda _: package)
    opened = []
    library = SimpleNamespace(nvrtcGetErrorString=SimpleNamespace())
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda name: opened.append(name) or library)
    assert nvrtc.nvrtc.__wrapped__() is library
    assert opened == [str(folder / "libnvrtc-builtins.so.13.0"), str(folder / "libnvrtc.so.13")]


@needs_nvrtc
def test_a_compile_error_is_one_line():
    with pytest.raises(build.BuildError, match=r"^NVRTC .*failed: .*error.*STATES.*$"):
        nvrtc.compile_source(SCAN, macros(0), "sm_90")


@needs_nvrtc
def test_the_target_is_the_newest_that_the_device_runs():
    assert nvrtc.architecture(9, 0) == "sm_90"
    assert nvrtc.architecture(8, 9) == "sm_89"
    with pytest.raises(build.BuildError, match="does not compile for sm_30"):
        nvrtc.architecture(3, 0)


@pytest.fixture
def compiled(tmp_path, monkeypatch) -> list:
    """An empty cache, and a compiler that notes what was requested."""
    requested = []

    def compile_source(source, defines, target, extra=()):
        requested.append((source, defines, target, *extra))
        return nvrtc.Binary(b"image of " + target.encode(), "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: "13.0")
    build.cache_folder.cache_clear()
    yield requested
    build.cache_folder.cache_clear()


def test_a_binary_is_kept_and_replaced_when_damaged(compiled, tmp_path, monkeypatch):
    defines = macros(1, STATES=16)
    for _ in range(2):
        assert nvrtc.binary(SCAN, defines, "sm_90") == b"image of sm_90"
    assert len(compiled) == 1
    (stored,) = (tmp_path / "zoo").glob("*.cubin")
    stored.write_bytes(b"image of sm_91")
    assert nvrtc.binary(SCAN, defines, "sm_90") == b"image of sm_90"
    assert len(compiled) == 2
    nvrtc.binary(SCAN, defines, "sm_80")
    nvrtc.binary(SCAN, macros(0, STATES=16), "sm_90")
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: "13.1")
    nvrtc.binary(SCAN, defines, "sm_90")
    assert len(compiled) == 5


def test_a_binary_that_cannot_be_kept_is_used(compiled, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(build, "store", full)
    assert nvrtc.binary(SCAN, macros(1, STATES=16), "sm_90") == b"image of sm_90"


def test_arguments_that_do_not_fit_are_refused():
    sizes = dict.fromkeys(CUDA.sizes, 1)
    x, A = torch.ones(1, 2, 3), torch.ones(3, 1)
    words = CUDA.pack(sizes, {"x": x, "A": A})
    assert len(words) == len(CUDA.sizes) + 3 * 5 + len(CUDA.sequences) + len(CUDA.pointers)
    assert list(words[5:8]) == [x.data_ptr(), 6, 3]
    for wrong, message in [
        ({"x": x, "dt": x.bfloat16()}, "sequences of torch.bfloat16, torch.float32"),
        ({"x": x.double()}, "sequences of torch.float64"),
        ({"x": x.mT}, "channels of x are not neighbours"),
        ({"y": x.mT}, "y is not contiguous"),
        ({"A": A.bfloat16()}, "A is torch.bfloat16"),
        ({"G": A}, "does not take just G"),
    ]:
        with pytest.raises(TypeError, match=message):
            CUDA.pack(sizes, wrong)
    with pytest.raises(TypeError, match="does not take just chunk"):
        CUDA.pack({name: 1 for name in CUDA.sizes if name != "chunk"}, {})
    with pytest.raises(ValueError, match="no grid of"):
        CUDA.call("outputs", (1, 65536, 1), 32, sizes, (("STATES", 4),), x=x)


def test_cuda_tensors_reach_the_kernels_in_their_own_types(monkeypatch):
    for op in (scan_module, conv_module, wkv_module, recurrence_module):
        monkeypatch.setattr(op.CUDA, "usable", lambda *_: True)

    def empty(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    with FakeTensorMode():  # shapes and types alone: no kernel runs
        x, B, A = empty(2, 40, 6), empty(2, 40, 3), empty(6, 3, dtype=torch.float32)
        y, last = scan_module.selective_scan(x, x, A, B, B, z=x, backend="native")
        assert (y.dtype, y.shape, y.device.type) == (x.dtype, x.shape, "cuda")
        assert (last.dtype, last.shape) == (torch.float32, (2, 6, 3))
        tensors = (x, x, A, B, B, None, x, None)
        saved = scan_module.SCAN.op(*tensors, None, True)[2]
        assert (saved.dtype, saved.shape) == (torch.float32, (2, 2, 3, 6))
        gradients = scan_module.SCAN.backward_op(y, None, *tensors, saved)
        dtypes = [gradient.dtype for gradient in gradients]
        assert dtypes == [*(a.dtype for a in (x, x, A, B, B, A, x, A)), torch.float32]
        y, before = conv_module.causal_conv(x, empty(6, 4, dtype=torch.float32), backend="native")
        assert (y.dtype, before.dtype, before.shape) == (x.dtype, x.dtype, (2, 3, 6))
        k, w = empty(2, 130, 6), empty(6, dtype=torch.float32)
        state = empty(2, 3, 6, dtype=torch.float32)
        y, last = wkv_module.wkv4(k, k, w, w, state, backend="native")
        assert (y.dtype, y.shape, last.dtype) == (k.dtype, k.shape, torch.float32)
        y, last, saved = wkv_module.WKV.op(k, k, w, w, last, True)
        assert (saved.dtype, saved.shape) == (torch.float32, (2, 3, 4, 6))
        gradients = wkv_module.WKV.backward_op(y, None, k, k, w, w, saved)
        assert [a.dtype for a in gradients] == [k.dtype, k.dtype, *[torch.float32] * 3]
        m = empty(34, 6, dtype=torch.float32)
        y, last, saved = aft_module.WINDOW.op(k, k, m, state, 30, True)
        assert (saved.dtype, saved.shape) == (torch.float32, (2, 4, 3, 6))
        gradients = aft_module.WINDOW.backward_op(y, None, k, k, m, saved)
        assert [a.dtype for a in gradients] == [k.dtype, k.dtype, *[torch.float32] * 2]
        h, last = recurrence_module.linear_recurrence(k, k, backend="native")
        assert (h.dtype, h.shape, last.dtype, last.shape) == (k.dtype, k.shape, w.dtype, (2, 6))
        gradients = recurrence_module.RECURRENCE.backward_op(h, None, k, h, last)
        assert [a.dtype for a in gradients] == [k.dtype, k.dtype, torch.float32]
        with pytest.raises(UserError, match="does not take these inputs"):
            scan_module.selective_scan(
                x, x, empty(6, 65), empty(2, 40, 65), empty(2, 40, 65), backend="native"
            )  # more states than the kernel has room for


@pytest.mark.parametrize("tokens", [1, 32, 33, 65536, 100_000])
@pytest.mark.parametrize("blocks", [1, 12, 5000])
def test_chunks_of_time_cover_it_and_fill_the_device(tokens, blocks, monkeypatch):
    monkeypatch.setattr(cuda, "processors", lambda _: 132)
    chunk, chunks = cuda.time_chunks(tokens, 32, blocks, torch.device("cpu"))
    assert chunk % 32 == 0
    assert chunk * (chunks - 1) < tokens <= chunk * chunks
    assert (
        chunks == 1
        if blocks == 5000 or tokens <= 32
        else chunks * blocks >= min(4 * 132, blocks * tokens / 32)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_said_in_one_line():
    reason = cuda.absent()
    assert reason
    assert "\n" not in reason
    assert CUDA.usable(torch.device("cuda", 0), torch.float32, (("STATES", 16),)) == reason


def test_the_doctor_says_what_runs_and_builds_nothing(monkeypatch, tmp_path):
    script = (
        "import sys; from zoo.cli.doctor import main; main(); print('lightning' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert "C compiler: none (no C compiler (cc, gcc or clang) on the PATH)" in done.stdout
    assert "cpu   torch (no C compiler" in done.stdout
    assert done.stdout.endswith("False\n")
    assert not [*tmp_path.rglob("*.so")]
    if emulator.COMPILER:
        text = "\n".join(doctor.report())
        assert str(build.cache_folder()) in text
        for op in (*every_kernel(), "attend", "delta_rule"):
            assert op in text
