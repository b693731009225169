"""Merged parts are attention over all their keys: every backend, every gradient, blind parts.

The definition is one softmax over the keys of all parts; `zoo.ops.attention` has its own tests.
"""

import fuzz
import pytest
import torch
from torch import Tensor

from zoo.ops import merge as module
from zoo.ops.merge import merge

BACKENDS = ["torch", "native"]
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 20), (1, 300, 17, 8)]  # (b, t, h, e): widths no vector divides


def parts(shape: tuple[int, ...], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and values of keys one apart in every part: (b, t, h, n) and (b, t, h, n, e)."""
    torch.manual_seed(0)
    scores = [5 * torch.randn(*shape[:3], n + 1).double() for n in range(count)]
    return scores, [torch.randn(*s.shape, shape[3]).double() for s in scores]


def attend_to(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return (scores.softmax(-1)[..., None] * values).sum(-2), scores.logsumexp(-1)


def gradients(results: tuple[Tensor, Tensor], leaves: list[Tensor], of: slice) -> list[Tensor]:
    torch.manual_seed(1)
    total = sum((torch.randn(x.shape, dtype=torch.float64).to(x) * x).sum() for x in results[of])
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of", [slice(2), slice(1), slice(1, 2)], ids=["both", "out", "lse"])
def test_parts_make_one_softmax(backend, count, shape, of):
    scores, values = parts(shape, count)
    leaves = [x.requires_grad_() for x in (*scores, *values)]
    found = merge([attend_to(*part) for part in zip(scores, values, strict=True)], backend)
    wanted = attend_to(torch.cat(scores, -1), torch.cat(values, -2))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grads = gradients(found, leaves, of), gradients(wanted, leaves, of)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


def test_single_precision_is_as_good_as_its_rounding():
    exact = [attend_to(*part) for part in zip(*parts((2, 50, 3, 20), 2), strict=True)]
    leaves = [x.detach().requires_grad_() for pair in exact for x in pair]
    wanted = merge([(leaves[0], leaves[1]), (leaves[2], leaves[3])], "torch")
    singles = [x.detach().float().requires_grad_() for x in leaves]
    found = merge([(singles[0], singles[1]), (singles[2], singles[3])], "native")
    every = slice(2)
    for a, b in zip(
        [*found, *gradients(found, singles, every)],
        [*wanted, *gradients(wanted, leaves, every)],
        strict=True,
    ):
        assert (a.double() - b).norm() <= 3e-7 * b.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_that_sees_nothing_weighs_nothing(backend):
    out = torch.randn(1, 3, 2, 5, dtype=torch.float64)
    first = torch.tensor([1.0, -torch.inf, -torch.inf]).double()[None, :, None].expand(1, 3, 2)
    other = torch.tensor([-torch.inf, -800.0, -torch.inf]).double()[None, :, None].expand(1, 3, 2)
    there = [(x > -torch.inf)[..., None] for x in (first, other)]
    leaves = [(out * there[0]), first.clone(), (3 * out * there[1]), other.clone()]
    leaves = [x.requires_grad_() for x in leaves]
    merged, lse = merge([(leaves[0], leaves[1]), (leaves[2], leaves[3])], backend)
    torch.testing.assert_close(merged[:, 0], out[:, 0])
    torch.testing.assert_close(merged[:, 1], 3 * out[:, 1])
    assert not merged[:, 2].any()
    assert lse[0, :, 0].tolist() == [1.0, -800.0, -torch.inf]
    grads = torch.autograd.grad(merged.sum() + lse[:, :2].sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert grads[2][0, :, 0, 0].tolist() == [0.0, 1.0, 0.0]


def test_slices_are_read_where_they_lie_and_nothing_is_left_unwritten(poisoned):
    torch.manual_seed(0)
    out, lse = torch.randn(2, 40, 4, 24).double(), torch.randn(2, 4, 40).double().mT
    pairs = [(out[:, 3:9, 1:3], lse[:, 3:9, 1:3]), (out[:, 9:15, :2, :], lse[:, 9:15, :2])]
    leaves = [x.requires_grad_() for pair in pairs for x in (pair[0].detach(), pair[1].detach())]
    pairs = [(leaves[0], leaves[1]), (leaves[2], leaves[3])]
    found, wanted = (merge(pairs, backend) for backend in ("native", "torch"))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grads = [gradients(x, leaves, slice(2)) for x in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


def test_operator_checks():
    o1, o2 = torch.randn(2, 2, 5, 3, 8).unbind()
    l1, l2 = torch.randn(2, 2, 5, 3).unbind()
    inputs = tuple(x.clone().requires_grad_() for x in (o1, l1, o2, l2))
    torch.library.opcheck(module.MERGE.op, inputs)


def test_half_precision_takes_the_formula():
    pair = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16), torch.randn(1, 4, 2)
    out, lse = merge([pair, pair])
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, pair[0])


def random_merge_call(draw: fuzz.Draw) -> fuzz.Call:
    b, t, h, e = draw.batch(), draw.size(128), draw.size(), draw.size()
    tensors = []
    for _ in range(draw.random.randint(2, 4)):
        lse = draw.random.choice([1.0, 30.0]) * draw.values(b, t, h)
        nothing = draw.values(b, t, h) > draw.random.choice([0.0, 9.0])
        tensors += [draw.values(b, t, h, e), lse.masked_fill(nothing, -torch.inf)]

    def run(backend, *parts):
        return merge([*zip(parts[::2], parts[1::2], strict=True)], backend)

    return fuzz.Call(run, [draw.layout(x) for x in tensors], definition="torch")
