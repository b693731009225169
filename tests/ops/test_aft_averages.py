"""The averages of AFT are its formula: every variant, backend, gradient and chunking."""

import pytest
import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.ops import aft as module
from zoo.ops.aft import Window, aft, aft_full, aft_window
from zoo.ops.wkv4 import empty_average

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
        near = w_t[:, :end].flip(1)
        zeros = w_t.new_zeros
        before, after = zeros(len(w_t), end - near.shape[1]), zeros(len(w_t), n - end)
        rows.append(torch.cat([before, near, after], 1))
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


def run(args: dict, backend: str) -> tuple[Tensor, Window]:
    state = Window(args["older"], args["past_k"], args["past_v"])
    return aft_window(args["k"], args["v"], args["w"], state, backend)


def everything(args: dict, backend: str) -> dict[str, Tensor]:
    """y, the last state and all gradients of a random function of both."""
    return gradients(*run(args, backend), args)


def gradients(y: Tensor, state: Window, args: dict) -> dict[str, Tensor]:
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
    ys, state = [], Window(args["older"], args["past_k"], args["past_v"])
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


@pytest.fixture
def poisoned():
    """Every `torch.empty` is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
    torch.library.opcheck(module.window, (k, v, m, args["older"], 5, True))


def test_the_longest_window_of_the_kernel_is_known_without_building_it():
    assert module.KERNEL.constant("most", torch.float32) == module.LONGEST
    k, v = torch.randn(2, 1, 9, 2).unbind()
    y, _ = aft_window(k, v, torch.zeros(1, 1, module.LONGEST + 1))
    assert y.isfinite().all()  # by the torch form


def test_what_does_not_fit_is_refused():
    k, v, w = torch.zeros(2, 5, 6), torch.zeros(2, 5, 6), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"w \(1, 4, 3\) do not fit"):
        aft_window(k, v, torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="do not fit"):
        aft_window(k, v[:, :4], w)
    with pytest.raises(ValueError, match="do not fit"):
        aft_full(k, v, torch.zeros(6, 2), torch.zeros(5, 2))
    with pytest.raises(UserError, match="does not take these inputs"):
        aft_window(k, v, torch.zeros(5, 2, 3), backend="native")
