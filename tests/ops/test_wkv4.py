"""WKV is its definition: every backend, every gradient, any chunking, any exponent."""

import math
import mmap
import sys

import emulator
import fuzz
import pytest
import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.ops import wkv4 as module
from zoo.ops.wkv4 import empty_average, wkv4

NARROW = (torch.bfloat16,)  # read by the kernel besides float32 and float64
BACKENDS = ["reference", "torch", "native"]
FAST = ["torch", "native"]
# (b, t, d): one token, lengths about the kernel's chunk and batch, widths that no vector divides
SHAPES = [(1, 1, 1), (2, 2, 3), (2, 31, 19), (1, 32, 16), (3, 33, 40), (2, 103, 5), (1, 1061, 3)]
NAMES = ["k", "v", "w", "u", "state"]


def arguments(
    b: int, t: int, d: int, size: float = 1.0, rate: float = 0.1, dtype=torch.float64
) -> dict:
    """Random float64 values, the same for any dtype; exponents of `size`, decay rates of `rate`."""
    torch.manual_seed(0)
    k, v, w, u = (torch.randn(s, dtype=torch.float64) for s in [(b, t, d), (b, t, d), (d,), (d,)])
    p, q, o = torch.randn(3, b, d, dtype=torch.float64)
    state = torch.stack([p, q.exp(), size * o], 1)
    values = dict(zip(NAMES, [size * k, v, rate * w.exp(), u, state], strict=True))
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def score(y: Tensor, state: Tensor) -> Tensor:
    """A random function of both, the same for any dtype."""
    torch.manual_seed(1)
    weights = [torch.randn(a.shape, dtype=torch.float64).to(a.dtype) for a in (y, state)]
    return (y * weights[0]).sum() + (state * weights[1]).sum()


def everything(args: dict, backend: str) -> dict[str, Tensor]:
    """y, the last state and all gradients."""
    y, state = wkv4(**args, backend=backend)
    gradients = torch.autograd.grad(score(y, state), list(args.values()))
    return {"y": y, "last": state, **dict(zip(args, gradients, strict=True))}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, value in wanted.items():
        error = (found[name].double() - value).norm() / (value.norm() + 1e-3)
        assert error <= tolerance, f"{name}: {error:.1e}"  # NaN fails too


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_tokens_by_hand(backend):
    k = torch.tensor([0.0, math.log(3), 0.0]).view(1, 3, 1)
    v = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1)
    w, u = torch.full((1,), math.log(2)), torch.full((1,), math.log(5))
    y, state = wkv4(k, v, w, u, backend=backend)
    # N: 1, 1/2 + 6, 13/4 + 4; D: 1, 1/2 + 3, 7/4 + 1; the present counts e^u = 5 times
    wanted = torch.tensor([1.0, (1 + 30) / (1 + 15), (6.5 + 20) / (3.5 + 5)])
    torch.testing.assert_close(y.flatten(), wanted)
    p, q, o = state.flatten()
    torch.testing.assert_close(torch.stack([p, q]) * o.exp(), torch.tensor([7.25, 2.75]))
    torch.testing.assert_close(o, torch.tensor(math.log(1.5)))  # the second token's, faded once


@pytest.mark.parametrize("size", [0.1, 1.0, 80.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_float64_is_the_reference(backend, shape, size):
    args = arguments(*shape, size=size)
    assert_close(everything(args, backend), everything(args, "reference"), 1e-11)


@pytest.mark.parametrize("rate", [0.0, 1e-5, 10.0, 500.0])
@pytest.mark.parametrize("backend", FAST)
def test_any_decay_is_exact(backend, rate):
    args = arguments(2, 300, 7, rate=rate)
    assert_close(everything(args, backend), everything(args, "reference"), 1e-11)


@pytest.mark.parametrize("rate", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize(("backend", "tolerance"), [("torch", 3e-5), ("native", 2e-6)])
def test_float32_is_right_to_rounding(backend, tolerance, rate):
    """Slow channels too: their exponent falls a thousand times by less than it can represent."""
    wanted = everything(arguments(1, 1500, 16, rate=rate), "reference")
    args = arguments(1, 1500, 16, rate=rate, dtype=torch.float32)
    assert_close(everything(args, backend), wanted, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exponents_far_beyond_float32_stay_finite_and_right(backend):
    wanted, last = wkv4(**arguments(2, 200, 16, size=80.0), backend="reference")
    found = everything(arguments(2, 200, 16, size=80.0, dtype=torch.float32), backend)
    assert all(value.isfinite().all() for value in found.values())
    assert_close(found, {"y": wanted, "last": last}, 1e-5)
    found = everything(arguments(2, 200, 16, size=1e4, dtype=torch.float32), backend)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_adding_to_all_exponents_moves_only_the_maximum(backend):
    args = {name: value.detach() for name, value in arguments(2, 67, 5).items()}
    y, last = wkv4(**args, backend=backend)
    state = args["state"] + torch.tensor([0.0, 0.0, 300.0])[:, None]
    moved, after = wkv4(**(args | {"k": args["k"] + 300, "state": state}), backend=backend)
    torch.testing.assert_close(moved, y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(after[:, :2], last[:, :2], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(after[:, 2], last[:, 2] + 300)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_read_is_the_empty_state(backend):
    args = arguments(2, 9, 3)
    args["state"] = empty_average(args["k"], 2, 3).requires_grad_()
    wanted = everything(args, backend)
    del args["state"]
    found = everything(args, backend)
    assert (wanted.pop("state").abs() < 1e-30).all()  # what is not there moves nothing
    assert_close(found, {name: wanted[name] for name in found}, 1e-15)
    assert torch.equal(found["y"][:, 0], args["v"][:, 0])  # of one token the average is its value


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_piece_size_of_the_torch_form_does_not_matter(chunk):
    args = arguments(2, 67, 5)
    wanted, last = wkv4(**args, backend="reference")
    y, state = module._torch(*args.values(), chunk=chunk)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("size", [1.0, 80.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_with_the_state_carried_are_the_whole(backend, size):
    args = arguments(2, 75, 19, size=size)
    wanted = everything(args, backend)
    ys, state, sizes = [], args["state"], [1, 2, 33, 39]
    for k, v in zip(args["k"].split(sizes, 1), args["v"].split(sizes, 1), strict=True):
        y, state = wkv4(k, v, args["w"], args["u"], state, backend)
        ys.append(y)
    y = torch.cat(ys, 1)
    gradients = torch.autograd.grad(score(y, state), list(args.values()))
    found = {"y": y, "last": state, **dict(zip(args, gradients, strict=True))}
    assert_close(found, wanted, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    """The maximum's own gradient included."""
    args = arguments(2, 5, 3)
    assert torch.autograd.gradcheck(lambda *a: wkv4(*a, backend=backend), tuple(args.values()))


def test_slices_of_a_projection_are_read_where_they_lie():
    args = arguments(2, 37, 24)
    wanted = everything(args, "native")
    k, v = torch.cat([args["k"], args["v"]], -1).split(24, -1)
    y, last = wkv4(**(args | {"k": k, "v": v}), backend="native")
    assert torch.equal(y, wanted["y"])
    assert torch.equal(last, wanted["last"])
    y.sum().backward()  # the gradient of a sum has no rows of its own
    assert args["k"].grad.isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_comes_and_goes_while_the_state_stays_float32(backend):
    args = {k: v.detach() for k, v in arguments(2, 37, 19, dtype=torch.bfloat16).items()}
    args["state"] = args["state"].float()
    wide = {k: v.double() for k, v in args.items()}
    wanted, last = wkv4(**wide, backend="reference")
    y, state = wkv4(**args, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close({"y": y}, {"y": wanted}, 4e-3)
    assert_close({"last": state}, {"last": last}, 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_native_writes_all_of_its_outputs(shape, poisoned):
    assert torch.isnan(torch.empty(3)).all()
    for name, value in everything(arguments(*shape, dtype=torch.float32), "native").items():
        assert torch.isfinite(value).all(), name


def test_native_gives_the_same_bits_twice_and_on_any_number_of_threads():
    args, threads = arguments(2, 300, 150, dtype=torch.float32), torch.get_num_threads()
    first = everything(args, "native")
    torch.set_num_threads(3)
    try:
        second = everything(args, "native")
    finally:
        torch.set_num_threads(threads)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_native_is_a_good_citizen_of_torch():
    torch.library.opcheck(module.WKV.op, (*arguments(2, 5, 3).values(), True))


@pytest.mark.mistyped
def test_shapes_that_do_not_fit_are_refused():
    args = {k: v.detach() for k, v in arguments(2, 5, 3).items()}
    with pytest.raises(ValueError, match="u is"):
        wkv4(**(args | {"u": args["u"][:2]}))
    with pytest.raises(ValueError, match="no tokens"):
        wkv4(**(args | {"k": args["k"][:, :0], "v": args["v"][:, :0]}))
    with pytest.raises(UserError, match="Did you mean 'native'"):
        wkv4(**args, backend="nativ")


# (b, t, d), dtype, exponents' size, rate, whether threads run last first: one chunk, ends within a
# segment and at a chunk's, more chunks than the composition has warps, decays of every kind
EMULATED = [
    ((2, 1, 3), torch.float32, 1.0, 0.1, True),
    ((2, 67, 70), torch.float32, 1.0, 0.1, False),
    ((1, 128, 5), torch.float32, 80.0, 1e-3, True),
    ((1, 2177, 2), torch.float32, 1.0, 1e-4, True),
    ((1, 4321, 33), torch.float32, 1.0, 1e-2, False),
    ((2, 200, 3), torch.bfloat16, 1.0, 10.0, False),
    ((2, 200, 3), torch.float16, 1.0, 0.0, True),
]


@emulator.needed
@pytest.mark.parametrize(("shape", "dtype", "size", "rate", "reverse"), EMULATED)
def test_cuda_is_the_reference(shape, dtype, size, rate, reverse, monkeypatch, poisoned):
    emulator.install(monkeypatch, reverse=reverse)
    args = arguments(*shape, size=size, rate=rate, dtype=torch.float32)
    inputs = [args[x].detach().to(dtype) for x in "kv"] + [args[x].detach() for x in NAMES[2:]]
    y, last, saved = module._forward_cuda(*inputs, True)
    torch.manual_seed(1)
    dy, dlast = (torch.randn(a.shape, dtype=torch.float64).to(a.dtype) for a in (y, last))
    gradients = module._backward_cuda(dy, dlast, *inputs[:4], saved)
    found = {"y": y, "last": last, **dict(zip(NAMES, gradients, strict=True))}
    assert torch.equal(module._forward_cuda(*inputs, False)[0], y)

    wide = dict(zip(NAMES, [a.double().requires_grad_() for a in inputs], strict=True))
    exact, state = wkv4(**wide, backend="native")
    loss = (exact * dy.double()).sum() + (state * dlast.double()).sum()
    wanted = dict(zip(NAMES, torch.autograd.grad(loss, list(wide.values())), strict=True))
    wanted |= {"y": exact, "last": state}
    rounding = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for name, value in found.items():
        assert value.dtype == (dtype if name in ("y", "k", "v") else torch.float32)
        # a key of 80 is rounded before it is raised
        tolerance = 2e-5 if size > 1 else 2e-6 if value.dtype == torch.float32 else rounding
        assert_close({name: value}, {name: wanted[name]}, tolerance)


@emulator.needed
def test_cuda_from_nothing_and_with_nothing_required_of_the_state(monkeypatch, poisoned):
    emulator.install(monkeypatch)
    inputs = [a.detach() for a in arguments(1, 70, 3, dtype=torch.float32).values()]
    inputs[4] = empty_average(inputs[0], 1, 3)
    y, _, saved = module._forward_cuda(*inputs, True)
    gradients = module._backward_cuda(torch.ones_like(y), None, *inputs[:4], saved)
    wide = [a.double().requires_grad_() for a in inputs]
    wanted, _ = wkv4(*wide, backend="reference")
    exact = torch.autograd.grad(wanted.sum(), wide)
    assert_close(dict(enumerate([y, *gradients])), dict(enumerate([wanted, *exact])), 1e-6)


@emulator.needed
def test_cuda_keeps_infinite_sums_where_the_definition_does(monkeypatch, poisoned):
    emulator.install(monkeypatch)
    inputs = [a.detach() for a in arguments(1, 70, 3, dtype=torch.float32).values()]
    inputs[4][0, 0, 1] = inputs[4][0, 1, 2] = math.inf
    last = module._forward_cuda(*inputs, False)[1]
    wanted = wkv4(*(a.double() for a in inputs), backend="reference")[1]
    assert wanted.isinf().any()
    torch.testing.assert_close(last.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


# What the emulator must notice: text of the kernel, and the mistake in its place.
MISTAKES = {
    "no barrier in the composition": ("    __syncthreads();\n", ""),
    "a barrier that some threads skip": ("    __sync", "    if (r.here) __sync"),
    "swapped indices": ("a.k.at(p.b, t, p.channel)", "a.k.at(p.b, p.channel, t)"),
}


@emulator.needed
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_emulator_notices(mistake, monkeypatch, poisoned):
    inputs = [a.detach() for a in arguments(2, 131, 5, dtype=torch.float32).values()]
    wanted, _ = wkv4(*inputs, backend="reference")

    def check() -> None:
        for reverse in (False, True):
            emulator.install(monkeypatch, reverse=reverse, change=mistake)
            assert_close({"y": module._forward_cuda(*inputs, False)[0]}, {"y": wanted}, 1e-6)

    with pytest.raises((AssertionError, RuntimeError), match=r"y: |different places"):
        check()


@emulator.needed
@pytest.mark.skipif(sys.platform != "linux", reason="needs 17 GB of address space for nothing")
@pytest.mark.parametrize("change", [None, ("t * row", "(int)t * (int)row")])
def test_cuda_reads_rows_further_apart_than_32_bits_count(change, monkeypatch):
    """Token 1 lies 2^32 + 64 elements after token 0; nobody touches what is between.

    Offsets of 32 bits, the mistake, would find zeros.
    """
    inputs = [a.detach() for a in arguments(1, 2, 4, dtype=torch.float32).values()]
    emulator.install(monkeypatch)
    wanted = module._forward_cuda(*inputs, False)[0]
    apart, reserve_nothing = 2**32 + 64, 0x4000  # MAP_NORESERVE of Linux
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    memory = mmap.mmap(-1, 4 * (apart + 4), flags)
    k = torch.frombuffer(memory, dtype=torch.float32).as_strided((1, 2, 4), (0, apart, 1))
    k.copy_(inputs[0])
    emulator.install(monkeypatch, change=change)
    assert torch.equal(module._forward_cuda(k, *inputs[1:], False)[0], wanted) == (change is None)


def random_wkv4_call(draw: fuzz.Draw) -> fuzz.Call:
    b, t, d = draw.batch(), draw.size(64, zero=False), draw.size()
    size, rate = draw.random.choice([1.0, 30.0]), draw.random.choice([0.0, 1e-3, 1.0, 50.0])
    tensors = {
        "k": size * draw.values(b, t, d),
        "v": draw.values(b, t, d),
        "w": rate * draw.values(d, dtype=draw.wide).exp(),
        "u": draw.values(d, dtype=draw.wide),
        "state": draw.maybe(fuzz.average_so_far(draw, b, d)),
    }
    call = fuzz.by_name(draw, wkv4 if rate else fuzz.averages(wkv4), tensors)
    # dk_t = b (P v_t + Q) + .., where P v and Q cancel as far as all values are alike; so dw, du
    return call._replace(cancelling=((0, 2, 3), 1))
