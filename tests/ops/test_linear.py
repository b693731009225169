"""A product of a few rows is what PyTorch makes of it, read faster."""

import fuzz
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.ops.linear import (
    KERNEL,
    MAX_MATRICES,
    MAX_ROWS,
    MIN_WEIGHTS,
    Linear,
    linear,
    linears,
    project,
)
from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.dispatch import reset, used_backends

SIDE = int(MIN_WEIGHTS**0.5) + 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [0, 1, 3, 32, 37])
@pytest.mark.parametrize("rows", [0, 1, MAX_ROWS])
def test_backends_agree_with_the_definition_in_float64(rows, n, bias):
    for k in (0, 1, 15, 33, 70, 160):
        x, weight = torch.randn(rows, 2 * k)[:, ::2], torch.randn(k, n).T
        b = torch.randn(n) if bias else None
        exact = x.double(), weight.double(), None if b is None else b.double()
        expected = linear(*exact, backend="reference")
        torch.testing.assert_close(linear(*exact, backend="native"), expected)
        most = x.abs().double() @ weight.abs().double().T + (0 if b is None else b.abs())
        found = linear(x, weight, b, "native")
        assert found.dtype == torch.float32
        assert ((found - expected).abs() <= 1e-6 * most).all()
        narrow = x.bfloat16(), weight.bfloat16(), None if b is None else b.bfloat16()
        found = linear(*narrow, backend="native")
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(
            found, linear(*narrow, backend="reference"), atol=0.01, rtol=0.01
        )


def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_threads():
    x, weight, threads = torch.randn(MAX_ROWS, 333), torch.randn(501, 333), torch.get_num_threads()
    whole = linear(x, weight, backend="native")
    torch.set_num_threads(3 - min(threads, 2))
    alone = [linear(row, weight, backend="native") for row in x]
    torch.set_num_threads(threads)
    assert torch.equal(torch.stack(alone), whole)


def chosen(x, layer) -> str:
    """The backend that a layer's product ran on; PyTorch's own leaves no trace."""
    reset()
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), atol=0.02, rtol=0.02)
    return used_backends().get("linear", "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_for_few_rows_of_a_large_matrix_without_a_gradient(dtype):
    layer, small = Linear(SIDE, SIDE, dtype=dtype), Linear(SIDE, SIDE // 2, dtype=dtype)
    x = torch.randn(MAX_ROWS, SIDE, dtype=dtype)
    assert chosen(x, layer) == "torch"  # which has a gradient
    with torch.no_grad():
        assert chosen(x, layer) == "native"
        assert chosen(torch.cat([x, x]), layer) == "torch"
        assert chosen(x, small) == "torch"
        with torch.autocast("cpu", torch.bfloat16):
            assert chosen(x, layer) == "torch"
        with FlopCounterMode(display=False) as flops:
            assert chosen(x, layer) == "torch"
        assert flops.get_total_flops() == 4 * MAX_ROWS * SIDE**2  # twice: the layer's, the test's
    with torch.inference_mode():
        assert chosen(x[0], layer) == "native"


def test_what_pytorch_alone_computes_is_left_to_it():
    x, weight = torch.randn(1, SIDE), torch.randn(SIDE, SIDE)
    with torch.no_grad():
        one = torch.ones(1)
        assert torch.equal(linear(x, weight, one), F.linear(x, weight, one))
        sparse = weight.to_sparse()
        assert torch.equal(linear(x, sparse), F.linear(x, sparse))


def test_many_rows_have_the_numbers_of_pytorch_to_the_last_bit():
    layer, x = Linear(SIDE, SIDE), torch.randn(2, MAX_ROWS, SIDE)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The functions of the kernel that were called."""
    names, run = [], CpuKernel.run

    def noted(self, function, *given, **tensors):
        names.extend([function] if self is KERNEL else [])
        return run(self, function, *given, **tensors)

    monkeypatch.setattr(CpuKernel, "run", noted)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", range(1, MAX_MATRICES + 2))
def test_several_matrices_are_one_call_and_each_has_its_own_product(calls, count, dtype):
    for k in (SIDE, 2 * SIDE + 1):
        x = torch.randn(MAX_ROWS, k).to(dtype)
        weights = [torch.randn(SIDE + 7 * i, k).to(dtype) for i in range(count)]
        biases = [torch.randn(len(w)).to(dtype) if i % 2 else None for i, w in enumerate(weights)]
        calls.clear()
        found = linears(x, weights, biases)
        assert len(calls) == (1 if count <= MAX_MATRICES else count)
        for y, one in zip(found, zip(weights, biases, strict=True), strict=True):
            assert torch.equal(y, linear(x, *one, backend="native"))


def layers(**more) -> list[Linear]:
    return [Linear(SIDE, SIDE + i, bias=i == 1, **more) for i in range(3)]


def assert_projected(x, given) -> None:
    for y, layer in zip(project(x, *given), given, strict=True):
        torch.testing.assert_close(y, layer(x))


def test_layers_are_projected_together_where_they_are_no_more_than_products(calls):
    given, x = layers(), torch.randn(1, 1, SIDE)
    with torch.no_grad():
        assert_projected(x, given)
        assert len(calls) == 1 + len(given)
        calls.clear()
        given[0].weight.mul_(2)  # nothing of a weight is kept between calls
        given[1].weight = torch.nn.Parameter(torch.randn(7, SIDE))
        given[1].register_parameter("bias", None)
        assert_projected(x, given)
        swapped = {"weight": torch.randn(SIDE, SIDE)}
        parts = torch.nn.ModuleList(given)
        parts.forward = lambda x: project(x, *given)[0]
        y = torch.func.functional_call(parts, {"0.weight": swapped["weight"]}, (x,))
        torch.testing.assert_close(y, F.linear(x, swapped["weight"]))
        noted: list[int] = []
        hook = given[2].register_forward_hook(lambda *_: noted.append(1))
        project(x, *given)
        hook.remove()
        assert noted == [1]
        torch.nn.utils.parametrizations.weight_norm(given[2])
        assert_projected(x, given)
    torch.cat(project(x, *given[:2]), -1).sum().backward()
    assert all(layer.weight.grad is not None for layer in given[:2])


@pytest.mark.mistyped
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"weight is \(4, 6\), must be \(4, 5\)"):
        linear(torch.randn(2, 5), torch.randn(4, 6), backend="native")
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 5), torch.randn(4, 6))
    with torch.no_grad(), pytest.raises(RuntimeError):
        Linear(SIDE, SIDE)(torch.randn(1, SIDE, dtype=torch.float64))


NARROW = (torch.bfloat16,)


def random_linear_call(draw: fuzz.Draw) -> fuzz.Call:
    n, k = draw.size(32), draw.size(16)
    rows = draw.random.choice([[0], [1], [2], [1, 2], [2, 1], [3, 0]])
    bias = draw.maybe(draw.values(n))
    given = [draw.values(*rows, k), draw.values(n, k), *([] if bias is None else [bias])]

    def run(backend, x, weight, b=None):
        return (linear(x, weight, b, backend),)

    return fuzz.Call(run, [draw.layout(one) for one in given], gradients=False)
