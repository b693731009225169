"""The linear recurrence is its definition: every backend, every gradient, any decay in [0, 1]."""

import mmap
import sys

import emulator
import fuzz
import pytest
import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.ops import linear_recurrence as module
from zoo.ops.linear_recurrence import linear_recurrence

NARROW = (torch.bfloat16,)  # read by the kernel besides float32 and float64
BACKENDS = ["reference", "torch", "native"]
FAST = ["torch", "native"]
# (b, t, d): one token, widths that no vector divides, strips of one block and of several
SHAPES = [(1, 1, 1), (2, 2, 3), (3, 33, 40), (2, 103, 5), (1, 67, 150)]
NAMES = ["a", "u", "state"]


def arguments(b: int, t: int, d: int, kind: str = "any", dtype=torch.float64) -> dict:
    """Random float64 values, the same for any dtype. Decays: `any`, a fifth of them exactly 0 and
    a fifth exactly 1; `slow`, within 1e-3 of 1; `zeros`; `ones`.
    """
    torch.manual_seed(0)
    a, which = torch.rand(2, b, t, d, dtype=torch.float64)
    a = torch.where(which < 0.2, 0.0, torch.where(which > 0.8, 1.0, a))
    a = {"any": a, "slow": 1 - 1e-3 * which, "zeros": 0 * a, "ones": torch.ones_like(a)}[kind]
    u, state = torch.randn(b, t, d, dtype=torch.float64), torch.randn(b, d, dtype=torch.float64)
    values = dict(zip(NAMES, [a, u, state], strict=True))
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def weights(h: Tensor, last: Tensor) -> list[Tensor]:
    """Of a random function of both, the same for any dtype."""
    torch.manual_seed(1)
    return [torch.randn(a.shape, dtype=torch.float64).to(a.dtype) for a in (h, last)]


def everything(args: dict, backend: str) -> dict[str, Tensor]:
    """h, the last state and all gradients."""
    outputs = linear_recurrence(**args, backend=backend)
    gradients = torch.autograd.grad(outputs, list(args.values()), weights(*outputs))
    return dict(zip(["h", "last", *args], [*outputs, *gradients], strict=True))


def assert_close(found: dict, wanted: dict, tolerance: float) -> None:
    for name, value in wanted.items():
        error = (found[name].double() - value).norm() / (value.norm() + 1e-3)
        assert error <= tolerance, f"{name}: {error:.1e}"  # NaN fails too


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_tokens_by_hand(backend):
    a = torch.tensor([0.5, 0.0, 1.0]).view(1, 3, 1).requires_grad_()
    u = torch.tensor([1.0, 3.0, 5.0]).view(1, 3, 1).requires_grad_()
    state = torch.tensor([[4.0]]).requires_grad_()
    h, last = linear_recurrence(a, u, state, backend)
    assert h.flatten().tolist() == [3.0, 3.0, 8.0]
    assert last.tolist() == [[8.0]]
    # g = 1 + 1 of the last h and the state, then 1 + 1 g, then 1 + 0 g
    da, du, dstate = torch.autograd.grad(h.sum() + last.sum(), (a, u, state))
    assert du.flatten().tolist() == [1.0, 3.0, 2.0]
    assert da.flatten().tolist() == [4.0, 9.0, 6.0]  # g times 4, 3, 3
    assert dstate.tolist() == [[0.5]]


@pytest.mark.parametrize("kind", ["any", "slow", "zeros", "ones"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_float64_is_the_reference(backend, shape, kind):
    args = arguments(*shape, kind=kind)
    assert_close(everything(args, backend), everything(args, "reference"), 1e-13)


@pytest.mark.parametrize("kind", ["any", "slow", "ones"])
@pytest.mark.parametrize("backend", FAST)
def test_float32_is_right_to_rounding(backend, kind):
    """A memory of 1000 tokens adds up so many roundings of half 1.2e-7: by chance, their root."""
    args = arguments(1, 1500, 16, kind=kind, dtype=torch.float32)
    exact = {name: a.detach().double().requires_grad_() for name, a in args.items()}
    assert_close(everything(args, backend), everything(exact, "reference"), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_with_the_state_carried_are_the_whole(backend):
    args = arguments(2, 75, 19)
    wanted = everything(args, backend)
    hs, state, sizes = [], args["state"], [1, 2, 33, 39]
    for a, u in zip(args["a"].split(sizes, 1), args["u"].split(sizes, 1), strict=True):
        h, state = linear_recurrence(a, u, state, backend)
        hs.append(h)
    outputs = torch.cat(hs, 1), state
    gradients = torch.autograd.grad(outputs, list(args.values()), weights(*outputs))
    found = dict(zip(["h", "last", *args], [*outputs, *gradients], strict=True))
    assert_close(found, wanted, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_read_is_a_state_of_zeros(backend):
    args = arguments(2, 9, 3)
    wanted = everything(args | {"state": torch.zeros(2, 3).double().requires_grad_()}, backend)
    del args["state"]
    found = everything(args, backend)
    assert_close(found, {name: wanted[name] for name in found}, 0)


@pytest.mark.parametrize("backend", FAST)
def test_gradcheck(backend):
    args = arguments(2, 5, 3)
    assert torch.autograd.gradcheck(
        lambda *a: linear_recurrence(*a, backend=backend), tuple(args.values())
    )


@pytest.mark.parametrize("backend", FAST)
def test_gradients_flow_from_either_output_alone(backend):
    args = arguments(2, 70, 3)
    for i in (0, 1):
        wanted, found = (
            torch.autograd.grad(linear_recurrence(**args, backend=b)[i].sum(), list(args.values()))
            for b in ("reference", backend)
        )
        assert_close(dict(enumerate(found)), dict(enumerate(wanted)), 1e-13)


def test_slices_of_a_projection_are_read_where_they_lie():
    args = arguments(2, 37, 24)
    wanted = everything(args, "native")
    both = torch.cat([args["a"], args["u"]], -1).detach().requires_grad_()
    a, u = both.split(24, -1)
    outputs = linear_recurrence(a, u, args["state"], "native")
    (gradient,) = torch.autograd.grad(outputs, [both], weights(*outputs))
    da, du = gradient.split(24, -1)
    assert_close(dict(zip(["h", "last", "a", "u"], [*outputs, da, du], strict=True)),
                 {name: wanted[name] for name in ("h", "last", "a", "u")}, 0)  # fmt: skip
    linear_recurrence(**args, backend="native")[0].sum().backward()  # a sum's has no rows


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_come_and_go_while_the_state_stays_float32(backend, dtype):
    args = {k: v.detach() for k, v in arguments(2, 37, 19, dtype=dtype).items()}
    args["state"] = args["state"].float()
    wanted, exact = linear_recurrence(**{k: v.double() for k, v in args.items()})
    h, last = linear_recurrence(**args, backend=backend)
    assert (h.dtype, last.dtype) == (dtype, torch.float32)
    assert_close({"h": h}, {"h": wanted}, 4e-3)
    assert_close({"last": last}, {"last": exact}, 1e-6)
    h, _ = linear_recurrence(**(args | {"a": args["a"].float()}), backend=backend)
    assert h.dtype == dtype  # u's, whatever the decays have


@pytest.mark.parametrize("shape", SHAPES)
def test_native_writes_all_of_its_outputs(shape, poisoned):
    assert torch.isnan(torch.empty(3)).all()
    for name, value in everything(arguments(*shape, dtype=torch.float32), "native").items():
        assert torch.isfinite(value).all(), name


def test_native_gives_the_same_bits_on_any_number_of_threads():
    args, threads = arguments(3, 300, 150, dtype=torch.float32), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(everything(args, "native"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(other[name], value), name


def test_native_is_a_good_citizen_of_torch():
    torch.library.opcheck(module.RECURRENCE.op, tuple(arguments(2, 5, 3).values()))


@pytest.mark.mistyped
def test_shapes_that_do_not_fit_are_refused():
    args = {k: v.detach() for k, v in arguments(2, 5, 3).items()}
    with pytest.raises(ValueError, match=r"a is \(2, 5, 2\), must be \(2, 5, 3\)"):
        linear_recurrence(**(args | {"a": args["a"][..., :2]}))
    with pytest.raises(ValueError, match="state is"):
        linear_recurrence(**(args | {"state": args["state"][:1]}))
    with pytest.raises(ValueError, match="no tokens"):
        linear_recurrence(args["a"][:, :0], args["u"][:, :0])
    with pytest.raises(UserError, match="Did you mean 'native'"):
        linear_recurrence(**args, backend="nativ")


# (b, t, d), dtype, decays, whether threads run last first: one chunk, ends within a segment, at a
# segment's and at a chunk's, more chunks than the composition has warps
EMULATED = [
    ((2, 1, 3), torch.float32, "any", True),
    ((2, 67, 70), torch.float32, "any", False),
    ((1, 128, 5), torch.float32, "zeros", True),
    ((1, 2177, 2), torch.float32, "slow", True),
    ((1, 4321, 33), torch.float32, "slow", False),
    ((1, 2056, 3), torch.float32, "ones", True),
    ((2, 200, 3), torch.bfloat16, "any", False),
    ((2, 201, 3), torch.float16, "any", True),
]


@emulator.needed
@pytest.mark.parametrize(("shape", "dtype", "kind", "reverse"), EMULATED)
def test_cuda_is_the_reference(shape, dtype, kind, reverse, monkeypatch, poisoned):
    emulator.install(monkeypatch, reverse=reverse)
    args = arguments(*shape, kind=kind, dtype=torch.float32)
    a, u = (args[name].detach().to(dtype) for name in "au")
    state = args["state"].detach()
    h, last = module._forward_cuda(a, u, state)
    dh, dlast = weights(h, last)
    gradients = module._backward_cuda(dh, dlast, a, h, state)
    found = {"h": h, "last": last, **dict(zip(NAMES, gradients, strict=True))}

    wide = [x.double().requires_grad_() for x in (a, u, state)]
    outputs = linear_recurrence(*wide, backend="reference")
    exact = torch.autograd.grad(outputs, wide, [dh.double(), dlast.double()])
    wanted = dict(zip(found, [*outputs, *exact], strict=True))
    rounding = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name in ("last", "state") else dtype)
        tolerance = 2e-6 if value.dtype == torch.float32 else rounding
        assert_close({name: value}, {name: wanted[name]}, tolerance)


@emulator.needed
@pytest.mark.parametrize("t", [64, 65])
def test_cuda_with_nothing_required_of_the_state(t, monkeypatch, poisoned):
    emulator.install(monkeypatch)
    a, u, state = (x.detach() for x in arguments(1, t, 3, dtype=torch.float32).values())
    h, _ = module._forward_cuda(a, u, state)
    found = module._backward_cuda(torch.ones_like(h), None, a, h, state)
    wide = [x.double().requires_grad_() for x in (a, u, state)]
    wanted = linear_recurrence(*wide, backend="reference")[0]
    exact = torch.autograd.grad(wanted.sum(), wide)
    assert_close(dict(enumerate([h, *found])), dict(enumerate([wanted, *exact])), 1e-6)


# What the emulator must notice: text of the kernel, and the mistake in its place.
MISTAKES = {
    "no barrier in the composition": ("    __syncthreads();\n", ""),
    "a barrier that some threads skip": ("    __sync", "    if (here) __sync"),
    "swapped indices": (
        "from.at(p.b, p.start + first, p.channel)",
        "from.at(p.b, p.channel, p.start + first)",
    ),
}


@emulator.needed
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_emulator_notices(mistake, monkeypatch, poisoned):
    inputs = [x.detach() for x in arguments(2, 131, 5, "slow", dtype=torch.float32).values()]
    wanted, _ = linear_recurrence(*inputs, backend="reference")

    def check() -> None:
        for reverse in (False, True):
            emulator.install(monkeypatch, reverse=reverse, change=mistake)
            assert_close({"h": module._forward_cuda(*inputs)[0]}, {"h": wanted.double()}, 1e-5)

    with pytest.raises((AssertionError, RuntimeError), match=r"h: |different places"):
        check()


@emulator.needed
@pytest.mark.skipif(sys.platform != "linux", reason="needs 17 GB of address space for nothing")
@pytest.mark.parametrize("change", [None, ("token * row", "token * (int)row")])
def test_cuda_reads_rows_further_apart_than_32_bits_count(change, monkeypatch):
    """Token 1 lies 2^32 + 64 elements after token 0; nobody touches what is between.

    Offsets of 32 bits, the mistake, would find zeros.
    """
    a, u, state = (x.detach() for x in arguments(1, 2, 4, dtype=torch.float32).values())
    emulator.install(monkeypatch)
    wanted = module._forward_cuda(a, u, state)[0]
    apart, reserve_nothing = 2**32 + 64, 0x4000  # MAP_NORESERVE of Linux
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    memory = mmap.mmap(-1, 4 * (apart + 4), flags)
    far = torch.frombuffer(memory, dtype=torch.float32).as_strided((1, 2, 4), (0, apart, 1))
    far.copy_(u)
    emulator.install(monkeypatch, change=change)
    assert torch.equal(module._forward_cuda(a, far, state)[0], wanted) == (change is None)


def random_linear_recurrence_call(draw: fuzz.Draw) -> fuzz.Call:
    b, t, d = draw.batch(), draw.size(64, zero=False), draw.size()
    a = torch.sigmoid(3 * draw.values(b, t, d))
    a = torch.where(draw.values(b, t, d) > 1, a.round(), a)  # keeps all, or nothing
    tensors = {"a": a, "u": draw.values(b, t, d)}
    tensors["state"] = draw.maybe(draw.values(b, d, dtype=draw.wide))
    return fuzz.by_name(draw, linear_recurrence, tensors)
