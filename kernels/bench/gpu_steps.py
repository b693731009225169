"""One step of gpu_check.py, in this process: `python gpu_steps.py STEP FILE [--rehearse]`.

Every op is compared with its definition in float64, outputs, states and all gradients, and with
itself for equal bits; times are medians in milliseconds. FILE is written as the step goes. Exit
code: 0, 4 where something is wrong, 3 where a package is missing. `--rehearse` takes small sizes on
the CPU: what is then known is that the step runs.
"""

import argparse
import csv
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
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

    from zoo.ops import aft, causal_conv, linear_recurrence, selective_scan, wkv4
    from zoo.ops.attention import Part, attend
    from zoo.ops.linear_attention import linear_attention
    from zoo.ops.runtime import cuda, libraries, nvrtc
    from zoo.ops.runtime.build import BuildError
    from zoo.ops.runtime.native_op import every_kernel
    from zoo.ops.runtime.sizes import ceil_div
except ImportError as error:
    sys.stderr.write(f"gpu-check: {error}; {NEEDS}\n")
    sys.exit(2)

DEVICE = "cuda"
OUT: Path | None = None  # where RECORD is kept
RECORD: dict[str, Any] = {}
START = time.monotonic()
LEFT_OUT, WRONG = 3, 4  # exit codes
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
    """A line about what was found, which is kept: the step may be ended at any time."""
    sys.stdout.write(f"{time.monotonic() - START:5.0f} s  {text}\n")
    sys.stdout.flush()
    if OUT is not None:
        draft = OUT.with_name(f".{OUT.name}.tmp")
        draft.write_text(json.dumps(RECORD) + "\n", encoding="utf-8")
        draft.replace(OUT)


def milliseconds(run: Callable[[], object], repeats: int = 15) -> float:
    """The median by CUDA events, after three runs that warm up; on the CPU one run's time."""
    if DEVICE == "cpu":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
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
    state = None if older is None else aft.AFTWindow(older, past_k, past_v)
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


def check(record: dict, op_name: str | None = None) -> bool:
    """Every op, or one, in every type at odd sizes; True where all are right."""
    good = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, sizes in CHECKED.items():
            op, draw = OPS[name]
            for size in sizes if op_name in (None, name) else ():
                case = f"{name} {dtype} {size}"
                try:
                    found, same = errors(op, draw(dtype, *size), "native")
                except Exception as error:  # whatever it is: the others are still to be checked
                    record[case] = {"error": one_line(error)}
                    say(f"FAILED  {case}: {record[case]['error']}")
                    good = False
                    continue
                good &= judge(record, case, found, same, dtype, repeats=True)
    return good


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def check_library(record: dict, name: str) -> bool:
    """One that is installed, through our adapter."""
    op, draw, without, dtype, size = LIBRARIES[name]
    if not libraries.installed(name):
        raise ModuleNotFoundError(f"{libraries.PACKAGES[name]} is not installed")
    inputs = {key: a for key, a in draw(dtype, *size).items() if key not in without}
    # mamba_ssm's state has no gradient
    found, same = errors(op, inputs, name, weighted=1 if without else 2)
    return judge(record, name, found, same, dtype, repeats=False)


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
    steps = cuda.CudaKernel(
        "bench/wkv4_steps.cu", sizes="tokens width", rows="k v", sequences="y", pointers="w u"
    )
    k, v, w, u = (inputs[name].detach() for name in ("k", "v", "w", "u"))
    (b, t, d), threads, y = k.shape, 32, torch.empty_like(k)

    def step() -> torch.Tensor:
        sizes, grid = {"tokens": t, "width": d}, (ceil_div(d, threads), 1, b)
        steps.call("step_through_time", grid, threads, sizes, k=k, v=v, w=w, u=u, y=y)
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


def time_ops(record: dict, op_name: str | None = None) -> bool:
    """One op at the length that README shows, or all at others; against PyTorch where that fits."""
    good, shown = True, op_name is not None
    plan = [
        *(("wkv4", b, t, (WKV_WIDTH,)) for t in TIMED for b in (1, 8)),
        *(("linear_recurrence", b, t, (RECURRENCE_WIDTH, 100.0)) for t in TIMED for b in (1, 8)),
        *(("aft_window", 1, t, (WKV_WIDTH, AFT_WINDOW)) for t in TIMED),
        *(("selective_scan", b, t, (WIDTH, STATES)) for t in SCANNED for b in (1, 8)),
        *(("causal_conv", b, t, (WIDTH,)) for t in SCANNED for b in (1, 8)),
    ]
    for name, b, t, size in plan:
        if b * t > 524288 or (b == 1 and t == TIMED[0]) != shown or op_name not in (None, name):
            continue
        case = f"{name} b={b} t={t}"
        try:
            record[case] = time_op(name, b, t, size)
        except Exception as error:  # whatever it is: the others are still to be timed
            record[case] = {"error": one_line(error)}
            good = False
        say(f"{case}: {json.dumps(record[case])}")
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return good


def time_op(name: str, b: int, t: int, size: tuple) -> dict[str, Any]:
    """Times of an op in bfloat16 by what computes it, and by direction."""
    op, draw = OPS[name]
    states = ("state", "older", "past_k", "past_v")
    inputs = draw(torch.bfloat16, b, t, *size)
    inputs = {key: a for key, a in inputs.items() if key not in states}
    fits = b * t <= (8192 if name == "selective_scan" else 65536)
    backends = ("native", "torch") if fits else ("native",)
    row: dict[str, Any] = {backend: time_one(op, inputs, backend) for backend in backends}
    if name in VECTORS:
        row["bytes"] = {way: 2 * n * b * t * size[0] for way, n in MOVED.items()}
    if name == "selective_scan" and DEVICE == "cuda" and (theirs := theirs_scan(inputs)):
        row["selective_scan_cuda"] = {k: milliseconds(run) for k, run in theirs.items()}
    if name == "wkv4" and DEVICE == "cuda":
        step = step_through_time(inputs)
        with torch.no_grad():
            ours, _ = op(**inputs, backend="native")
        apart = (step().float() - ours.float()).norm() / ours.float().norm()
        row["step_through_time"] = {"forward": milliseconds(step, repeats=5)}
        row["differs_from_steps"] = apart.item()
    return row


def peak() -> int | None:
    """The most bytes that PyTorch has held in this process."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def time_step(record: dict, tokens: int = 65536, layers: int = 24) -> None:
    """One training step of Mamba at 130M parameters: 24 layers, 768 wide, batch 1, bfloat16.

    With our kernels, and with mamba_ssm's and causal_conv1d's where they are installed.
    """
    from zoo.mixers.mamba import Mamba

    class Block(nn.Module):
        def __init__(self, backend: str) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(768)
            self.mixer = Mamba(width=768, layers=layers, backend=backend)

        def forward(self, x):
            return x + self.mixer(self.norm(x))

    rival = DEVICE == "cuda" and libraries.installed("mamba_ssm")
    backends = ["native"] + ["mamba_ssm"] * rival
    for backend in backends:
        torch.manual_seed(0)
        embedding = nn.Embedding(50280, 768)
        blocks = (Block(backend) for _ in range(layers))
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
        record[backend] = {"milliseconds": milliseconds(step, repeats=3), "peak_bytes": peak()}
        row = record[backend]
        say(f"Mamba 130M training step, {tokens} tokens, {backend}: {row['milliseconds']:.0f} ms")


def ceilings(record: dict) -> None:
    count, width = (1 << 28, 8192) if DEVICE == "cuda" else (1 << 10, 8)
    a = torch.empty(count, device=DEVICE, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    record["copy_bytes_per_second"] = 4 * a.numel() / milliseconds(lambda: b.copy_(a)) * 1e3
    m = torch.randn(width, width, device=DEVICE, dtype=torch.bfloat16)
    record["matmul_flops"] = 2 * width**3 / milliseconds(lambda: m @ m) * 1e3
    say(f"copy {record['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"matmul {record['matmul_flops'] / 1e12:.0f} TFLOP/s")  # fmt: skip


def build(record: dict) -> bool:
    """First use into an empty cache, and once more from it; one that fails stops no other."""
    on_gpu = DEVICE == "cuda"
    target = nvrtc.architecture(*torch.cuda.get_device_capability()) if on_gpu else "sm_90"
    good = True
    for _, kernel in every_kernel().values():
        if kernel is None:
            continue
        macros = ("DTYPE", cuda.DTYPES[torch.bfloat16]), *kernel.macros
        try:
            record[kernel.source] = _build(kernel.source, macros, target)
        except (BuildError, RuntimeError) as error:
            record[kernel.source] = {"error": str(error)}
            good = False
        say(f"{kernel.source} for {target}: {record[kernel.source]}")
    return good


def _build(source: str, macros: nvrtc.Macros, target: str) -> dict[str, Any]:
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        image = nvrtc.binary(source, macros, target)
        if DEVICE == "cuda":
            cuda.LoadedModule(image, torch.cuda.current_device())
        times.append(time.perf_counter() - begin)
    report = nvrtc.compile_source(source, macros, target, ("--ptxas-options=-v",)).log
    lines = [x.strip() for x in report.splitlines() if "Used" in x or "spill" in x]
    return {"first_s": times[0], "cached_s": times[1], "ptxas": lines}


def sanitize(record: dict) -> bool:
    """NVIDIA's memory checker over every kernel at its smallest size."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise ModuleNotFoundError("compute-sanitizer is not on the PATH")
    words = [tool, "--error-exitcode", "9", sys.executable, __file__, "smallest", os.devnull]
    done = subprocess.run(words, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    record["sanitizer"] = {"exit_code": done.returncode, "report": lines[-40:]}
    say(f"compute-sanitizer: {lines[-1] if lines else done.stderr[-300:]}")
    return done.returncode == 0


def smallest(record: dict) -> None:
    """Every kernel once, forward and backward, in float32."""
    for name, sizes in CHECKED.items():
        op, draw = OPS[name]
        inputs = draw(torch.float32, *sizes[0])
        y, _ = op(**inputs, backend="native")
        y.sum().backward()
        record[name] = "ran"
    say("every kernel ran")


def decode_inputs(dtype, b: int, t: int, h: int, d: int) -> dict:
    """One query, every key before it, and some that are kept elsewhere."""
    shapes = {"q": 1, "k": t, "v": t, "far_k": t // 2 + 1, "far_v": t // 2 + 1}
    return leaves(**{name: normal(b, n, h, d, dtype=dtype) for name, n in shapes.items()})


def decoding(q, k, v, far_k, far_v, backend="auto"):
    return attend([Part(q, k, v), Part(q, far_k, far_v)], backend=backend)


FORMS: dict[str, tuple[Callable, Callable, tuple]] = {
    "attention": (attention, attention_inputs, (2, 1001, 3, 64)),
    "decoding": (decoding, decode_inputs, (2, 1001, 3, 64)),
    "linear_attention": (linear_attention, linear_inputs, (2, 1001, 3, 64)),
}


def check_forms(record: dict) -> bool:
    """Attention in parts, in decoding and linear: the forms that `auto` takes here."""
    good = True
    for name, (op, draw, size) in FORMS.items():
        for dtype in (torch.float32, torch.bfloat16):
            case = f"{name} {dtype} {size}"
            try:
                found, same = errors(op, draw(dtype, *size), "auto")
            except Exception as error:
                record[case] = {"error": one_line(error)}
                say(f"FAILED  {case}: {record[case]['error']}")
                good = False
                continue
            good &= judge(record, case, found, same, dtype, repeats=False)
    return good


# Of train.py in the training steps, and in those that only need some run.
LONG = {"size": "base", "seq_len": 65536, "batch_tokens": 65536, "trainer.max_steps": 6}
SHORT = {"size": "small", "seq_len": 1024, "batch_tokens": 8192, "trainer.max_steps": 40}


def words(model: str, folder: Path, options: dict[str, Any]) -> list[str]:
    given = {"model": model, "runs": folder, "logger": "none", "valid_windows": 1, **options}
    given["trainer.accelerator"] = "gpu" if DEVICE == "cuda" else "cpu"
    return [f"{key}={value}" for key, value in given.items()]


def train_model(record: dict, model: str, precision: str) -> bool:
    """Run `train.py` at 65536 tokens: speed by step, peak memory, the loss.

    Its figures are kept before the trained model is audited, which reads twice the length and may
    outlast the step.
    """
    fit = importlib.import_module("zoo.training.fit")
    train = importlib.import_module("zoo.cli.train")
    assert OUT is not None
    folder = OUT.with_suffix(".runs")
    given = words(model, folder, {**LONG, "trainer.precision": precision})
    audit = fit.audit_trained

    def audit_later(*arguments: Any) -> dict[str, Any]:
        record.update(trained(folder), command=given, peak_bytes=peak())
        say(f"train.py {' '.join(given)}: trained; the audit follows")
        return audit(*arguments)

    fit.audit_trained = audit_later
    try:
        code = train.main(given)
    finally:
        fit.audit_trained = audit
    record.update(trained(folder), command=given, exit_code=code)
    say(f"train.py {' '.join(given)}: exit code {code}")
    return code == 0


def trained(folder: Path) -> dict[str, Any]:
    """Read what the only run in a folder has recorded so far."""
    (run,) = (path.parent for path in folder.glob("*/run.json"))
    with open(run / "metrics.csv", encoding="utf-8") as file:
        steps = list(csv.DictReader(file))
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    kept = ("parameters", "backends", "status", "audit")
    return {key: info.get(key) for key in kept} | {"steps": steps}


def decode(record: dict) -> bool:
    """A model trained for two steps reads and writes tokens."""
    from zoo.cli import eval as measure
    from zoo.cli import train

    assert OUT is not None
    folder, good = OUT.with_suffix(".runs"), True
    for model in ("mamba", "transformer", "gla"):
        code = train.main(words(model, folder, {**SHORT, "trainer.max_steps": 2}))
        lengths = "task.speed.lengths=[1024]" if DEVICE == "cuda" else "task.speed.lengths=[64]"
        report = f"report={folder / model}.html"
        device = f"device={DEVICE}"
        given = [f"run={folder}/{model}*", "task=speed", lengths, report, device, "logger=none"]
        code = code or measure.main(given)
        rows = [
            json.loads(line)
            for path in folder.glob(f"{model}*/results.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        record[model] = {"exit_code": code, "rows": rows}
        good &= code == 0
        say(f"{model}: eval.py task=speed, exit code {code}")
    return good


def resume(record: dict) -> bool:
    """A training that is killed after its first checkpoint goes on to its last step."""
    assert OUT is not None
    folder, options = OUT.with_suffix(".runs"), {**SHORT, "save_every": 2}
    command = [sys.executable, str(ROOT / "train.py"), *words("mamba", folder, options)]
    first = subprocess.Popen(command)
    while first.poll() is None and not list(folder.glob("*/checkpoints/*.ckpt")):
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    killed = first.wait()
    (file,) = folder.glob("*/run.json")
    at = json.loads(file.read_text(encoding="utf-8"))["step"]
    record |= {"killed_with": killed, "killed_at_step": at}
    say(f"killed at step {at}")
    code = subprocess.run(command).returncode
    info = json.loads(file.read_text(encoding="utf-8"))
    record |= {"exit_code": code, "step": info["step"], "status": info["status"]}
    say(f"resumed to step {info['step']}, {info['status']}")
    return code == 0 and killed == -signal.SIGKILL and info["status"] == "done"


def describe(record: dict) -> None:
    """The machine, its versions, and the speeds it cannot exceed."""
    if DEVICE == "cuda":
        record["device"] = torch.cuda.get_device_name()
        record["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
    versions: dict[str, str | None] = {"python": platform.python_version()}
    record["versions"] = versions
    versions |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    say(f"{record.get('device')}, {versions}")
    ceilings(record)


def run(step: str, record: dict) -> bool | None:
    """Carry one step out; False where something was wrong."""
    kind, _, rest = step.partition(" ")
    if kind == "train":
        model, _, precision = rest.partition(" ")
        return train_model(record, model, precision)
    if kind == "library":
        return check_library(record, rest)
    if kind == "accuracy":
        return check(record, rest)
    if kind == "times":
        return time_ops(record, rest)
    small = {} if DEVICE == "cuda" else {"tokens": 64, "layers": 1}
    steps: dict[str, Callable[[dict], bool | None]] = {
        "machine": describe,
        "build": build,
        "sanitizer": sanitize,
        "smallest": smallest,
        "other lengths": time_ops,
        "attention": check_forms,
        "decode": decode,
        "resume": resume,
        "mamba_130m_step": partial(time_step, **small),
    }
    return steps[step](record)


def rehearse() -> None:
    """Small sizes, on the CPU."""
    global DEVICE, TIMED, SCANNED
    DEVICE, TIMED, SCANNED = "cpu", (16, 8), (16, 8)
    CHECKED.update(
        selective_scan=[(2, 33, 5, 4, 30.0)],
        causal_conv=[(2, 9, 19)],
        wkv4=[(2, 33, 7, 1e-4)],
        aft_window=[(64, 1, 17, 1), (2, 33, 7, 4)],
        linear_recurrence=[(2, 33, 7)],
    )
    for name, (op, draw, _) in FORMS.items():
        FORMS[name] = (op, draw, (1, 65, 2, 16))
    small = {"size": "tiny", "seq_len": 64, "threads": 1, "save_every": 2}
    LONG.update(small, batch_tokens=64)
    SHORT.update(small, batch_tokens=128)


def main() -> int:
    global OUT
    parser = argparse.ArgumentParser()
    parser.add_argument("step")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if options.rehearse:
        rehearse()
    elif absent := cuda.absent():
        sys.stderr.write(f"gpu-check: {absent}; {NEEDS}\n")
        return 2
    if options.step == "present":
        return 0
    OUT = options.out if options.out != Path(os.devnull) else None
    torch.manual_seed(0)
    try:
        good = run(options.step, RECORD)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return LEFT_OUT
    return WRONG if good is False else 0


if __name__ == "__main__":
    sys.exit(main())
