"""The norm is its formula: every backend, every gradient, any shape and slice."""

import fuzz
import pytest
import torch
from torch import Tensor

from zoo.ops import rms_norm as module
from zoo.ops.rms_norm import RMSNorm, rms_norm

# (..., d): widths no vector divides, fewer tokens than lanes, several segments
SHAPES = [(1, 1, 3), (2, 3, 5), (3, 300, 129), (2, 17, 4, 32), (7,)]


def everything(x: Tensor, weight: Tensor, eps: float, backend: str) -> list[Tensor]:
    x, weight = (a.detach().requires_grad_() for a in (x, weight))
    y = rms_norm(x, weight, eps, backend)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, (x, weight), torch.randn(x.shape).to(x))]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("y", "dx", "dweight"), found, wanted, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_two_channels_by_hand(backend):
    x, weight = torch.tensor([[[3.0, -1.0]]]), torch.tensor([1.0, 10.0])
    y = rms_norm(x, weight, 4.0, backend)  # mean of squares 5, and 4
    torch.testing.assert_close(y, torch.tensor([[[1.0, -10 / 3]]]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_every_gradient_is_the_reference(backend, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1]).double()
    wanted = everything(x, weight, 1e-3, "reference")
    assert_close(everything(x, weight, 1e-3, backend), wanted, 1e-14)
    assert_close(everything(x.float(), weight.float(), 1e-3, backend), wanted, 3e-6)


def test_it_reads_slices_where_they_lie_and_leaves_nothing_unwritten(monkeypatch):
    torch.manual_seed(0)
    whole = torch.randn(2, 40, 50, dtype=torch.float64)
    x, weight = whole[:, 3:, 7:27], torch.randn(20).double()
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    found = everything(x, weight, 1e-6, "native")
    assert_close(found, everything(x.clone(), weight, 1e-6, "reference"), 1e-14)


def test_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    x, weight, threads = torch.randn(1, 2000, 64), torch.randn(64), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(everything(x, weight, 1e-6, "native"))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_operator_checks():
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(module.NORM.op, (x, weight, 1e-6))


def test_no_tokens_and_half_precision_take_the_form_of_pytorch():
    assert RMSNorm(8, 1e-6)(torch.empty(2, 0, 8)).shape == (2, 0, 8)
    half = torch.randn(1, 4, 8, dtype=torch.bfloat16)
    assert rms_norm(half, torch.ones(8, dtype=torch.bfloat16), 1e-6).dtype == torch.bfloat16


@pytest.mark.mistyped
def test_weights_of_another_width_are_refused():
    half = torch.randn(1, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(half, torch.ones(7), 1e-6)


def random_rms_norm_call(draw: fuzz.Draw) -> fuzz.Call:
    shape = [draw.size(256), draw.size()]
    shape = [draw.batch() for _ in range(draw.random.randint(0, 2))] + shape
    size, eps = draw.random.choice([1e-4, 1.0, 1e3]), draw.random.choice([1e-5, 1e-2])

    def run(backend, x, weight):
        return (rms_norm(x, weight, eps, backend),)

    x, weight = size * draw.values(*shape), draw.values(shape[-1])
    return fuzz.Call(run, [draw.layout(x), draw.layout(weight)])
