"""The rotation is its formula: every backend, its gradient, any shape and slice."""

import math

import fuzz
import pytest
import torch
from torch import Tensor

from zoo.ops import rotary as module
from zoo.ops.rotary import apply_rotary, apply_rotary_to_both

# (b, t, h, d), half: heads no vector divides, channels that stay as they are, several segments
SHAPES = [((1, 1, 1, 2), 1), ((2, 3, 2, 10), 5), ((2, 300, 3, 38), 17), ((1, 5, 4, 64), 8)]


def table(shape: tuple[int, ...], half: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(*shape, 1, half, dtype=torch.float64)
    return angles.cos(), angles.sin()


def everything(x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = apply_rotary(x, cos, sin, backend)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, x, torch.randn(x.shape).to(x))]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_a_quarter_turn_by_hand(backend):
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 5)
    cos, sin = torch.tensor([0.0, 1.0]).view(1, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 2)
    assert apply_rotary(x, cos, sin, backend).flatten().tolist() == [-3.0, 2.0, 1.0, 4.0, 5.0]


@pytest.mark.parametrize(("shape", "half"), SHAPES)
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("of", ["tokens", "rows", "all"])
def test_the_gradient_is_that_of_the_formula(backend, shape, half, of):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    cos, sin = table({"tokens": shape[1:2], "rows": shape[:2], "all": (1,)}[of], half)
    wanted = everything(x, cos, sin, "reference")
    assert_close(everything(x, cos, sin, backend), wanted, 1e-15)
    assert_close(everything(x.float(), cos.float(), sin.float(), backend), wanted, 2e-7)


def test_it_reads_slices_where_they_lie_and_leaves_nothing_unwritten(poisoned):
    whole = torch.randn(2, 40, 5, 20, dtype=torch.float64)
    cos, sin = table((37,), 8)
    for x in (
        whole[:, 3:],
        whole[:, 3:, 1:3],
        whole[:, 3:, :, 2:18],
        whole.transpose(1, 2)[:, :, 3:],
    ):
        shorter = (cos[: x.shape[1]], sin[: x.shape[1]])
        found = everything(x, *shorter, "native")
        assert_close(found, everything(x.clone(), *shorter, "reference"), 1e-15)


@pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 1), (1, 5), (2, 3)])
def test_queries_and_keys_are_rotated_together_as_each_alone(b, t):
    q, k = (torch.randn(b, t, h, 10, dtype=torch.float64) for h in (6, 2))
    for lead in ((t,), (b, t)):
        turn = table(lead, 4)
        alone = [apply_rotary(x, *turn) for x in (q, k)]
        assert all(map(torch.equal, apply_rotary_to_both(q, k, *turn), alone))
        q_grad = q.clone().requires_grad_()
        y, _ = apply_rotary_to_both(q_grad, k, *turn)
        assert torch.equal(y, alone[0])
        assert y.requires_grad
    with pytest.raises(ValueError, match="rotary width 8 is more than the head width 6"):
        apply_rotary_to_both(q[..., :6], k[..., :6], *turn)


def test_operator_checks():
    x, (cos, sin) = torch.randn(2, 5, 3, 8, requires_grad=True), table((5,), 3)
    torch.library.opcheck(module.ROTATION.op, (x, cos.float(), sin.float()))


def test_angles_that_are_learned_get_their_gradient_and_no_tokens_are_none():
    x, (cos, sin) = torch.randn(1, 4, 2, 6, dtype=torch.float64), table((4,), 3)
    inputs = (x, cos.requires_grad_(), sin.requires_grad_())
    assert torch.autograd.gradcheck(apply_rotary, inputs)
    assert apply_rotary(x[:, :0], cos[:0].detach(), sin[:0].detach()).shape == (1, 0, 2, 6)
    with pytest.raises(ValueError, match="rotary width 6 is more than the head width 4"):
        apply_rotary(x[..., :4], cos, sin)


def random_rotary_call(draw: fuzz.Draw) -> fuzz.Call:
    b, t, h, d = draw.batch(), draw.size(128), draw.random.randint(0, 3), draw.size()
    half = draw.random.randint(0, d // 2)
    lead = draw.random.choice([(t,), (1, t), (b, t), (b, 1), (1,)])
    angles = math.pi * draw.values(*lead, 1, half)

    def run(backend, x):
        turn = angles.to(x.dtype) if isinstance(x, Tensor) else angles
        return (apply_rotary(x, turn.cos(), turn.sin(), backend),)

    return fuzz.Call(run, [draw.layout(draw.values(b, t, h, d))])
