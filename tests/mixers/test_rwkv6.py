"""RWKV-6 is the paper's recurrence, token by token."""

import math

import pytest
import torch
from torch import nn

from zoo.mixers.rwkv6 import RWKV6

WIDTH, HEADS = 12, 3


def make() -> RWKV6:
    """Every parameter away from its initial value, in float64."""
    torch.manual_seed(0)
    mixer = RWKV6(width=WIDTH, heads=HEADS, mix_rank=2, decay_rank=5).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.7)
    return mixer


def formula(m: RWKV6, x: torch.Tensor) -> torch.Tensor:
    """Section 4 of the paper for one sequence (t, d)."""
    before, n, ys = torch.zeros(WIDTH, dtype=x.dtype), WIDTH // HEADS, []
    S = [torch.zeros(n, n, dtype=x.dtype) for _ in range(HEADS)]
    for now in x:
        base = now + (before - now) * m.mix_x
        w, k, v, r, g = (
            now + (before - now) * (m.mix[i] + torch.tanh(base @ m.mix_down[:, i]) @ m.mix_up[i])
            for i in range(5)
        )
        d = m.decay + torch.tanh(w @ m.decay_down) @ m.decay_up
        w = torch.exp(-torch.exp(d))
        r, k, v = m.r_proj.weight @ r, m.k_proj.weight @ k, m.v_proj.weight @ v
        heads = []
        for h in range(HEADS):
            of = slice(h * n, (h + 1) * n)
            kv = torch.outer(k[of], v[of])
            o = r[of] @ (S[h] + torch.diag(m.bonus[h]) @ kv)
            S[h] = torch.diag(w[of]) @ S[h] + kv
            o = (o - o.mean()) / (o.var(unbiased=False) + 1e-5 * n).sqrt()
            heads.append(o * m.norm.weight[of] + m.norm.bias[of])
        g = m.g_proj.weight @ g
        ys.append(m.o_proj.weight @ (g * torch.sigmoid(g) * torch.cat(heads)))
        before = now
    return torch.stack(ys)


@pytest.mark.parametrize("t", [1, 2, 70])
def test_it_is_the_papers_recurrence(t):
    mixer, x = make(), torch.randn(2, t, WIDTH).double()
    wanted = torch.stack([formula(mixer, row) for row in x])
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-9, atol=1e-9)


def test_the_present_is_read_by_its_bonus_and_not_by_its_decay():
    """With u = 0 the first output is the norm of nothing: its bias, gated."""
    mixer, x = make(), torch.randn(1, 1, WIDTH).double()
    nn.init.zeros_(mixer.bonus)
    changed = make()
    changed.load_state_dict(mixer.state_dict())
    nn.init.normal_(changed.v_proj.weight)
    torch.testing.assert_close(mixer(x), changed(x))


@pytest.mark.parametrize(("width", "mix", "decay"), [(64, 8, 16), (128, 16, 32), (768, 32, 64)])
def test_low_ranks_are_the_published_ones_where_the_width_bears_them(width, mix, decay):
    with torch.device("meta"):
        mixer = RWKV6(width=width, heads=2)
    assert mixer.mix_up.shape == (5, mix, width)
    assert mixer.decay_up.shape == (decay, width)
    assert mixer.norm.eps == pytest.approx(1e-5 * width / 2)


def test_the_fastest_forgetting_stays_finite():
    mixer, x = make(), torch.randn(1, 200, WIDTH).double().requires_grad_()
    nn.init.constant_(mixer.decay, 5.0)  # e^-e^5: nothing is left after one token
    mixer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert math.exp(-math.exp(5)) < 1e-60


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"heads": 0}, "heads=0: must be an integer >= 1"),
        ({"heads": 5}, "heads=5: must divide width=12"),
        ({"heads": 3, "mix_rank": 0}, "mix_rank=0: must be an integer >= 1"),
        ({"heads": 3, "decay_rank": -1}, "decay_rank=-1: must be an integer >= 1"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(options, line):
    with pytest.raises(ValueError, match=line) as error:
        RWKV6(width=WIDTH, **options)
    assert "\n" not in str(error.value)
