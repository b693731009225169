"""The averages of AFT are its formula: every variant, backend, gradient and chunking."""

import mmap
import sys

import emulator
import fuzz
import pytest
import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.ops import aft_kernel as module
from zoo.ops.aft import AFTWindow, aft, aft_window
from zoo.ops.aft_full import aft_full
from zoo.ops.runtime import cuda
from zoo.ops.wkv4 import empty_average

NARROW = (torch.bfloat16,)  # read by the kernel besides float32 and float64
BACKENDS = ["reference", "torch", "native"]
FAST = ["torch", "native"]
NAMES = ["k", "v", "w", "older", "past_k", "past_v"]
# (t, h, s, n): tokens, heads, window, keys before them; blocks of 32 and of 64, one block and more
CONV = [(1, 1, 1, 0), (1, 2, 5, 4), (2, 3, 33, 7), (31, 1, 2, 1), (32, 6, 32, 31), (33, 2, 40, 0)]
CONV += [(103, 18, 5, 2), (103, 1, 128, 127), (300, 2, 33, 32)]
LOCAL = [(2, 1, 4, 0), (33, 1, 8, 7), (103, 2, 40, 11)]


def formula(k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """The definition: k, v (b, n, d); w (t, h, n) of the last t tokens."""
    t, heads, n = w.shape
    w = w.repeat_interleave(k.shape[-1] // heads, 1).transpose(1, 2)
    hidden = torch.ones(t, n, dtype=torch.bool).triu(n - t + 1)[:, :, None]
    weights = (k[:, None] + w).masked_fill(hidden, -torch.inf).softmax(2)
    return (weights * v[:, None]).sum(2)


def spread(w: Tensor, t: int, n: int) -> Tensor:
    """Biases of the last s tokens (t|1, h, s) as those of all n."""
    w = w.expand(t, -1, -1)
    rows = []
    for i, w_t in enumerate(w.unbind()):
        end = n - t + i + 1
        inside = w_t[:, :end].flip(1)
        zeros = w_t.new_zeros
        before, after = zeros(len(w_t), end - inside.shape[1]), zeros(len(w_t), n - end)
        rows.append(torch.cat([before, inside, after], 1))
    return torch.stack(rows)


def arguments(
    t: int, h: int, s: int, n: int, rows: int = 1, size: float = 1.0, dtype=torch.float64
):
    """Random float64 values, the same for any dtype, width 18; exponents of `size`."""
    torch.manual_seed(0)
    shapes = [(2, t, 18), (2, t, 18), (rows, h, s), (2, 3, 18), (2, n, 18), (2, n, 18)]
    values = {k: torch.randn(x, dtype=torch.float64) for k, x in zip(NAMES, shapes, strict=True)}
    p, q, o = values["older"].unbind(1)
    values["older"] = torch.stack([p, q.exp(), size * o], 1)
    values["k"], values["past_k"] = size * values["k"], size * values["past_k"]
    return {k: x.to(dtype).requires_grad_() for k, x in values.items()}


def run(args: dict, backend: str) -> tuple[Tensor, AFTWindow]:
    state = AFTWindow(args["older"], args["past_k"], args["past_v"])
    return aft_window(args["k"], args["v"], args["w"], state, backend)


def everything(args: dict, backend: str) -> dict[str, Tensor]:
    """y, the last state and all gradients of a random function of both."""
    return gradients(*run(args, backend), args)


def gradients(y: Tensor, state: AFTWindow, args: dict) -> dict[str, Tensor]:
    torch.manual_seed(1)
    outputs = [y, *state]
    weights = [torch.randn(a.shape, dtype=torch.float64).to(a.dtype) for a in outputs]
    products = [(a * weight).sum() for a, weight in zip(outputs, weights, strict=True)]
    loss = torch.stack(products).sum()
    found = torch.autograd.grad(loss, list(args.values()), materialize_grads=True)
    return {"y": y, "last": state.older, **dict(zip(args, found, strict=True))}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, value in wanted.items():
        error = (found[name].double() - value).norm() / (value.norm() + 1e-3)
        assert error <= tolerance, f"{name}: {error:.1e}"  # NaN fails too


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1.0, 80.0])
def test_simple_is_the_mean_of_all_weighted_by_the_keys(backend, size):
    k, v, bias = size * torch.randn(2, 67, 5), torch.randn(2, 67, 5), torch.randn(1, 67, 1)
    k, v, bias = (x.double().requires_grad_() for x in (k, v, bias))
    y, _ = aft(k, v, bias, backend=backend)
    wanted = formula(k + bias, v, torch.zeros(67, 1, 67, dtype=torch.float64))
    torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)
    dy = torch.randn_like(y)
    for found, exact in zip(
        torch.autograd.grad(y, (k, v, bias), dy),
        torch.autograd.grad(wanted, (k, v, bias), dy),
        strict=True,
    ):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1.0, 80.0])
@pytest.mark.parametrize(("shape", "rows"), [(x, 1) for x in CONV] + [(x, x[0]) for x in LOCAL])
def test_the_window_is_the_papers_formula(shape, rows, size):
    t, _, _, n = shape
    args = arguments(*shape, rows=rows, size=size)
    args["older"] = empty_average(args["k"], 2, 18).requires_grad_()
    wanted = formula(
        torch.cat([args["past_k"], args["k"]], 1),
        torch.cat([args["past_v"], args["v"]], 1),
        spread(args["w"], t, n + t),
    )
    y, _ = run(args, "reference")
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [0.1, 1.0, 80.0])
@pytest.mark.parametrize("shape", CONV)
@pytest.mark.parametrize("backend", FAST)
def test_conv_in_float64_is_the_reference(backend, shape, size):
    args = arguments(*shape, size=size)
    assert_close(everything(args, backend), everything(args, "reference"), 1e-11)


@pytest.mark.parametrize("size", [1.0, 80.0])
@pytest.mark.parametrize("shape", LOCAL)
def test_local_in_float64_is_the_reference(shape, size):
    args = arguments(*shape, rows=shape[0], size=size)
    assert_close(everything(args, "torch"), everything(args, "reference"), 1e-11)


@pytest.mark.parametrize("backend", FAST)
def test_keys_that_grow_with_every_token_are_as_exact(backend):
    args = arguments(103, 2, 8, 7)
    args["k"] = (args["k"] + 10 * torch.arange(103)[:, None]).detach().requires_grad_()
    assert_close(everything(args, backend), everything(args, "reference"), 1e-11)


@pytest.mark.parametrize("backend", FAST)
def test_float32_is_right_to_rounding_and_finite_at_any_exponent(backend):
    shape = (300, 6, 33, 32)
    wanted = everything(arguments(*shape), "reference")
    assert_close(everything(arguments(*shape, dtype=torch.float32), backend), wanted, 2e-6)
    y, state = run(arguments(*shape, size=80.0), "reference")
    found = everything(arguments(*shape, size=80.0, dtype=torch.float32), backend)
    assert_close(found, {"y": y, "last": state.older}, 2e-5)
    for size in (80.0, 1e4):
        found = everything(arguments(*shape, size=size, dtype=torch.float32), backend)
        assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("rows", [1, 75])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_with_the_state_carried_are_the_whole(backend, rows):
    if backend == "native" and rows > 1:
        backend = "auto"  # which has no kernel for biases that differ by token
    args = arguments(75, 3, 12, 11, rows=rows)
    wanted = everything(args, backend)
    ys, state = [], AFTWindow(args["older"], args["past_k"], args["past_v"])
    sizes = [1, 2, 33, 39]
    ws = args["w"].split(sizes) if rows > 1 else [args["w"]] * 4
    for k, v, w in zip(args["k"].split(sizes, 1), args["v"].split(sizes, 1), ws, strict=True):
        y, state = aft_window(k, v, w, state, backend)
        ys.append(y)
    assert_close(gradients(torch.cat(ys, 1), state, args), wanted, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_window_fills_before_anything_is_older(backend):
    args = {name: value.detach() for name, value in arguments(7, 1, 8, 0).items()}
    _, state = aft_window(args["k"], args["v"], args["w"], backend=backend)
    assert torch.equal(state.older, empty_average(args["k"], 2, 18))
    assert torch.equal(state.k, args["k"])
    _, state = aft_window(args["k"][:, :1], args["v"][:, :1], args["w"], state, backend)
    assert torch.equal(state.older[:, 2], args["k"][:, 0])  # the first token left the window
    assert torch.equal(state.k, torch.cat([args["k"][:, 1:], args["k"][:, :1]], 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    args = arguments(5, 2, 3, 2)

    def outputs(*values):
        y, state = run(dict(zip(args, values, strict=True)), backend)
        return y, state.older

    assert torch.autograd.gradcheck(outputs, tuple(args.values()), fast_mode=True)


@pytest.mark.parametrize(("n", "t"), [(1, 1), (5, 2), (127, 127), (129, 129), (300, 171), (300, 1)])
def test_full_is_the_papers_formula(n, t):
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, n, 6, dtype=torch.float64).unbind()
    left, right = torch.randn(t, 4).double(), torch.randn(n, 4).double()
    inputs = [x.requires_grad_() for x in (30 * k, v.clone(), left, right)]
    k, v, left, right = inputs
    y, wanted = aft_full(k, v, left, right), formula(k, v, (left @ right.t())[:, None])
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    for found, exact in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(wanted, inputs, dy), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", CONV)
def test_native_writes_all_of_its_outputs(shape, poisoned):
    assert torch.isnan(torch.empty(3)).all()
    for name, value in everything(arguments(*shape, dtype=torch.float32), "native").items():
        assert torch.isfinite(value).all(), name


def test_native_gives_the_same_bits_on_any_number_of_threads():
    args, threads = arguments(300, 6, 33, 32, dtype=torch.float32), torch.get_num_threads()
    first = everything(args, "native")
    torch.set_num_threads(3)
    try:
        second = everything(args, "native")
    finally:
        torch.set_num_threads(threads)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_native_is_a_good_citizen_of_torch():
    args = arguments(5, 2, 3, 2)
    m = torch.rand(4, 18, dtype=torch.float64, requires_grad=True)
    k, v = (torch.cat([args[f"past_{x}"], args[x]], 1).detach().requires_grad_() for x in "kv")
    torch.library.opcheck(module.WINDOW.op, (k, v, m, args["older"], 2, True))


def test_the_longest_window_of_the_kernel_is_known_without_building_it():
    assert module.KERNEL.constant("max_window", torch.float32) == module.MAX_WINDOW
    k, v = torch.randn(2, 1, 9, 2).unbind()
    y, _ = aft_window(k, v, torch.zeros(1, 1, module.MAX_WINDOW + 1))
    assert y.isfinite().all()  # by the torch form


@pytest.mark.mistyped
def test_what_does_not_fit_is_refused():
    k, v, w = torch.zeros(2, 5, 6), torch.zeros(2, 5, 6), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"w \(1, 4, 3\) do not fit"):
        aft_window(k, v, torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="do not fit"):
        aft_window(k, v[:, :4], w)
    with pytest.raises(ValueError, match="do not fit"):
        aft_full(k, v, torch.zeros(6, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="3 keys before those of a window of 3"):
        aft_window(k, v, w, AFTWindow(empty_average(k, 2, 6), k[:, :3], v[:, :3]))
    with pytest.raises(UserError, match="does not take these inputs"):
        aft_window(k, v, torch.zeros(5, 2, 3), backend="native")


# (b, t, d, s, keys before), dtype, exponents' size, whether threads run last first: one query,
# windows of one token, of whole tiles, and the longest; ends within a tile and at a chunk's; more
# chunks than the composition has warps; several chunks to a walk
EMULATED = [
    ((2, 1, 3, 1, 0), torch.float32, 1.0, 1, True),
    ((1, 70, 35, 1, 0), torch.float32, 1.0, 4096, False),
    ((2, 77, 3, 9, 8), torch.float32, 1.0, 4096, True),
    ((1, 203, 66, 32, 31), torch.float32, 1.0, 2, False),
    ((2, 150, 3, 33, 5), torch.float32, 80.0, 4096, True),
    ((1, 130, 3, 128, 127), torch.float32, 1.0, 4096, False),
    ((1, 2117, 2, 9, 0), torch.float32, 1.0, 5, True),
    ((2, 100, 3, 32, 31), torch.bfloat16, 1.0, 4096, False),
    ((2, 100, 3, 5, 2), torch.float16, 1.0, 4096, True),
]


def cuda_arguments(b: int, t: int, d: int, s: int, n: int, size: float = 1.0) -> list[Tensor]:
    """k, v of n + t tokens, m and a state, float32."""
    torch.manual_seed(0)
    k, v = size * torch.randn(b, n + t, d), torch.randn(b, n + t, d)
    p, q, o = torch.randn(3, b, d)
    m = torch.cat([torch.rand(s, d) + 0.2, torch.ones(1, d)])
    return [k, v, m, torch.stack([p, q.exp(), size * o], 1)]


@emulator.needed
@pytest.mark.parametrize(("shape", "dtype", "size", "blocks", "reverse"), EMULATED)
def test_cuda_is_the_definition(shape, dtype, size, blocks, reverse, monkeypatch, poisoned):
    emulator.install(monkeypatch, reverse=reverse)
    monkeypatch.setattr(module, "CUDA_MAX_BLOCKS", blocks)
    t, n = shape[1], shape[4]
    k, v, m, state = cuda_arguments(*shape, size=size)
    if n == 0 and t > 1:  # from nothing; of one token alone no weight matters
        state = empty_average(k, len(k), k.shape[2])
    inputs = [k.to(dtype), v.to(dtype), m, state]
    y, last, saved = module._forward_cuda(*inputs, n, True)
    torch.manual_seed(1)
    dy, dlast = (torch.randn(a.shape, dtype=torch.float64).to(a.dtype) for a in (y, last))
    found = [y, last, *module._backward_cuda(dy, dlast, *inputs[:3], saved)]
    assert torch.equal(module._forward_cuda(*inputs, n, False)[0], y)

    wide = [a.double().requires_grad_() for a in inputs]
    exact, after, _ = module.WINDOW.op(*wide, n, True)
    loss = (exact * dy.double()).sum() + (after * dlast.double()).sum()
    wanted = [exact, after, *torch.autograd.grad(loss, wide)]
    rounding = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for name, value, right in zip(
        ["y", "last", "k", "v", "m", "state"], found, wanted, strict=True
    ):
        assert value.dtype == (dtype if name in ("y", "k", "v") else torch.float32)
        # a key of 80 is rounded before it is raised
        tolerance = 2e-5 if size > 1 else 2e-6 if value.dtype == torch.float32 else rounding
        assert_close({name: value}, {name: right.detach()}, tolerance)


# What the emulator must notice: text of the kernel, and the mistake in its place.
MISTAKES = {
    "no barrier in the composition": ("    __syncthreads();\n", ""),
    "swapped indices": ("a.k.at(p.b, t, p.channel)", "a.k.at(p.b, p.channel, t)"),
}


@emulator.needed
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_emulator_notices(mistake, monkeypatch, poisoned):
    inputs = cuda_arguments(2, 131, 5, 9, 8)
    wanted = module.WINDOW.op(*(a.double() for a in inputs), 8, False)[0]

    def check() -> None:
        for reverse in (False, True):
            emulator.install(monkeypatch, reverse=reverse, change=mistake)
            assert_close({"y": module._forward_cuda(*inputs, 8, False)[0]}, {"y": wanted}, 2e-6)

    with pytest.raises(AssertionError, match="y: "):
        check()


@emulator.needed
@pytest.mark.skipif(sys.platform != "linux", reason="needs 17 GB of address space for nothing")
@pytest.mark.parametrize("change", [None, ("t * row", "(int)t * (int)row")])
def test_cuda_reads_rows_further_apart_than_32_bits_count(change, monkeypatch):
    """Token 1 lies 2^32 + 64 elements after token 0; nobody touches what is between.

    Offsets of 32 bits, the mistake, would find zeros.
    """
    k, *others = cuda_arguments(1, 2, 4, 9, 0)
    emulator.install(monkeypatch)
    wanted = module._forward_cuda(k, *others, 0, False)[0]
    apart, reserve_nothing = 2**32 + 64, 0x4000  # MAP_NORESERVE of Linux
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    memory = mmap.mmap(-1, 4 * (apart + 4), flags)
    far = torch.frombuffer(memory, dtype=torch.float32).as_strided((1, 2, 4), (0, apart, 1))
    far.copy_(k)
    emulator.install(monkeypatch, change=change)
    found = module._forward_cuda(far, *others, 0, False)[0]
    assert torch.equal(found, wanted) == (change is None)


def test_cuda_batches_are_not_bound_by_the_grids_smaller_sides(monkeypatch):
    grids = []

    class Recorder:
        def launch(self, function, grid, threads, words):
            grids.append((function, grid))

    monkeypatch.setattr(cuda, "load", lambda *_: Recorder())
    k, v, m, state = cuda_arguments(70_000, 1, 1, 9, 8)
    _, _, saved = module._forward_cuda(k, v, m, state, 8, True)
    module._backward_cuda(torch.ones(70_000, 1, 1), None, k, v, m, saved)
    names = ["compose", "outputs", "reads", "compose_back", "gradients"]
    assert grids == [(name, (70_000, 1, 1)) for name in names]


def random_aft_call(draw: fuzz.Draw) -> fuzz.Call:
    b, t, heads, s = draw.batch(), draw.size(32, zero=False), draw.random.randint(1, 3), 0
    s = draw.random.choice([1, 2, 3, 8, 31, 33, 128])
    d, before = heads * draw.size(), draw.random.randint(0, s - 1)
    tensors = [
        draw.values(b, t, d),
        draw.values(b, t, d),
        draw.values(1, heads, s, dtype=draw.wide),
        fuzz.average_so_far(draw, b, d),
        draw.values(b, before, d),
        draw.values(b, before, d),
    ]

    def run(backend, k, v, w, *state):
        y, after = aft_window(k, v, w, AFTWindow(*state), backend)
        return y, after.older

    # The largest of the weights w scales all of a head: a NaN among them is that of them all.
    return fuzz.Call(fuzz.averages(run), [draw.layout(x) for x in tensors], unspoilt=(2,))
