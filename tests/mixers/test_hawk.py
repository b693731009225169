"""Hawk is the paper's recurrence, token by token, and the published block, weight for weight."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from zoo.mixers.hawk import Hawk, decay_and_scale

WIDTH, INNER, BLOCKS = 12, 15, 3


def make() -> Hawk:
    """Every parameter away from its initial value, in float64."""
    torch.manual_seed(0)
    mixer = Hawk(width=WIDTH, inner_width=INNER, gate_blocks=BLOCKS).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.7)
    return mixer


def formula(m: Hawk, x: torch.Tensor) -> torch.Tensor:
    """Sections 2.3 and 2.4 of the paper for one sequence (t, d)."""
    W_a, W_i = (torch.block_diag(*gate.weight).T for gate in (m.decay_gate, m.input_gate))
    a = torch.sigmoid(-m.decay)
    inputs = [torch.zeros(INNER, dtype=x.dtype)] * 3
    h, ys = torch.zeros(INNER, dtype=x.dtype), []
    for now in x:
        inputs.append(m.x_proj.weight @ now)
        u = m.conv_bias + sum(m.conv_weight[:, k] * inputs[k - 4] for k in range(4))
        r = torch.sigmoid(W_a @ u + m.decay_gate.bias)
        i = torch.sigmoid(W_i @ u + m.input_gate.bias)
        a_t = a ** (8 * r)
        h = a_t * h + torch.sqrt(1 - a_t**2) * (i * u)
        g = m.gate_proj.weight @ now
        gelu = g / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        ys.append(m.out_proj.weight @ (gelu * h))
    return torch.stack(ys)


@pytest.mark.parametrize("t", [1, 2, 70])
def test_it_is_the_papers_recurrence(t):
    mixer, x = make(), torch.randn(2, t, WIDTH).double()
    wanted = torch.stack([formula(mixer, row) for row in x])
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-10, atol=1e-10)


def test_it_is_the_published_block_with_the_same_weights():
    """Outputs and gradients, in the middle of a text: its first token is scaled otherwise."""
    theirs_of = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    from transformers import RecurrentGemmaConfig

    ours = make()
    config = RecurrentGemmaConfig(
        hidden_size=WIDTH, lru_width=INNER, num_attention_heads=BLOCKS, num_hidden_layers=1
    )
    theirs = theirs_of.RecurrentGemmaRecurrentBlock(config, 0).double()
    pairs = {
        "linear_x.weight": ours.x_proj.weight,
        "linear_y.weight": ours.gate_proj.weight,
        "linear_out.weight": ours.out_proj.weight,
        "conv_1d.weight": ours.conv_weight,
        "conv_1d.bias": ours.conv_bias,
        "rg_lru.recurrent_param": ours.decay,
        "rg_lru.recurrent_gate_weight": ours.decay_gate.weight,
        "rg_lru.recurrent_gate_bias": ours.decay_gate.bias,
        "rg_lru.input_gate_weight": ours.input_gate.weight,
        "rg_lru.input_gate_bias": ours.input_gate.bias,
    }
    found = dict(theirs.named_parameters())
    assert found.keys() - pairs.keys() == {f"linear_{x}.bias" for x in ("x", "y", "out")}
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(pairs[name].view_as(parameter) if name in pairs else 0 * parameter)
    lru = theirs.rg_lru
    lru._rnn_scan = partial(lru._rnn_scan, acc_dtype=torch.float64)

    x = torch.randn(2, 20, WIDTH).double().requires_grad_()
    wanted, _ = theirs(x, torch.arange(1, 21)[None], None, use_cache=False)
    y = ours(x)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, *pairs.values()], dy)
    exact = torch.autograd.grad(wanted, [x, *(found[name] for name in pairs)], dy)
    for one, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(one, other.view_as(one))


@pytest.mark.parametrize("inner", [60, 3000])
def test_decays_begin_uniform_between_the_published_ends(inner):
    mixer = Hawk(width=45, inner_width=inner, gate_blocks=3)
    a, _ = decay_and_scale(mixer.decay, torch.full((inner,), math.inf))  # an open gate: a^c
    assert (a > 0.9 - 1e-6).all()
    assert (a < 0.999 + 1e-6).all()
    assert a.mean().item() == pytest.approx(0.9495, abs=4 * 0.0286 * inner**-0.5)
    assert a.std().item() == pytest.approx(0.0286, rel=4 * inner**-0.5)


def test_decays_near_one_lose_no_digits_and_their_gradient_is_finite():
    """In float32 against float64, from an open gate to one that is closed to the last digit."""
    gate = torch.tensor([40.0, 0.0, -10.0, -20.0, -60.0, -84.0, -87.5, -200.0, -1e4])
    decay = torch.linspace(-9, 1, 9)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = decay.to(dtype).requires_grad_(), gate.to(dtype).requires_grad_()
        a, scale = decay_and_scale(*inputs)
        results.append([a, scale, *torch.autograd.grad(scale.sum(), inputs)])
    for found, exact in zip(*results, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-19)
    assert results[0][0][-1] == 1
    _, scale, _, slope = results[1]
    rate = 8 * nn.functional.softplus(decay.double()) * torch.sigmoid(gate.double())
    torch.testing.assert_close(slope[2:7], (rate / 2).sqrt()[2:7], rtol=1e-3, atol=0)
    torch.testing.assert_close(scale[2:7], (2 * rate).sqrt()[2:7], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"gate_blocks": 0}, "gate_blocks=0: must be an integer >= 1"),
        ({"gate_blocks": 4, "inner_width": 18}, "gate_blocks=4: must divide inner_width=18"),
        ({"gate_blocks": 3, "conv_width": 9}, "conv_width=9: must be an integer from 2 to 8"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(options, line):
    with pytest.raises(ValueError, match=line) as error:
        Hawk(width=WIDTH, **options)
    assert "\n" not in str(error.value)
