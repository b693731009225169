"""Builds, checks and times the CUDA kernels on this machine: `make gpu-check`, under 8 minutes.

    python kernels/bench/gpu_check.py [--out FILE]      check and time; FILE is the JSON record
    python kernels/bench/gpu_check.py --table FILE      README's table of a record

Runs from a plain checkout with any Python that has torch 2.11 or newer with CUDA, and nothing else.
Every op is compared with its definition in float64 first, outputs, states and all gradients, and
with itself for equal bits; only what is right is timed. Libraries that are installed are compared
too: what they get wrong is told and decides nothing. The record: date, device, versions, errors,
medians of times in milliseconds. Exit code 0, 1 where an op is wrong, 2 without a GPU.
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
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NEEDS = "it needs an NVIDIA GPU and torch with CUDA"


def stand_in_for_jaxtyping() -> None:
    """Shapes in annotations are for readers; where the package is missing, so are its checks."""
    if importlib.util.find_spec("jaxtyping") is None:
        module: Any = types.ModuleType("jaxtyping")
        anything = type("Shaped", (), {"__class_getitem__": classmethod(lambda cls, item: item[0])})
        module.Float = module.Int = module.Bool = module.Shaped = anything
        sys.modules["jaxtyping"] = module


sys.path.insert(0, str(ROOT))
stand_in_for_jaxtyping()
try:
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    from zoo.ops import aft, causal_conv, cuda, libraries, linear_recurrence, selective_scan, wkv4
    from zoo.ops.attention import Part, attend
    from zoo.ops.linear_attention import linear_attention
except ImportError as error:
    sys.stderr.write(f"gpu-check: {error}; {NEEDS}\n")
    sys.exit(2)

DEVICE = "cuda"
BUDGET = 400  # seconds after which nothing new is timed
START = time.monotonic()
WIDTH, STATES, WINDOW = 1536, 16, 4  # of Mamba at 130M parameters
WKV_WIDTH = 768  # of RWKV-4 at 169M, and of AFT
RECURRENCE_WIDTH = 1024  # of Hawk's recurrence, at 768
AFT_WINDOW = 32  # its default
# Relative, of the norm. Of float32: sums over 4321 tokens, by chance the root of that many halves
# of its last place; of the others: their own rounding, twice.
TOLERANCE = {"float32": 4e-6, "bfloat16": 8e-3, "float16": 1e-3}
SCANNED = (65536, 1024, 8192, 262144)  # tokens that the scan is timed at,
TIMED = (65536, 1024, 4096, 16384)  # and the others


def say(text: str) -> None:
    sys.stdout.write(f"{time.monotonic() - START:5.0f} s  {text}\n")
    sys.stdout.flush()


def milliseconds(run: Callable[[], object], repeats: int = 15) -> float:
    """The median by CUDA events, after three runs that warm up."""
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


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def leaves(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def scan_inputs(dtype, b: int, t: int, d: int, n: int, rate: float = 1.0) -> dict:
    narrow = partial(normal, dtype=dtype)
    return leaves(
        x=narrow(b, t, d),
        dt=narrow(b, t, d),
        A=-rate * torch.rand(d, n, device=DEVICE).add(0.05),
        B=narrow(b, t, n),
        C=narrow(b, t, n),
        D=normal(d),
        z=narrow(b, t, d),
        dt_bias=normal(d),
        state=normal(b, d, n),
    )


def conv_inputs(dtype, b: int, t: int, d: int, width: int = WINDOW) -> dict:
    narrow = partial(normal, dtype=dtype)
    inputs = {"x": narrow(b, t, d), "weight": normal(d, width), "bias": normal(d)}
    return leaves(**inputs, state=narrow(b, width - 1, d))


def wkv_inputs(dtype, b: int, t: int, d: int, rate: float = 0.1) -> dict:
    k, v = normal(b, t, d, dtype=dtype), normal(b, t, d, dtype=dtype)
    p, q, o = normal(3, b, d)
    return leaves(
        k=k, v=v, w=rate * normal(d).exp(), u=normal(d), state=torch.stack([p, q.exp(), o], 1)
    )


def aft_inputs(dtype, b: int, t: int, d: int, s: int) -> dict:
    narrow = partial(normal, dtype=dtype)
    p, q, o = normal(3, b, d)
    return leaves(
        k=narrow(b, t, d),
        v=narrow(b, t, d),
        w=normal(1, d, s),
        older=torch.stack([p, q.exp(), o], 1),
        past_k=narrow(b, s - 1, d),
        past_v=narrow(b, s - 1, d),
    )


def aft_window(k, v, w, older=None, past_k=None, past_v=None, backend="auto"):
    """The op with a state of tensors; of the one after, both sums over older tokens.

    Not their maximum: where two keys share it, which of them has its gradient is anyone's choice.
    """
    state = None if older is None else aft.Window(older, past_k, past_v)
    y, after = aft.aft_window(k, v, w, state, backend)
    p, q, o = after.older.unbind(1)
    return y, torch.stack([p, q], 1) * o.exp()[:, None]


def recurrence_inputs(dtype, b: int, t: int, d: int, memory: float = 2.0) -> dict:
    """Decays that keep a state for about so many tokens; at 2 any, 0 and 1 among them."""
    a = 1 - torch.rand(b, t, d, device=DEVICE) / (memory / 2)
    if memory == 2:
        a = a.mul(1.5).sub(0.25).clamp(0, 1)
    return leaves(a=a.to(dtype), u=normal(b, t, d, dtype=dtype), state=normal(b, d))


def attention_inputs(dtype, b: int, t: int, h: int, d: int) -> dict:
    """Two sets of keys, of which the first is the queries' own."""
    shapes = {"q": t, "k": t, "v": t, "far_k": t // 2 + 1, "far_v": t // 2 + 1}
    return leaves(**{name: normal(b, n, h, d, dtype=dtype) for name, n in shapes.items()})


def attention(q, k, v, far_k, far_v, backend="auto"):
    return attend([Part(q, k, v, causal=True), Part(q, far_k, far_v)], backend=backend)


def linear_inputs(dtype, b: int, t: int, h: int, d: int) -> dict:
    q, k, v = (normal(b, t, h, d, dtype=dtype) for _ in range(3))
    return leaves(q=q, k=k, v=v, log_decay=-normal(b, t, h).abs() / 10, state=normal(b, h, d, d))


# Ours, what makes their inputs, and the odd sizes and strong decays they are checked at.
OPS: dict[str, tuple[Callable, Callable]] = {
    "selective_scan": (selective_scan.selective_scan, scan_inputs),
    "causal_conv": (causal_conv.causal_conv, conv_inputs),
    "wkv4": (wkv4.wkv4, wkv_inputs),
    "aft_window": (aft_window, aft_inputs),
    "linear_recurrence": (linear_recurrence.linear_recurrence, recurrence_inputs),
}
CHECKED: dict[str, list[tuple]] = {
    "selective_scan": [
        *((64, 1, 17, 1), (3, 1001, 131, 16), (1, 4099, 200, 16), (2, 300, 70, 33)),
        (2, 513, 64, 8, 30.0),
    ],
    "causal_conv": [(2, 2, 19), (2, 1001, 1536)],
    "wkv4": [(64, 1, 17), (3, 1001, 131), (1, 4321, 70, 1e-4)],
    "aft_window": [(64, 1, 17, 1), (3, 1001, 131, 32), (1, 4321, 70, 9), (2, 300, 35, 128)],
    "linear_recurrence": [(64, 1, 17, 4.0), (3, 1001, 131), (1, 4321, 70, 500.0)],
}
# Sequences that ops whose state is a vector must move at least: the floor of their times.
MOVED, VECTORS = {"forward": 3, "backward": 5}, ("wkv4", "aft_window", "linear_recurrence")
# Libraries, with what of the inputs they do not take, and types and sizes they do.
LIBRARIES: dict[str, tuple[Callable, Callable, tuple[str, ...], torch.dtype, tuple]] = {
    "mamba_ssm": (*OPS["selective_scan"], ("state",), torch.bfloat16, (2, 1001, 128, 16)),
    "causal_conv1d": (*OPS["causal_conv"], (), torch.bfloat16, (2, 1001, 136)),
    "fla": (linear_attention, linear_inputs, (), torch.bfloat16, (2, 1001, 3, 64)),
    "xformers": (attention, attention_inputs, (), torch.bfloat16, (2, 1001, 3, 64)),
}


def everything(op: Callable, inputs: dict, weights: list, backend: str) -> dict:
    """Outputs, state and all gradients of a fixed random function of those with a weight."""
    outputs = op(**inputs, backend=backend)
    terms = [(y.double() * w).sum() for y, w in zip(outputs, weights, strict=False)]
    gradients = torch.autograd.grad(sum(terms), list(inputs.values()))
    found = dict(zip(("y", "last"), outputs, strict=True))
    return found | {f"d{k}": g for k, g in zip(inputs, gradients, strict=True)}


def errors(op: Callable, inputs: dict, backend: str, weighted: int = 2) -> tuple[dict, bool]:
    """Relative errors of a backend against the definition in float64; and equal bits twice."""
    exact = {k: a.detach().double().requires_grad_() for k, a in inputs.items()}
    with torch.no_grad():
        shapes = [a.shape for a in op(**exact, backend="torch")][:weighted]
    weights = [torch.randn(s, device=DEVICE, dtype=torch.float64) for s in shapes]
    wanted = everything(op, exact, weights, "torch")
    found, again = (everything(op, inputs, weights, backend) for _ in range(2))
    same = all(torch.equal(found[k], again[k]) for k in found)
    with torch.no_grad():
        known = {k: v for k, v in wanted.items() if v.numel()}  # a window of one has no past
        apart = {k: float((found[k].double() - v).norm() / v.norm()) for k, v in known.items()}
    return apart, same


def judge(
    record: dict, name: str, found: dict[str, float], same: bool, dtype, *, repeats: bool
) -> bool:
    """Whether the worst error is small, and the bits equal where the op `repeats` itself."""
    worst = max(found, key=lambda k: found[k] if found[k] == found[k] else float("inf"))
    right = found[worst] <= TOLERANCE[str(dtype).removeprefix("torch.")] and (same or not repeats)
    record[name] = {"errors": found, "same_bits_twice": same, "right": right}
    say(f"{'right' if right else 'WRONG'}  {name}: {worst} {found[worst]:.1e}, same bits: {same}")
    return right


def check(record: dict) -> bool:
    """Every op in every type at odd sizes; True where all are right."""
    good = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, sizes in CHECKED.items():
            op, draw = OPS[name]
            for size in sizes:
                found, same = errors(op, draw(dtype, *size), "native")
                case = f"{name} {dtype} {size}"
                good &= judge(record, case, found, same, dtype, repeats=True)
    return good


def check_libraries(record: dict) -> None:
    """Those installed, through our adapters; one that fails is told as it failed."""
    for name, (op, draw, without, dtype, size) in LIBRARIES.items():
        if not libraries.installed(name):
            record[name] = "not installed"
            continue
        inputs = {key: a for key, a in draw(dtype, *size).items() if key not in without}
        try:  # mamba_ssm's state has no gradient
            found, same = errors(op, inputs, name, weighted=1 if without else 2)
        except Exception as error:  # whatever it is: the kernels of ours are still to be timed
            record[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            say(f"FAILED  {name}: {record[name]}")
        else:
            judge(record, name, found, same, dtype, repeats=False)


def theirs_scan(inputs: dict) -> dict[str, Callable] | None:
    """mamba_ssm's kernels, forward and backward, on the same numbers in its layout."""
    if importlib.util.find_spec("selective_scan_cuda") is None:
        return None
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


def step_through_time(inputs: dict) -> Callable[[], torch.Tensor]:
    """The published scheme of WKV's kernels, forward: a thread per channel, token by token."""
    steps = cuda.Kernel(
        "bench/wkv4_steps.cu", sizes="tokens width", rows="k v", sequences="y", pointers="w u"
    )
    k, v, w, u = (inputs[name].detach() for name in ("k", "v", "w", "u"))
    (b, t, d), threads, y = k.shape, 32, torch.empty_like(k)

    def step() -> torch.Tensor:
        sizes, grid = {"tokens": t, "width": d}, (-(-d // threads), 1, b)
        macros = wkv4._macros(k.dtype)
        steps.call("step_through_time", grid, threads, macros, sizes, k=k, v=v, w=w, u=u, y=y)
        return y

    return step


def time_one(op: Callable, inputs: dict, backend: str) -> dict[str, float]:
    with torch.no_grad():
        forward = milliseconds(lambda: op(**inputs, backend=backend))
    y, _ = op(**inputs, backend=backend)
    dy, wanted = torch.randn_like(y), list(inputs.values())
    backward = milliseconds(
        lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True, allow_unused=True)
    )
    return {"forward": forward, "backward": backward}


def time_ops(record: dict) -> None:
    """Longest texts first in importance; each against the PyTorch form where that fits."""
    plan = [
        *(("wkv4", b, t, (WKV_WIDTH,)) for t in TIMED for b in (1, 8)),
        *(("linear_recurrence", b, t, (RECURRENCE_WIDTH, 100.0)) for t in TIMED for b in (1, 8)),
        *(("aft_window", 1, t, (WKV_WIDTH, AFT_WINDOW)) for t in TIMED),
        *(("selective_scan", b, t, (WIDTH, STATES)) for t in SCANNED for b in (1, 8)),
        *(("causal_conv", b, t, (WIDTH,)) for t in SCANNED for b in (1, 8)),
    ]
    plan.sort(key=lambda each: each[1:3] != (1, 65536))  # what README's table shows comes first
    for name, b, t, size in plan:
        if b * t > 524288:
            continue
        if time.monotonic() - START > BUDGET:
            record["left out for want of time"] = f"from {name} b={b} t={t} on"
            return
        op, draw = OPS[name]
        states = ("state", "older", "past_k", "past_v")
        inputs = draw(torch.bfloat16, b, t, *size)
        inputs = {key: a for key, a in inputs.items() if key not in states}
        fits = b * t <= (8192 if name == "selective_scan" else 65536)
        row: dict[str, Any] = {
            backend: time_one(op, inputs, backend)
            for backend in (("native", "torch") if fits else ("native",))
        }
        if name in VECTORS:
            row["bytes"] = {way: 2 * n * b * t * size[0] for way, n in MOVED.items()}
        if name == "selective_scan" and (theirs := theirs_scan(inputs)):
            row["selective_scan_cuda"] = {k: milliseconds(run) for k, run in theirs.items()}
        if name == "wkv4":
            step = step_through_time(inputs)
            with torch.no_grad():
                ours, _ = op(**inputs, backend="native")
            apart = (step().float() - ours.float()).norm() / ours.float().norm()
            row["step_through_time"] = {"forward": milliseconds(step, repeats=5)}
            row["differs_from_steps"] = apart.item()
        record[f"{name} b={b} t={t}"] = row
        say(f"{name} b={b} t={t}: {json.dumps(row)}")
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def time_step(record: dict, tokens: int = 65536) -> None:
    """One training step of Mamba at 130M parameters: 24 layers, 768 wide, batch 1, bfloat16.

    With our kernels, and with mamba_ssm's and causal_conv1d's where they are installed.
    """
    from zoo.mixers.mamba import Mamba

    class Block(nn.Module):
        def __init__(self, backend: str) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(768)
            self.mixer = Mamba(width=768, layers=24, backend=backend)

        def forward(self, x):
            return x + self.mixer(self.norm(x))

    backends = ["native"] + ["mamba_ssm"] * libraries.installed("mamba_ssm")
    for backend in backends:
        torch.manual_seed(0)
        embedding = nn.Embedding(50280, 768)
        blocks = (Block(backend) for _ in range(24))
        model = nn.Sequential(embedding, *blocks, nn.RMSNorm(768)).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        ids = torch.randint(50280, (1, tokens + 1), device=DEVICE)

        def step(model=model, embedding=embedding, optimizer=optimizer, ids=ids) -> None:
            with torch.autocast(DEVICE, torch.bfloat16):
                hidden = model(ids[:, :-1])
                loss = 0.0
                for h, target in zip(hidden.split(8192, 1), ids[:, 1:].split(8192, 1), strict=True):
                    logits = checkpoint(
                        nn.functional.linear, h, embedding.weight, use_reentrant=False
                    )
                    loss = loss + nn.functional.cross_entropy(logits[0].float(), target[0])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        record["tokens"], record["parameters"] = tokens, sum(p.numel() for p in model.parameters())
        torch.cuda.reset_peak_memory_stats()
        row = {"milliseconds": milliseconds(step, repeats=3)}
        record[backend] = row | {"peak_bytes": torch.cuda.max_memory_allocated()}
        say(f"Mamba 130M training step, {tokens} tokens, {backend}: {row['milliseconds']:.0f} ms")


def ceilings(record: dict) -> None:
    a = torch.empty(1 << 28, device=DEVICE, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    record["copy_bytes_per_second"] = 4 * a.numel() / milliseconds(lambda: b.copy_(a)) * 1e3
    m = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    record["matmul_flops"] = 2 * 8192**3 / milliseconds(lambda: m @ m) * 1e3
    say(f"copy {record['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"matmul {record['matmul_flops'] / 1e12:.0f} TFLOP/s")  # fmt: skip


def build(record: dict) -> None:
    """First use into an empty cache, and once more from it."""
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


WORDS = {
    "selective_scan": f"selective scan, {WIDTH} channels, {STATES} states",
    "wkv4": f"WKV-4, {WKV_WIDTH} channels",
    "aft_window": f"AFT, {WKV_WIDTH} channels, window {AFT_WINDOW}",
    "linear_recurrence": f"linear recurrence, {RECURRENCE_WIDTH} channels",
    "causal_conv": f"causal convolution + silu, {WIDTH} channels",
}
AGAINST = {
    "selective_scan_cuda": "mamba-ssm's kernel",
    "step_through_time": "a kernel that steps through time",
    "torch": "chunked PyTorch",
}


def table(record: dict) -> list[str]:
    """README's table of a record, in Markdown."""
    versions = record["versions"]
    lines = [
        f"`make gpu-check` on one {record['device']}, {record['date'][:10]}, torch "
        f"{versions['torch']}, CUDA {versions['cuda']}; bfloat16, one sequence of 65536 tokens, "
        "medians; copies run at "
        f"{record['ceilings']['copy_bytes_per_second'] / 1e12:.2f} TB/s there.",
        "",
        "| what | forward | backward | against |",
        "|---|---|---|---|",
    ]
    for name, words in WORDS.items():
        row = record["milliseconds"].get(f"{name} b=1 t=65536")
        if row is None:
            continue
        ours = row["native"]
        rivals = [
            f"{told} " + ", ".join(f"{row[key][way] / ours[way]:.1f}x ({way})" for way in row[key])
            for key, told in AGAINST.items()
            if key in row
        ]
        times = " | ".join(f"{ours[way]:.2f} ms" for way in ("forward", "backward"))
        lines.append(f"| {words} | {times} | {'; '.join(rivals)} |")
    step = record["mamba_130m_step"]
    if "native" in step:
        ours = step["native"]["milliseconds"]
        rival = ""
        if "mamba_ssm" in step:
            rival = f"with mamba-ssm's kernels {step['mamba_ssm']['milliseconds'] / ours:.2f}x"
        lines.append(f"| training step of Mamba, 130M parameters | {ours:.0f} ms | | {rival} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, check and time the CUDA kernels.")
    parser.add_argument("--out", type=Path, default=None, help="the JSON record")
    parser.add_argument("--table", type=Path, default=None, help="print the table of a record")
    options = parser.parse_args()
    if options.table:
        sys.stdout.write("\n".join(table(json.loads(options.table.read_text()))) + "\n")
        return 0
    if absent := cuda.absent():
        sys.stderr.write(f"gpu-check: {absent}; {NEEDS}\n")
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
        "ceilings": {}, "build": {}, "accuracy": {}, "libraries": {}, "milliseconds": {},
        "mamba_130m_step": {},
    }  # fmt: skip
    right = False
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            torch.manual_seed(0)
            ceilings(record["ceilings"])
            build(record["build"])
            right = check(record["accuracy"])
            check_libraries(record["libraries"])
            if right:  # no time is worth anything of what is wrong
                time_ops(record["milliseconds"])
                time_step(record["mamba_130m_step"])
        finally:  # what was found before something failed is kept
            name = f"gpu-{now:%Y-%m-%d}.json"
            out = options.out or ROOT / "kernels" / "bench" / "results" / name
            out.write_text(json.dumps(record, indent=1) + "\n")
            say(f"written to {out}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
