"""LSTM against its equations, one token after another."""

import torch

from zoo.mixers.lstm import LSTM


def by_the_equations(layer: LSTM, x: torch.Tensor) -> torch.Tensor:
    """Hochreiter 1997 with the forget gate of Gers 2000."""
    w, r = layer.lstm.weight_ih_l0, layer.lstm.weight_hh_l0
    b = layer.lstm.bias_ih_l0 + layer.lstm.bias_hh_l0
    h = c = x.new_zeros(x.shape[0], x.shape[2])
    ys = []
    for t in range(x.shape[1]):
        i, f, g, o = (w @ x[:, t].T + r @ h.T + b[:, None]).T.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        ys.append(h @ layer.o_proj.weight.T)
    return torch.stack(ys, 1)


def test_outputs_and_gradients_are_those_of_the_equations():
    torch.manual_seed(0)
    layer = LSTM(width=6, layers=2).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    weights = [x, *layer.parameters()]
    found, expected = layer(x), by_the_equations(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(found)
    for mine, right in zip(
        torch.autograd.grad((found * direction).sum(), weights),
        torch.autograd.grad((expected * direction).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


def test_autocast_leaves_the_recurrence_in_float32():
    torch.manual_seed(0)
    layer = LSTM(width=32)
    x = torch.randn(1, 400, 32)
    exact, _ = layer(x, layer.empty_state(1))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, layer.empty_state(1))
    assert state.c.dtype == state.h.dtype == torch.float32
    assert (y - exact).norm() < 0.01 * exact.norm()  # rounded once, by the output projection
