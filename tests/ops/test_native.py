"""Kernels are built once, never trusted when damaged, and missed aloud."""

import ctypes
import logging
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import UserError
from zoo.ops.causal_conv import KERNEL, causal_conv
from zoo.ops.runtime import build, dispatch
from zoo.ops.runtime.native_op import can_bypass_dispatcher
from zoo.ops.selective_scan import selective_scan

SOURCE = "causal_conv/causal_conv.c"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """A process that has not built anything yet, with an empty cache."""

    def reset_backends():
        for function in (build.load, build.compiler, build.cache_folder, KERNEL.usable):
            function.cache_clear()
        dispatch._used.clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reset_backends()
    yield tmp_path / "cache" / "zoo"
    reset_backends()


def convolve(backend: str):
    return causal_conv(torch.ones(1, 3, 2), torch.ones(2, 2), backend=backend)[0]


def only_library(cache: Path) -> Path:
    (library,) = cache.glob("*.so")
    return library


def test_a_kernel_is_built_once(cache, monkeypatch):
    build.load(SOURCE)
    library = only_library(cache)
    assert {f.suffix for f in cache.iterdir()} == {".so", ".sha256"}  # nothing is left lying about
    build.load.cache_clear()
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    build.load(SOURCE)
    assert only_library(cache) == library


def test_a_damaged_library_is_built_again(cache):
    build.load(SOURCE)
    library = only_library(cache)
    good = library.read_bytes()
    flipped = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
    library.unlink()  # a new file: the old one is mapped into this process
    for damaged in (b"", b"\x7fELF", good[: len(good) // 2], flipped):
        library.write_bytes(damaged)
        assert build.read_intact(library) is None
    build.load.cache_clear()
    build.load(SOURCE)
    assert library.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_replaced_for_the_process(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = build.cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700  # nobody else can slip a library in
    assert convolve("native").isfinite().all()
    assert only_library(folder).is_file()


DAMAGES = {
    "a byte that is no text": lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
    "an empty file": lambda path: path.write_bytes(b""),
    "half a file": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").touch()),
    "a loop of links": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".so", ".sha256"])
def test_a_damaged_file_of_the_cache_is_named_and_built_again(tmp_path, caplog, suffix, damage):
    library = tmp_path / "kernel.so"
    build.store(library, b"a library" * 9)
    DAMAGES[damage](library.with_suffix(suffix))
    with caplog.at_level(logging.WARNING, "zoo"):
        assert build.read_intact(library) is None
    (line,) = caplog.messages
    assert str(library) in line
    build.store(library, b"another" * 9)
    assert build.read_intact(library) == b"another" * 9
    library.chmod(0o722)
    assert build.read_intact(library) is None


@pytest.mark.parametrize("whose", ["another user's", "everybody's"])
def test_no_library_is_loaded_from_a_folder_others_write(cache, monkeypatch, caplog, whose):
    build.store(build.library(SOURCE), b"planted")  # the right name, the right checksum
    build.cache_folder.cache_clear()
    cache.chmod(0o777 if whose == "everybody's" else 0o700)
    if whose == "another user's":
        uid = build.os.getuid()
        monkeypatch.setattr(build.os, "getuid", lambda: uid + 1)
    with caplog.at_level(logging.WARNING, "zoo"):
        folder = build.cache_folder()
    monkeypatch.undo()
    assert folder != cache
    assert folder.stat().st_mode & 0o077 == 0
    (line,) = caplog.messages
    assert str(cache) in line
    assert convolve("native").isfinite().all()
    assert only_library(folder).is_file()


def use_kernel() -> None:
    assert ctypes.c_int64.in_dll(build.load(SOURCE), "segment").value > 0


def test_two_processes_at_once_both_get_their_kernel(cache):
    processes = [multiprocessing.get_context("fork").Process(target=use_kernel) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert only_library(cache).is_file()
    assert len(list(cache.iterdir())) == 2


def test_without_a_compiler_auto_says_so_and_native_refuses(cache, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO, "zoo"):
        convolve("auto")
        convolve("auto")
    (line,) = caplog.messages
    assert "torch" in line
    assert "no C compiler" in line
    assert dispatch.used_backends() == {"causal_conv": "torch"}
    with pytest.raises(UserError, match="no C compiler"):
        convolve("native")


def test_a_compiler_that_fails_is_quoted(cache, monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] || { echo "x.c:1: error: no" >&2; exit 1; }\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match=r"x\.c:1: error: no"):
        convolve("native")
    assert not list(cache.iterdir())


def test_other_source_is_another_library(cache, monkeypatch, tmp_path):
    build.load(SOURCE)
    copy = tmp_path / "kernels"
    (copy / "causal_conv").mkdir(parents=True)
    for name in ("common.h", SOURCE):
        (copy / name).write_bytes((build.kernels_folder() / name).read_bytes())
    with (copy / "common.h").open("a") as header:
        header.write("/* changed */\n")
    monkeypatch.setattr(build, "kernels_folder", lambda: copy)
    build.load.cache_clear()
    build.load(SOURCE)
    assert len(list(cache.glob("*.so"))) == 2


def test_a_backend_is_named_once_and_only_if_it_runs(cache, caplog):
    requested = []
    available = {"best": lambda: requested.append(1) or "it rains", "good": True, "other": False}
    with caplog.at_level(logging.INFO, "zoo"):
        assert dispatch.select_backend("op", "good", available) == "good"
        assert not requested  # another op need not wait for it
        assert dispatch.select_backend("op", "auto", available) == "good"
    assert caplog.messages == ["op runs on its good backend"]
    with pytest.raises(UserError, match="it rains"):
        dispatch.select_backend("op", "best", available)
    with pytest.raises(UserError, match="does not take these inputs"):
        dispatch.select_backend("op", "other", available)
    with pytest.raises(UserError, match="Did you mean 'good'"):
        dispatch.select_backend("op", "god", available)


def test_an_op_is_watched_by_whatever_acts_on_operators():
    plain, learned = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    fake = FakeTensorMode()
    assert can_bypass_dispatcher(plain, None)
    assert not can_bypass_dispatcher(plain, learned)
    with torch.no_grad():
        assert can_bypass_dispatcher(plain, learned)
        with FlopCounterMode(display=False):
            assert not can_bypass_dispatcher(plain)
        with fake:
            assert not can_bypass_dispatcher(plain)
        assert not can_bypass_dispatcher(fake.from_tensor(plain))
    with torch.inference_mode():
        assert can_bypass_dispatcher(plain, learned)
    bypassed = []

    def look(x):
        bypassed.append(can_bypass_dispatcher(x, plain))
        return x.sum()

    torch.vmap(look)(torch.ones(3, 2))
    torch.func.grad(look)(plain)
    torch.jit.trace(look, (plain,), check_trace=False)
    torch.compile(look, fullgraph=True, backend="eager")(plain)
    assert bypassed == [False] * 4


def test_a_kernel_refuses_what_it_has_no_place_for():
    with pytest.raises(TypeError, match="takes no z"):
        KERNEL.run("forward", (1, 1, 1, 2, 0), ["y"], x=torch.ones(1, 1, 1), z=torch.ones(1))


WRONG = {
    "other device": (lambda x: x.to("meta"), ValueError, "several devices|does not take"),
    "integers": (lambda x: x.long(), TypeError, "floating-point"),
    "sparse": (lambda x: x.to_sparse(), TypeError, "dense"),
    "a list": (lambda x: x.tolist(), TypeError, "must be a tensor"),
    "another shape": (lambda x: x[..., None], ValueError, "must be"),
}


@pytest.mark.mistyped
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", fuzz.cases())
def test_a_wrong_call_is_reported_before_any_kernel_runs(name, wrong):
    """Whichever of its tensors it is."""
    change, error, message = WRONG[wrong]
    draw = fuzz.Draw(2, torch.float32)
    draw.size = lambda *_, **__: 4  # type: ignore[method-assign]
    draw.batch = lambda: 2  # type: ignore[method-assign]
    call = fuzz.cases()[name][0](draw)
    for i in range(len(call.tensors)):
        tensors = [layout(leaf) for leaf, layout in call.tensors]
        tensors[i] = change(tensors[i])
        with pytest.raises(error, match=message):
            call.run("native", *tensors)


@pytest.mark.parametrize("states", [1024, 1025, 40000])
def test_more_states_than_a_kernel_has_room_for_are_refused_or_done_in_pytorch(states):
    x, B = torch.ones(1, 2, 3).double(), torch.ones(1, 2, states).double()
    args = (x, x, -torch.ones(3, states).double(), B, B)
    if states > 1024:
        with pytest.raises(UserError, match=f"it has at most 1024 states, not {states}"):
            selective_scan(*args, backend="native")
    wanted = selective_scan(*args, backend="reference")
    torch.testing.assert_close(selective_scan(*args), wanted)


@pytest.mark.parametrize("threads", [100_000, 10**9])
def test_no_kernel_needs_more_threads_than_a_system_has(monkeypatch, threads):
    """In a process of its own: a system that refuses a thread ends it."""
    script = f"""
import torch
from zoo.ops.linear_recurrence import linear_recurrence
torch.get_num_threads = lambda: {threads}
a = torch.full((1, 300, 4000), 0.5)
wanted = linear_recurrence(a[..., :16], a[..., :16], backend="reference")[0]
assert torch.equal(linear_recurrence(a, a, backend="native")[0][..., :16], wanted)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_numbers_that_are_not_as_memory_holds_them_are_read_right():
    x, weight = torch.randn(1, 5, 4), torch.randn(4, 3)
    negated, nothing = torch._neg_view(x), torch._efficientzerotensor(1, 5, 4)
    for lazy, plain in ((negated, -x), (nothing, torch.zeros(1, 5, 4))):
        for weights in (weight, weight.clone().requires_grad_()):
            assert torch.equal(causal_conv(lazy, weights)[0], causal_conv(plain, weights)[0])


@pytest.mark.skipif(build.platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_tuned_glibc_recycles_large_buffers():
    script = """
import resource, torch
from zoo.ops.runtime.allocator import tune_allocator
assert tune_allocator()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [torch.ones(16 << 20) for _ in range(2)]
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000  # 128 MiB are 32768 fresh pages


@pytest.mark.skipif(not build.Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.skipif(build.platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_glibc_returns_what_sharded_training_frees_between_what_it_keeps():
    script = """
import torch
from pathlib import Path
from zoo.ops.runtime.allocator import tune_allocator
assert tune_allocator(returns=True)
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
torch.ones(7 << 20)  # freed: the threshold of a mapping of its own grows
before, kept = held(), []
for _ in range(16):
    whole = torch.ones(1 << 20)
    kept.append(whole[: 1 << 18].clone())
    del whole
print((held() - before) >> 20)
"""

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 18  # 16 MiB are kept; 28 MiB are held where nothing is returned
