"""CLEX: NTK before training, the ODE's own solution after, and never a stale frequency."""

import math

import pytest
import torch

from zoo.positions.clex import CLEX, stretched
from zoo.positions.rope import apply_rope, inverse_frequencies
from zoo.positions.scaling import ntk_aware


def trained(width: int = 16, step: float = 0.1) -> CLEX:
    torch.manual_seed(0)
    model = CLEX(width=width, step=step)
    torch.nn.init.normal_(model.down.weight, std=0.16 / width)
    return model


@pytest.mark.parametrize("t", [1, 1.5, 2, 4, 16])
def test_untrained_it_is_ntk_with_factor_2t_minus_1(t):
    expected, _ = ntk_aware(width=64, base=5e5, factor=2 * t - 1)
    assert CLEX(width=64, base=5e5)(t).tolist() == list(expected)


def test_at_the_trained_window_it_is_plain_rotary_whatever_was_learned():
    assert trained()(1).tolist() == list(inverse_frequencies(16))


@pytest.mark.parametrize("t", [1.3, 2, 6])
def test_frequencies_solve_the_papers_equation_in_z_and_t(t):
    """Euler's method in z and t, with both terms as the paper writes them, in tiny steps."""
    model, steps, d = trained(), 4000, 16
    up, down = model.up.weight.double(), model.down.weight.double()
    i = torch.arange(d // 2, dtype=torch.float64)

    def solve(steps: int) -> torch.Tensor:
        z, dt = torch.tensor(inverse_frequencies(d), dtype=torch.float64).log(), (t - 1) / steps
        for n in range(steps):
            at = 1 + n * dt
            log_ntk = -2 * i / d * math.log(1e4 * (2 * at - 1) ** (d / (d - 2)))
            drift = -4 * i / ((d - 2) * (2 * at - 1))
            z = z + dt * (down @ torch.nn.functional.silu(up @ (z + log_ntk)) + drift)
        return z

    with torch.no_grad():
        coarse, fine = solve(steps // 2), solve(steps)
        found = model(t).log()
        extrapolated = 2 * fine - coarse  # Euler's error is linear in the step
    assert (found - model.ntk(t).log()).abs().max() > 0.03  # the learned part moves them
    torch.testing.assert_close(found, extrapolated, rtol=0, atol=2e-6)


def test_smaller_steps_change_nothing_that_float32_would_see():
    for t in (2, 16):
        coarse, fine = trained(64)(t).detach(), trained(64, step=0.01)(t).detach()
        torch.testing.assert_close(coarse, fine, rtol=6e-7, atol=0)


def test_frequencies_follow_the_parameters():
    model = trained()
    before = model(3)
    with torch.no_grad():
        model.down.weight.mul_(2)
    assert not torch.equal(model(3), before)


def test_scores_train_the_field():
    model = trained()
    x = torch.randn(1, 6, 1, 16)
    at = stretched(1, 6, 24, torch.Generator().manual_seed(0))
    rotated = apply_rope(x, model(4.0), positions=at)
    torch.einsum("bihd,bjhd->ij", rotated, rotated)[0].square().sum().backward()
    for weight in model.parameters():
        assert weight.grad is not None
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().sum() > 0


def test_gradients_are_those_of_finite_differences():
    model = CLEX(width=6).double()
    up = model.up.weight.detach().requires_grad_()
    down = (0.02 * torch.randn_like(model.down.weight)).requires_grad_()

    def solve(up, down):
        return torch.func.functional_call(model, {"up.weight": up, "down.weight": down}, (2.5,))

    assert torch.autograd.gradcheck(solve, (up, down))


def test_precision_of_the_model_does_not_reach_the_equation():
    model = trained()
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(4)
    assert inside.dtype == torch.float64
    assert torch.equal(inside, model(4))
    half = trained().bfloat16()
    torch.testing.assert_close(half(4).log(), model(4).log(), rtol=1e-2, atol=1e-2)


def test_windows_of_a_step_lie_in_one_text_of_any_length_up_to_the_longest():
    draws, lengths = torch.Generator().manual_seed(0), set()
    for _ in range(300):
        at = stretched(3, 8, 16, draws)
        assert at.shape == (3, 8)
        assert (at.diff() > 0).all()
        assert at[0, 0] == 0
        assert len({*at[:, -1].tolist()}) == 1
        lengths.add(int(at[0, -1]) + 1)
    assert lengths == {*range(8, 17)}


def test_with_t_1_tokens_are_where_they_always_were():
    generator = torch.Generator().manual_seed(0)
    assert stretched(2, 16, 16, generator).tolist() == 2 * [list(range(16))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CLEX(width=2), "the head width, 2, at least 4"),
        (lambda: CLEX(width=8, hidden=0), "^hidden=0: must be at least 1"),
        (lambda: CLEX(width=8, step=0.0), r"step=0\.0"),
        (lambda: CLEX(width=8)(0.5), r"t=0\.5"),
        (lambda: CLEX(width=9)(2), "head_width=9: must be even"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
