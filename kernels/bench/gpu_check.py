"""Builds, checks and times the CUDA kernels on this machine: `make gpu-check`, under 8 minutes.

    python kernels/bench/gpu_check.py [--out FILE]

Runs from a plain checkout with any Python that has torch 2.11 or newer with CUDA, and nothing else.
Every op is compared with its definition in float64 first, outputs, states and all gradients, and
with itself for equal bits; only what is right is timed. The record is JSON: date, device, versions,
errors, medians of times in milliseconds. Exit code 0, 1 where an op is wrong, 2 without a GPU.
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
BUDGET = 400  # seconds after which nothing new is timed
START = time.monotonic()
WIDTH, STATES, WINDOW = 1536, 16, 4  # of Mamba at 130M parameters
WKV_WIDTH = 768  # of RWKV-4 at 169M, and of AFT
AFT_WINDOW = 32  # its default
RECURRENCE_WIDTH = 1024  # of Hawk at the width 768
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}  # relative, of the norm


def say(text: str) -> None:
    sys.stdout.write(f"{time.monotonic() - START:5.0f} s  {text}\n")
    sys.stdout.flush()


def stand_in_for_jaxtyping() -> None:
    """Shapes in annotations are for readers; where the package is missing, so are its checks."""
    if importlib.util.find_spec("jaxtyping") is None:
        module: Any = types.ModuleType("jaxtyping")
        anything = type("Shaped", (), {"__class_getitem__": classmethod(lambda cls, item: item[0])})
        module.Float = module.Int = module.Bool = module.Shaped = anything
        sys.modules["jaxtyping"] = module


def milliseconds(run: Callable[[], object], repeats: int = 15) -> float:
    """The median by CUDA events, after three runs that warm up."""
    import torch

    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def scan_inputs(b: int, t: int, d: int, n: int, dtype, rate: float = 1.0) -> dict:
    import torch

    def normal(*shape: int, kind=dtype):
        return torch.randn(*shape, device="cuda").to(kind).requires_grad_()

    wide = torch.float32
    rates = (-rate * torch.rand(d, n, device="cuda").add(0.05)).requires_grad_()
    inputs = {"x": normal(b, t, d), "dt": normal(b, t, d), "A": rates}
    inputs |= {"B": normal(b, t, n), "C": normal(b, t, n), "D": normal(d, kind=wide)}
    inputs |= {"z": normal(b, t, d), "dt_bias": normal(d, kind=wide)}
    return inputs | {"state": normal(b, d, n, kind=wide)}


def conv_inputs(b: int, t: int, d: int, width: int, dtype) -> dict:
    import torch

    def normal(*shape: int, kind=dtype):
        return torch.randn(*shape, device="cuda").to(kind).requires_grad_()

    inputs = {"x": normal(b, t, d), "weight": normal(d, width, kind=torch.float32)}
    return inputs | {"bias": normal(d, kind=torch.float32), "state": normal(b, width - 1, d)}


def wkv_inputs(b: int, t: int, d: int, dtype, rate: float = 0.1) -> dict:
    import torch

    def normal(*shape: int, kind=dtype):
        return torch.randn(*shape, device="cuda").to(kind)

    inputs = {"k": normal(b, t, d), "v": normal(b, t, d)}
    inputs |= {"w": rate * normal(d, kind=torch.float32).exp(), "u": normal(d, kind=torch.float32)}
    p, q, o = normal(3, b, d, kind=torch.float32)
    inputs["state"] = torch.stack([p, q.exp(), o], 1)
    return {name: a.requires_grad_() for name, a in inputs.items()}


def aft_inputs(b: int, t: int, d: int, s: int, dtype) -> dict:
    import torch

    def normal(*shape: int, kind=dtype):
        return torch.randn(*shape, device="cuda").to(kind)

    inputs = {"k": normal(b, t, d), "v": normal(b, t, d), "w": normal(1, d, s, kind=torch.float32)}
    p, q, o = normal(3, b, d, kind=torch.float32)
    inputs["older"] = torch.stack([p, q.exp(), o], 1)
    inputs |= {"past_k": normal(b, s - 1, d), "past_v": normal(b, s - 1, d)}
    return {name: a.requires_grad_() for name, a in inputs.items()}


def recurrence_inputs(b: int, t: int, d: int, dtype, memory: float = 2.0) -> dict:
    """Decays that keep a state for about so many tokens; at 2 any, 0 and 1 among them."""
    import torch

    def normal(*shape: int, kind=dtype):
        return torch.randn(*shape, device="cuda").to(kind)

    a = 1 - torch.rand(b, t, d, device="cuda") / (memory / 2)
    if memory == 2:
        a = a.mul(1.5).sub(0.25).clamp(0, 1)
    inputs = {"a": a.to(dtype), "u": normal(b, t, d), "state": normal(b, d, kind=torch.float32)}
    return {name: x.requires_grad_() for name, x in inputs.items()}


def aft_window_flat(k, v, w, older=None, past_k=None, past_v=None, backend="auto"):
    """`aft_window` with a state of tensors; the last keys and values are the inputs'."""
    from zoo.ops.aft import Window, aft_window

    state = None if older is None else Window(older, past_k, past_v)
    y, after = aft_window(k, v, w, state, backend)
    return y, after.older


def everything(op: Callable, inputs: dict, weights: list, **options) -> dict:
    """Outputs, state and all gradients of a fixed random function of both."""
    import torch

    y, state = op(**inputs, **options)
    loss = (y.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {"y": y, "last": state, **{f"d{k}": g for k, g in zip(inputs, gradients, strict=True)}}


def errors(op: Callable, inputs: dict) -> tuple[dict[str, float], bool]:
    """Relative errors of the kernel against the definition in float64; and equal bits twice."""
    import torch

    exact_inputs = {k: a.detach().double().requires_grad_() for k, a in inputs.items()}
    with torch.no_grad():
        shapes = [a.shape for a in op(**exact_inputs, backend="torch")]
    weights = [torch.randn(s, device="cuda", dtype=torch.float64) for s in shapes]
    wanted = everything(op, exact_inputs, weights, backend="torch")
    found, again = (everything(op, inputs, weights, backend="native") for _ in range(2))
    same = all(torch.equal(found[k], again[k]) for k in found)
    return {k: float((found[k].double() - v).norm() / v.norm()) for k, v in wanted.items()}, same


def check(record: dict) -> bool:
    """Every op in every type at odd sizes; True where all are right."""
    import torch

    from zoo.ops.causal_conv import causal_conv
    from zoo.ops.linear_recurrence import linear_recurrence
    from zoo.ops.selective_scan import selective_scan
    from zoo.ops.wkv4 import wkv4

    cases: list[tuple[str, Callable, dict]] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for b, t, d, n in [(1, 1, 1, 1), (3, 1001, 131, 16), (1, 4099, 200, 16), (2, 300, 70, 33)]:
            name = f"selective_scan {dtype} b={b} t={t} d={d} n={n}"
            cases.append((name, selective_scan, scan_inputs(b, t, d, n, dtype)))
        cases.append((f"selective_scan {dtype} fast decay", selective_scan,
                      scan_inputs(2, 513, 64, 8, dtype, rate=30.0)))  # fmt: skip
        for b, t, d in [(2, 2, 19), (2, 1001, 1536)]:
            name = f"causal_conv {dtype} b={b} t={t} d={d}"
            cases.append((name, causal_conv, conv_inputs(b, t, d, WINDOW, dtype)))
        for b, t, d, rate in [(1, 1, 1, 0.1), (3, 1001, 131, 0.1), (1, 4321, 70, 1e-4)]:
            name = f"wkv4 {dtype} b={b} t={t} d={d} rate={rate}"
            cases.append((name, wkv4, wkv_inputs(b, t, d, dtype, rate)))
        for b, t, d, s in [(1, 1, 1, 1), (3, 1001, 131, 32), (1, 4321, 70, 9), (2, 300, 35, 128)]:
            name = f"aft_window {dtype} b={b} t={t} d={d} s={s}"
            cases.append((name, aft_window_flat, aft_inputs(b, t, d, s, dtype)))
        for b, t, d, memory in [(1, 1, 1, 4.0), (3, 1001, 131, 2.0), (1, 4321, 70, 500.0)]:
            name = f"linear_recurrence {dtype} b={b} t={t} d={d} memory={memory}"
            cases.append((name, linear_recurrence, recurrence_inputs(b, t, d, dtype, memory)))
    right = True
    for name, op, inputs in cases:
        found, same = errors(op, inputs)
        worst = max(found, key=lambda k: found[k] if found[k] == found[k] else float("inf"))
        limit = TOLERANCE[str(next(iter(inputs.values())).dtype).removeprefix("torch.")]
        good = same and found[worst] <= limit
        right &= good
        record[name] = {"errors": found, "same_bits_twice": same, "right": good}
        say(
            f"{'right' if good else 'WRONG'}  {name}: {worst} {found[worst]:.1e}, same bits: {same}"
        )
    return right


def theirs_scan(inputs: dict) -> dict[str, Callable] | None:
    """mamba_ssm's kernels, forward and forward + backward, on the same numbers in its layout."""
    if importlib.util.find_spec("selective_scan_cuda") is None:
        return None
    import torch

    kernel = importlib.import_module("selective_scan_cuda")
    with torch.no_grad():
        x, dt, z = (inputs[k].transpose(1, 2).contiguous() for k in ("x", "dt", "z"))
        B, C = (inputs[k].transpose(1, 2)[:, None].contiguous() for k in ("B", "C"))
    A, D, bias = (inputs[k].detach() for k in ("A", "D", "dt_bias"))
    dout = torch.randn_like(x)

    def forward():
        return kernel.fwd(x, dt, A, B, C, D, z, bias, True)

    out, saved, *_ = forward()

    def backward():
        return kernel.bwd(x, dt, A, B, C, D, z, bias, dout, saved, out, None, True, False)

    return {"forward": forward, "backward": backward}


def time_ops(record: dict) -> None:
    import torch

    from zoo.ops.causal_conv import causal_conv
    from zoo.ops.selective_scan import selective_scan

    for b, t in [(b, t) for t in (65536, 1024, 8192, 262144) for b in (1, 8) if b * t <= 524288]:
        if time.monotonic() - START > BUDGET:
            record["left out for want of time"] = f"from b={b} t={t} on"
            return
        inputs = scan_inputs(b, t, WIDTH, STATES, torch.bfloat16)
        del inputs["state"]
        row: dict[str, Any] = {}
        for backend in ("native", "torch") if b * t <= 8192 else ("native",):
            row[backend] = time_one(selective_scan, inputs, backend)
        if theirs := theirs_scan(inputs):
            row["selective_scan_cuda"] = {k: milliseconds(run) for k, run in theirs.items()}
        record[f"selective_scan b={b} t={t}"] = row
        say(f"selective_scan b={b} t={t}: {json.dumps(row)}")
        inputs = conv_inputs(b, t, WIDTH, WINDOW, torch.bfloat16)
        row = {name: time_one(causal_conv, inputs, name) for name in ("native", "torch")}
        record[f"causal_conv b={b} t={t}"] = row
        say(f"causal_conv b={b} t={t}: {json.dumps(row)}")
        torch.cuda.empty_cache()


def time_wkv(record: dict) -> None:
    """Against the published kernel's scheme, from nothing, forward; and against the byte floor."""
    import torch

    from zoo.ops import cuda
    from zoo.ops.wkv4 import _macros, wkv4

    steps = cuda.Kernel(
        "bench/wkv4_steps.cu", sizes="tokens width", rows="k v", sequences="y", pointers="w u"
    )
    d, threads = WKV_WIDTH, 32
    for b, t in [(b, t) for t in (65536, 1024, 4096, 16384) for b in (1, 8)]:
        if time.monotonic() - START > BUDGET:
            record["wkv4 left out for want of time"] = f"from b={b} t={t} on"
            return
        inputs = wkv_inputs(b, t, d, torch.bfloat16)
        del inputs["state"]
        k, v, w, u = (a.detach() for a in inputs.values())
        y = torch.empty_like(k)

        def step(k=k, v=v, w=w, u=u, y=y, b=b, t=t) -> None:
            sizes, grid = {"tokens": t, "width": d}, (-(-d // threads), 1, b)
            steps.call("step_through_time", grid, threads, _macros(k.dtype), sizes,
                       k=k, v=v, w=w, u=u, y=y)  # fmt: skip

        with torch.no_grad():
            ours, _ = wkv4(**inputs, backend="native")
        step()
        error = float((y.float() - ours.float()).norm() / ours.float().norm())
        row: dict[str, Any] = {"native": time_one(wkv4, inputs, "native")}
        row["step_through_time"] = {"forward": milliseconds(step, repeats=5)}
        row["times_faster_forward"] = row["step_through_time"]["forward"] / row["native"]["forward"]
        row["bytes"] = {"forward": 3 * 2 * k.numel(), "backward": 5 * 2 * k.numel()}
        row["differs_from_steps"] = error
        record[f"wkv4 b={b} t={t}"] = row
        say(f"wkv4 b={b} t={t}: {json.dumps(row)}")


def time_aft(record: dict) -> None:
    import torch

    for t in (65536, 1024, 4096, 16384):
        if time.monotonic() - START > BUDGET:
            record["aft_window left out for want of time"] = f"from t={t} on"
            return
        inputs = aft_inputs(1, t, WKV_WIDTH, AFT_WINDOW, torch.bfloat16)
        inputs = {name: inputs[name] for name in ("k", "v", "w")}
        row: dict[str, Any] = {
            name: time_one(aft_window_flat, inputs, name) for name in ("native", "torch")
        }
        numbers = inputs["k"].numel()
        row["bytes"] = {"forward": 3 * 2 * numbers, "backward": 5 * 2 * numbers}
        record[f"aft_window b=1 t={t}"] = row
        say(f"aft_window b=1 t={t}: {json.dumps(row)}")
        torch.cuda.empty_cache()


def time_recurrence(record: dict) -> None:
    """Against the byte floor and the PyTorch form."""
    import torch

    from zoo.ops.linear_recurrence import linear_recurrence

    for b, t in [(b, t) for t in (65536, 1024, 4096, 16384) for b in (1, 8)]:
        if time.monotonic() - START > BUDGET:
            record["linear_recurrence left out for want of time"] = f"from b={b} t={t} on"
            return
        inputs = recurrence_inputs(b, t, RECURRENCE_WIDTH, torch.bfloat16, memory=100.0)
        del inputs["state"]
        backends = ("native", "torch") if b * t <= 65536 else ("native",)
        row: dict[str, Any] = {name: time_one(linear_recurrence, inputs, name) for name in backends}
        numbers = inputs["u"].numel()
        row["bytes"] = {"forward": 3 * 2 * numbers, "backward": 5 * 2 * numbers}
        record[f"linear_recurrence b={b} t={t}"] = row
        say(f"linear_recurrence b={b} t={t}: {json.dumps(row)}")
        torch.cuda.empty_cache()


def time_one(op: Callable, inputs: dict, backend: str) -> dict[str, float]:
    import torch

    with torch.no_grad():
        forward = milliseconds(lambda: op(**inputs, backend=backend))
    y, _ = op(**inputs, backend=backend)
    dy, leaves = torch.randn_like(y), list(inputs.values())
    backward = milliseconds(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True,
                                                        allow_unused=True))  # fmt: skip
    return {"forward": forward, "backward": backward}


def time_step(record: dict, tokens: int = 65536) -> None:
    """One training step of Mamba at 130M parameters: 24 layers, 768 wide, batch 1, bfloat16."""
    import torch
    from torch import nn

    from zoo.mixers.mamba import Mamba

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mixer = nn.RMSNorm(768), Mamba(width=768, layers=24)

        def forward(self, x):
            return x + self.mixer(self.norm(x))

    torch.manual_seed(0)
    embedding = nn.Embedding(50280, 768)
    model = nn.Sequential(embedding, *(Block() for _ in range(24)), nn.RMSNorm(768)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(50280, (1, tokens + 1), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model(ids[:, :-1])
            loss = 0.0
            for h, target in zip(hidden.split(8192, 1), ids[:, 1:].split(8192, 1), strict=True):
                logits = torch.utils.checkpoint.checkpoint(
                    nn.functional.linear, h, embedding.weight, use_reentrant=False
                )
                loss = loss + nn.functional.cross_entropy(logits[0].float(), target[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    record["tokens"], record["parameters"] = tokens, sum(p.numel() for p in model.parameters())
    record["milliseconds"] = milliseconds(step, repeats=3)
    record["peak_bytes"] = torch.cuda.max_memory_allocated()
    say(f"Mamba 130M training step, {tokens} tokens: {record['milliseconds']:.0f} ms")


def ceilings(record: dict) -> None:
    import torch

    a = torch.empty(1 << 28, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    record["copy_bytes_per_second"] = 4 * a.numel() / milliseconds(lambda: b.copy_(a)) * 1e3
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    record["matmul_flops"] = 2 * 8192**3 / milliseconds(lambda: m @ m) * 1e3
    say(f"copy {record['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"matmul {record['matmul_flops'] / 1e12:.0f} TFLOP/s")  # fmt: skip


def build(record: dict) -> None:
    """First use into an empty cache, and once more from it."""
    import torch

    from zoo.ops import aft, causal_conv, cuda, linear_recurrence, selective_scan, wkv4

    target = cuda.architecture(*torch.cuda.get_device_capability())
    for kernel, macros in [
        (selective_scan.CUDA, selective_scan._macros(torch.bfloat16, STATES)),
        (causal_conv.CUDA, causal_conv._macros(torch.bfloat16, WINDOW)),
        (wkv4.CUDA, wkv4._macros(torch.bfloat16)),
        (aft.CUDA, aft._macros(torch.bfloat16, AFT_WINDOW)),
        (linear_recurrence.CUDA, linear_recurrence._macros(torch.bfloat16)),
    ]:
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            cuda.Module(cuda.binary(kernel.source, macros, target), torch.cuda.current_device())
            times.append(time.perf_counter() - begin)
        report = cuda.compile_source(kernel.source, macros, target, ("--ptxas-options=-v",)).log
        lines = [x.strip() for x in report.splitlines() if "Used" in x or "spill" in x]
        record[kernel.source] = {"first_s": times[0], "cached_s": times[1], "ptxas": lines}
        say(f"{kernel.source} for {target}: {times[0]:.2f} s, from the cache {times[1]:.3f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, check and time the CUDA kernels.")
    parser.add_argument("--out", type=Path, default=None, help="the JSON record")
    out = parser.parse_args().out
    stand_in_for_jaxtyping()
    try:
        import torch

        from zoo.ops import cuda

        absent = cuda.absent()
    except ImportError as error:
        absent = str(error)
    if absent:
        sys.stderr.write(f"gpu-check: {absent}; it needs an NVIDIA GPU and torch with CUDA\n")
        return 2
    now = datetime.datetime.now(datetime.UTC)
    record: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nvrtc": cuda.nvrtc_version(),
        },
        "ceilings": {}, "build": {}, "accuracy": {}, "milliseconds": {}, "mamba_130m_step": {},
    }  # fmt: skip
    right = False
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            torch.manual_seed(0)
            ceilings(record["ceilings"])
            build(record["build"])
            right = check(record["accuracy"])
            if right:  # no time is worth anything of what is wrong
                time_wkv(record["milliseconds"])
                time_aft(record["milliseconds"])
                time_recurrence(record["milliseconds"])
                time_ops(record["milliseconds"])
                time_step(record["mamba_130m_step"])
        finally:  # what was found before something failed is kept
            name = f"gpu-{now:%Y-%m-%d}.json"
            out = out or ROOT / "kernels" / "bench" / "results" / name
            out.write_text(json.dumps(record, indent=1) + "\n")
            say(f"written to {out}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
