"""The scan is its definition: every backend, every gradient, any chunking."""

import math
import mmap
import sys

import emulator
import fuzz
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import UserError
from zoo.ops import selective_scan as module
from zoo.ops.selective_scan import selective_scan

NARROW = (torch.bfloat16,)  # read by the kernel besides float32 and float64
BACKENDS = ["reference", "torch", "native"]
FAST = ["torch", "native"]
# (b, t, d, n): one token, odd lengths, widths and states that no vector divides, many chunks
SHAPES = [(1, 1, 1, 1), (2, 37, 19, 3), (3, 67, 40, 17), (1, 131, 16, 16), (2, 1060, 5, 2)]
NAMES = ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state"]


def arguments(b: int, t: int, d: int, n: int, rate: float = 1.0, dtype=torch.float64) -> dict:
    """Random float64 values, the same for any dtype; `rate` scales A, hence the decays."""
    torch.manual_seed(0)
    shapes = [(b, t, d), (b, t, d), (d, n), (b, t, n), (b, t, n), (d,), (b, t, d), (d,), (b, d, n)]
    values = {k: torch.randn(s, dtype=torch.float64) for k, s in zip(NAMES, shapes, strict=True)}
    values["A"] = -rate * values["A"].exp()
    return {k: v.to(dtype).requires_grad_() for k, v in values.items()}


def everything(args: dict, backend: str) -> dict[str, Tensor]:
    """y, the last state and all gradients of a random function of both."""
    y, state = selective_scan(**args, backend=backend)
    torch.manual_seed(1)
    weights = [torch.randn(a.shape, dtype=torch.float64).to(a.dtype) for a in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(args.values()))
    return {"y": y, "last": state, **dict(zip(args, gradients, strict=True))}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, value in wanted.items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"  # NaN fails too


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_tokens_by_hand(backend):
    one = math.log(math.e - 1)  # softplus of it is 1; exp(1 * -ln 2) = 1/2
    x, dt = torch.tensor([[[1.0], [2.0]]]), torch.full((1, 2, 1), one)
    A, B, C = torch.full((1, 1), -math.log(2)), torch.ones(1, 2, 1), torch.tensor([[[1.0], [3.0]]])
    y, state = selective_scan(x, dt, A, B, C, backend=backend)
    torch.testing.assert_close(state, torch.tensor([[[2.5]]]))  # 1, then 1/2 + 2
    torch.testing.assert_close(y, torch.tensor([[[1.0], [7.5]]]))  # 1 * 1, 3 * 2.5
    z, four = torch.tensor([[[0.0], [100.0]]]), torch.full((1, 1, 1), 4.0)
    y, state = selective_scan(x, dt, A, B, C, torch.ones(1), z, state=four, backend=backend)
    torch.testing.assert_close(state, torch.tensor([[[3.5]]]))  # 4/2 + 1 = 3, 3/2 + 2
    torch.testing.assert_close(y, torch.tensor([[[0.0], [1250.0]]]))  # (3 * 3.5 + 2) * 100


@pytest.mark.parametrize("rate", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_float64_is_the_reference(backend, shape, rate):
    args = arguments(*shape, rate=rate)
    assert_close(everything(args, backend), everything(args, "reference"), 2e-14)


@pytest.mark.parametrize("rate", [0.01, 1.0, 100.0])
def test_native_float32_gradients_are_right_to_a_millionth(rate):
    shape = (2, 131, 40, 16)
    wanted = everything(arguments(*shape, rate=rate), "reference")
    assert_close(
        everything(arguments(*shape, rate=rate, dtype=torch.float32), "native"), wanted, 1e-6
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", [1 - 1e-6, 1e-30, 1e-300])
def test_any_decay_is_exact(backend, decay):
    args = arguments(1, 200, 3, 2)
    args["dt"] = torch.full_like(args["dt"], math.log(math.e - 1)).requires_grad_()
    args["dt_bias"] = torch.zeros_like(args["dt_bias"]).requires_grad_()
    args["A"] = torch.full_like(args["A"], math.log(decay)).requires_grad_()
    wanted = everything(args, "reference")
    found = everything(args, backend)
    for name in ("A", "state"):  # they vanish with the decay
        torch.testing.assert_close(found[name], wanted.pop(name), rtol=1e-12, atol=1e-200)
    assert_close(found, wanted, 1e-13)


def test_native_steps_are_right_relative_to_themselves():
    dt = torch.linspace(-40, 40, 4001).reshape(-1, 1, 1)  # one token each: y is the step
    one = torch.ones_like(dt)
    y, _ = selective_scan(one, dt, torch.full((1, 1), -1.0), one, one, backend="native")
    wanted = F.softplus(dt.double(), threshold=99)
    torch.testing.assert_close(y.double(), wanted, rtol=4e-7, atol=0)


@pytest.mark.parametrize("states", [3, 4])  # one at a time, four at a time
def test_native_decays_are_right_relative_to_themselves_and_to_one(states):
    exponent = -torch.logspace(-6, 1.9, 3000)  # one to a call: what it takes depends on the largest
    one, zero = torch.full((1, 1, 1), math.log(math.e - 1)), torch.zeros(1, 1, states)
    decays = []
    for rates in exponent.split(1):
        A, h = rates.expand(1, states), torch.ones(1, 1, states)
        _, h = selective_scan(zero[..., :1], one, A, zero, zero, state=h, backend="native")
        decays.append(h[0, 0].double())
    wanted = exponent.double().exp()[:, None]  # 1 - wanted is about -exponent where that is small
    error = (torch.stack(decays) - wanted).abs() / wanted
    assert (error <= 6e-8 + 4e-7 * exponent.abs()[:, None]).all()


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_piece_size_of_the_torch_form_does_not_matter(chunk):
    args = arguments(2, 67, 5, 3)
    wanted, last = selective_scan(**args, backend="reference")
    y, state = module._torch(*args.values(), chunk=chunk)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_with_the_state_carried_are_the_whole(backend):
    args = arguments(2, 75, 19, 3)
    wanted = everything(args, backend)
    ys, state, start = [], args["state"], 0
    for length in (1, 2, 33, 39):
        part = {
            k: v[:, start : start + length] if k in ("x", "dt", "B", "C", "z") else v
            for k, v in args.items()
        }
        y, state = selective_scan(**(part | {"state": state}), backend=backend)
        ys.append(y)
        start += length
    y = torch.cat(ys, 1)
    torch.manual_seed(1)
    loss = (y * torch.randn_like(y)).sum() + (state * torch.randn_like(state)).sum()
    gradients = dict(zip(args, torch.autograd.grad(loss, list(args.values())), strict=True))
    assert_close({"y": y, "last": state, **gradients}, wanted, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    args = arguments(2, 5, 3, 2)
    assert torch.autograd.gradcheck(
        lambda *a: selective_scan(*a, backend=backend), tuple(args.values())
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_optional_may_be_absent(backend):
    args = arguments(2, 9, 3, 2)
    full = {k: v.detach().clone() for k, v in args.items()}
    for name in ("D", "dt_bias", "state"):
        full[name].zero_()
    full["z"].fill_(50.0)  # silu(50) = 50
    y, state = selective_scan(**full, backend=backend)
    short = {k: args[k] for k in ("x", "dt", "A", "B", "C")}
    found, last = selective_scan(**short, backend=backend)
    torch.testing.assert_close(50 * found, y)
    torch.testing.assert_close(last, state)
    last.sum().backward()  # nothing reaches C, and y is not used
    assert args["x"].grad is not None
    assert args["C"].grad is None or not args["C"].grad.any()


def test_slices_of_a_projection_are_read_where_they_lie():
    args = arguments(2, 37, 24, 4)
    wanted = everything(args, "native")
    wide = torch.cat([args["x"], args["z"], args["dt"], args["B"], args["C"]], -1)
    parts = wide.split([24, 24, 24, 4, 4], -1)
    y, last = selective_scan(
        **(args | dict(zip(["x", "z", "dt", "B", "C"], parts, strict=True))), backend="native"
    )
    assert torch.equal(y, wanted["y"])
    assert torch.equal(last, wanted["last"])
    y.sum().backward()  # the gradient of a sum has no rows of its own
    assert torch.isfinite(args["x"].grad).all()


def test_bfloat16_comes_and_goes_while_the_state_stays_float32():
    args = {k: v.detach() for k, v in arguments(2, 37, 19, 3, dtype=torch.bfloat16).items()}
    args["A"], args["state"] = args["A"].float(), args["state"].float()
    wide = {k: v.double() for k, v in args.items()}
    wanted, last = selective_scan(**wide, backend="reference")
    y, state = selective_scan(**args, backend="native")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close({"y": y, "last": state}, {"y": wanted}, 4e-3)
    assert_close({"last": state}, {"last": last}, 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_native_writes_all_of_its_outputs(shape, poisoned):
    assert torch.isnan(torch.empty(3)).all()
    for name, value in everything(arguments(*shape, dtype=torch.float32), "native").items():
        assert torch.isfinite(value).all(), name


def test_native_gives_the_same_bits_twice():
    args = arguments(2, 300, 150, 5, dtype=torch.float32)
    first, second = everything(args, "native"), everything(args, "native")
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("width", [16, 80, 272, 300])  # one block to a unit, or several of them
def test_native_sums_over_channels_alike_in_any_number_of_threads(width):
    args, threads = arguments(2, 77, width, 6), torch.get_num_threads()
    wanted = everything(args, "reference")
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert_close(everything(args, "native"), wanted, 2e-14)
    finally:
        torch.set_num_threads(threads)


def test_native_sums_of_a_long_sequence_are_right_to_a_millionth():
    args = arguments(1, 20000, 3, 4)
    exact = everything(args, "native")
    narrow = {k: v.detach().float().requires_grad_() for k, v in args.items()}
    assert_close(everything(narrow, "native"), exact, 1e-6)


def on_cuda(args: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], ...]:
    """What `everything` computes, by the CUDA kernel in the emulator; and by the definition.

    Sequences are of `dtype`, the rest float32; the definition takes the same numbers in float64.
    """
    inputs = {
        k: a.detach().to(dtype if k in module.SEQUENCES else torch.float32) for k, a in args.items()
    }
    y, last, saved = module._forward_cuda(*inputs.values(), True)
    torch.manual_seed(1)
    dy, dlast = (torch.randn(a.shape, dtype=torch.float64).to(a.dtype) for a in (y, last))
    tensors = [inputs[k] for k in NAMES if k != "state"]
    gradients = module._backward_cuda(dy, dlast, *tensors, saved)
    found = {"y": y, "last": last, **dict(zip(NAMES, gradients, strict=True))}
    wide = {k: a.double().requires_grad_() for k, a in inputs.items()}
    exact, exact_last = selective_scan(**wide, backend="reference")
    loss = (exact * dy.double()).sum() + (exact_last * dlast.double()).sum()
    wanted = torch.autograd.grad(loss, list(wide.values()))
    return found, {"y": exact, "last": exact_last, **dict(zip(NAMES, wanted, strict=True))}


# (b, t, d, n), dtype, whether time is split, whether threads run last first, rate. Few sizes of n,
# each of which takes a compilation.
EMULATED = [
    ((2, 37, 19, 3), torch.float32, True, False, 1.0),
    ((2, 37, 19, 3), torch.float32, False, True, 1e-4),
    ((1, 99, 3, 4), torch.float32, True, True, 100.0),
    ((1, 67, 35, 16), torch.bfloat16, False, False, 1.0),
    ((1, 67, 35, 16), torch.bfloat16, True, True, 1.0),
    ((1, 5, 3, 33), torch.float16, True, True, 1.0),
]


@emulator.needed
@pytest.mark.parametrize(("shape", "dtype", "split", "reverse", "rate"), EMULATED)
def test_cuda_is_the_reference(shape, dtype, split, reverse, rate, monkeypatch, poisoned):
    emulator.install(monkeypatch, split=split, reverse=reverse)
    found, wanted = on_cuda(arguments(*shape, rate=rate), dtype)
    rounding = {torch.float32: 0, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for name, value in found.items():
        assert value.dtype == (dtype if name in ("y", *module.SEQUENCES) else torch.float32)
        # an exponent is rounded before it is raised, and here they reach -100
        precise = 1e-6 if rate < 100 else 4e-6
        tolerance = rounding if value.dtype == dtype != torch.float32 else precise
        assert_close({name: value}, {name: wanted[name]}, tolerance)


@emulator.needed
def test_cuda_does_without_what_is_optional(monkeypatch, poisoned):
    emulator.install(monkeypatch)
    args = arguments(1, 34, 3, 2, dtype=torch.float32)
    short = [args[k].detach() for k in ("x", "dt", "A", "B", "C")] + [None] * 3
    y, last, saved = module._forward_cuda(*short, None, True)
    wide = [args[k].detach().double().requires_grad_() for k in ("x", "dt", "A", "B", "C")]
    wanted, wanted_last = selective_scan(*wide, backend="reference")
    gradients = module._backward_cuda(torch.ones_like(y), None, *short, saved)
    exact = torch.autograd.grad(wanted.sum(), wide)
    found = dict(enumerate([y, last, *gradients[:5]]))
    assert_close(found, dict(enumerate([wanted, wanted_last, *exact])), 1e-6)


# What the emulator must notice: text of the kernel, and the mistake in its place.
MISTAKES = {
    "no barrier before a tile is overwritten": ("__syncthreads();\n        fill(", "fill("),
    "a barrier that some threads skip": ("        __sync", "if (p.here) __sync"),
    "swapped indices": ("start + t, k, t", "start + k, t, t"),
}


def emulated_error(monkeypatch, change: tuple[str, str]) -> None:
    """Raises what is wrong with y where a line of the kernel is changed."""
    inputs = [a.detach() for a in arguments(1, 67, 40, 4, dtype=torch.float32).values()]
    wanted, _ = selective_scan(*inputs, backend="reference")
    for reverse in (False, True):
        emulator.install(monkeypatch, split=False, reverse=reverse, change=change)
        y, *_ = module._forward_cuda(*inputs, False)
        assert_close({"y": y}, {"y": wanted}, 1e-6)


@emulator.needed
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_emulator_notices(mistake, monkeypatch, poisoned):
    with pytest.raises((AssertionError, RuntimeError), match=r"y: |different places"):
        emulated_error(monkeypatch, mistake)


@emulator.needed
@pytest.mark.skipif(sys.platform != "linux", reason="needs 17 GB of address space for nothing")
@pytest.mark.parametrize("change", [None, ("t * row", "(int)t * (int)row")])
def test_cuda_reads_rows_further_apart_than_32_bits_count(change, monkeypatch):
    """Token 1 lies 2^32 + 64 elements after token 0; nobody touches what is between.

    Offsets of 32 bits, the mistake, would find zeros.
    """
    args = [a.detach() for a in arguments(1, 2, 4, 4, dtype=torch.float32).values()]
    emulator.install(monkeypatch)
    wanted = module._forward_cuda(*args, False)
    apart = 2**32 + 64
    reserve_nothing = 0x4000  # MAP_NORESERVE of Linux
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    memory = mmap.mmap(-1, 4 * (apart + 4), flags)
    x = torch.frombuffer(memory, dtype=torch.float32).as_strided((1, 2, 4), (0, apart, 1))
    x.copy_(args[0])
    emulator.install(monkeypatch, change=change)
    same = torch.equal(module._forward_cuda(x, *args[1:], False)[0], wanted[0])
    assert same == (change is None)


def test_without_gradients_the_kernel_is_called_past_the_dispatcher(monkeypatch):
    args = arguments(1, 1, 3, 2)

    def dispatched(*_):
        raise AssertionError("dispatched")

    wanted, _ = selective_scan(**args, backend="native")
    monkeypatch.setattr(module.SCAN, "op", dispatched)
    with torch.no_grad():
        assert torch.equal(selective_scan(**args, backend="native")[0], wanted)
    constant = {k: v.detach() for k, v in args.items()}
    assert torch.equal(selective_scan(**constant, backend="native")[0], wanted)
    with pytest.raises(AssertionError, match="dispatched"):
        selective_scan(**args, backend="native")


@pytest.mark.parametrize("grad", [False, True])
def test_operations_are_counted_with_and_without_gradients(grad):
    args = arguments(2, 5, 3, 2)
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        selective_scan(**args, backend="native")
    assert counter.get_total_flops() == 9 * 2 * 5 * 3 * 2


@pytest.mark.parametrize("grad", [False, True])
def test_native_compiles_into_one_graph(grad):
    args = tuple(arguments(2, 5, 3, 2).values())
    compiled = torch.compile(lambda *a: module.SCAN(*a), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        found, wanted = compiled(*args), module.SCAN(*args)
    torch.testing.assert_close(found, wanted)
    if grad:
        gradients = [torch.autograd.grad(y.sum() + h.sum(), args) for y, h in (found, wanted)]
        torch.testing.assert_close(*gradients)


def test_native_is_a_good_citizen_of_torch():
    args = arguments(2, 5, 3, 2)
    torch.library.opcheck(module.SCAN.op, (*args.values(), True))
    short = [args[k] for k in ("x", "dt", "A", "B", "C")]
    torch.library.opcheck(module.SCAN.op, (*short, None, None, None, None, True))


@pytest.mark.mistyped
def test_shapes_that_do_not_fit_are_refused():
    args = {k: v.detach() for k, v in arguments(2, 5, 3, 2).items()}
    with pytest.raises(ValueError, match="B is"):
        selective_scan(**(args | {"B": args["B"][:, :4]}))
    with pytest.raises(ValueError, match="no tokens"):
        selective_scan(
            **{k: v[:, :0] if k in ["x", "dt", "B", "C", "z"] else v for k, v in args.items()}
        )
    with pytest.raises(UserError, match="Did you mean 'native'"):
        selective_scan(**args, backend="nativ")


def random_selective_scan_call(draw: fuzz.Draw) -> fuzz.Call:
    b, t, d, n = draw.batch(), draw.size(64, zero=False), draw.size(), draw.size(4)
    wide, rate = draw.wide, draw.random.choice([1e-4, 1.0, 100.0])
    tensors = {
        "x": draw.values(b, t, d),
        "dt": draw.values(b, t, d),
        "A": -rate * draw.values(d, n, dtype=wide).exp(),
        "B": draw.values(b, t, n),
        "C": draw.values(b, t, n),
        "D": draw.maybe(draw.values(d, dtype=wide)),
        "z": draw.maybe(draw.values(b, t, d)),
        "dt_bias": draw.maybe(draw.values(d, dtype=wide)),
        "state": draw.maybe(draw.values(b, d, n, dtype=wide)),
    }
    return fuzz.by_name(draw, selective_scan, tensors)
