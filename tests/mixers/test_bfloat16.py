"""What bfloat16 costs each architecture: what its design makes of rounded numbers, and no more."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.mixers.retnet import RetNet
from zoo.mixers.sima import SimA

BF16 = torch.bfloat16
TOKENS = 70
PROBES = 4  # roundings tried
# Autocast rounds the results of each product too, where a probe rounds inputs and weights alone.
# Measured: at most 2.2 times the largest probe or 2^-8 of the output, over all architectures.
TIMES = 4


def exactly(half: nn.Module, x: Tensor, change: Callable[[Tensor], Tensor] = Tensor.double):
    """float64, with weights and inputs changed."""
    half, x = copy.deepcopy(half).double(), change(x.double())
    for parameter in half.parameters():
        parameter.data = change(parameter.data)
    return half(x)


def rounded(a: Tensor) -> Tensor:
    return a.to(BF16).double()


def moved(a: Tensor) -> Tensor:
    """By up to half a unit of bfloat16's last place."""
    return a * (1 + 2.0**-8 * (torch.rand_like(a) - 0.5))


def error_and_cost(half: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """By token: how far autocast is from float64, and how far roundings of the inputs go there."""
    with torch.no_grad():
        exact = exactly(half, x)
        with torch.autocast("cpu", BF16):
            found = half(x).double()
        probes = torch.stack([exactly(half, x, change) for change in [rounded] + [moved] * PROBES])
    size = exact.norm(dim=-1)  # of a token whose parts cancel it is 0, and the rest rounding
    cost = (probes - exact).norm(dim=-1).amax(0) + 2.0**-8 * torch.maximum(size, size.mean() / 16)
    return (found - exact).norm(dim=-1), cost


def test_bfloat16_loses_what_the_design_makes_of_rounded_numbers(architecture, tiny):
    model = tiny(architecture, dtype=torch.float32)
    for half in model.sublayers():
        x = torch.randn(2, TOKENS, model.width)
        error, cost = error_and_cost(half, x)
        assert (error <= TIMES * cost).all(), (
            f"{(error / cost).max():.1f} times what rounding costs"
        )


def test_retention_of_one_token_keeps_nothing_but_the_sign_of_its_score():
    """So rounding may turn the output over: it is (q.k) v, divided by its own size."""
    torch.manual_seed(0)
    mixer, x = RetNet(width=32, heads=1).double(), torch.randn(64, 1, 32).double()
    mixer.norm.eps = 0.0
    y = mixer(x)
    for factor in (1e-3, 1e3, -1e-3):
        scaled = copy.deepcopy(mixer)
        scaled.q_proj.weight.data *= factor
        torch.testing.assert_close(scaled(x), y if factor > 0 else -y)


def test_sima_of_one_token_keeps_nothing_but_the_signs_of_its_channels():
    """q / |q| and k / |k|: channels about to change sign are rounded to either."""
    torch.manual_seed(0)
    mixer, x = SimA(width=32, heads=2).double(), torch.randn(64, 1, 32).double()
    y = mixer(x)
    for name in ("q_proj", "k_proj"):
        scaled = copy.deepcopy(mixer)
        getattr(scaled, name).weight.data *= torch.rand(32, 1).double() + 1e-3
        torch.testing.assert_close(scaled(x), y)
