"""A product of a few rows is what PyTorch makes of it, read faster."""

import fuzz
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.ops.linear import MAX_ROWS, MIN_WEIGHTS, Linear, linear
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
