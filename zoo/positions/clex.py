"""CLEX: rotary frequencies that flow with the length of the text (Chen 2023, sections 3.2, 3.3).

    t           how many times the trained window L the text is long
    theta(t)    the frequencies for it; z = ln theta
    NTK_t       those of base b (2t-1)^(d/(d-2)), so that d ln NTK_t / dt = -4i / ((d-2)(2t-1))
    dz/dt       W_down silu(W_up (z + ln NTK_t)) + d ln NTK_t / dt,    z(1) = ln NTK_1

W_down starts at zero, and theta(t) then is NTK_t. Written for r = z - ln NTK_t the equation is
dr/dt = W_down silu(W_up (r + 2 ln NTK_t)), r(1) = 0: the known part needs no integration, and an
untrained CLEX is NTK_t to the last bit. Runge-Kutta 4 solves the rest, in equal steps of
tau = ln(2t-1), which are short in t where the frequencies move fastest; in float64 and on the CPU,
as the problem is too small to be worth an accelerator's kernels.

`Continuous` is what a model reads by, `stretched` where its training windows are. Departures from
the authors' program: the frequencies follow the parameters and are never cached,
NTK_t has the model's own base, training positions span t L and never fall, and queries carry no
log(length) factor. Keys must be cached before they are rotated.
"""

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from zoo.ops.runtime.dispatch import without_values
from zoo.positions.randomised import randomised
from zoo.positions.scaling import ntk_aware


class CLEX(nn.Module):
    """One for all layers and heads; `hidden` is the width of W_up's output over `width`."""

    def __init__(
        self, *, width: int, base: float = 10000.0, hidden: int = 1, step: float = 0.1
    ) -> None:
        super().__init__()
        if width < 4 or hidden < 1 or not step > 0:
            raise ValueError(
                f"hidden={hidden}: must be at least 1, step={step} above 0 and the head width, "
                f"{width}, at least 4."
            )
        self.width, self.base, self.step = width, base, step
        self.up = nn.Linear(width // 2, hidden * width, bias=False)
        self.down = nn.Linear(hidden * width, width // 2, bias=False)
        nn.init.zeros_(self.down.weight)

    def ntk(self, t: float) -> Float[Tensor, " half"]:
        """NTK_t, where training starts from."""
        inv_freq, _ = ntk_aware(width=self.width, base=self.base, factor=2 * t - 1)
        return torch.tensor(inv_freq, dtype=torch.float64)

    def forward(self, t: float) -> Float[Tensor, " half"]:
        """theta(t) in float64, t at least 1; its gradient reaches the weights."""
        if t < 1:
            raise ValueError(f"t={t}: must be at least 1 trained window.")
        up, down = (layer.weight.cpu().double() for layer in (self.up, self.down))
        slope = 2 * torch.arange(self.width // 2, dtype=torch.float64) / (self.width - 2)
        log_theta, end = self.ntk(1).log(), math.log(2 * t - 1)

        def rate(tau: float, r: Tensor) -> Tensor:
            hidden = up @ (r + 2 * (log_theta - tau * slope))
            return math.exp(tau) / 2 * (down @ nn.functional.silu(hidden))  # dt = e^tau/2 dtau

        steps = math.ceil(end / self.step)
        r, h = torch.zeros_like(slope), end / max(steps, 1)
        for n in range(steps):
            tau = n * h
            a = rate(tau, r)
            b = rate(tau + h / 2, r + h / 2 * a)
            c = rate(tau + h / 2, r + h / 2 * b)
            d = rate(tau + h, r + h * c)
            r = r + h / 6 * (a + 2 * b + 2 * c + d)
        return self.ntk(t) * r.exp()


class Continuous(nn.Module):
    """CLEX's frequencies for a text of so many tokens: t = length / L, from 1 to `factor`.

    Called as the functions of `scaling` are: (inverse frequencies, attention factor).
    """

    def __init__(
        self,
        *,
        width: int,
        base: float = 10000.0,
        factor: float,
        original_length: int,
        hidden: int = 1,
        step: float = 0.1,
    ) -> None:
        super().__init__()
        self.field = CLEX(width=width, base=base, hidden=hidden, step=step)
        self.factor, self.original_length = factor, original_length
        self.solved: dict[tuple[float, bytes, bytes], Tensor] = {}

    def forward(self, length: int) -> tuple[Float[Tensor, " half"], float]:
        t = min(max(length / self.original_length, 1.0), self.factor)
        weights = (self.field.up.weight, self.field.down.weight)
        trained = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
        if trained or without_values():
            return self.field(t), 1.0
        up, down = (w.detach().cpu().double().numpy().tobytes() for w in weights)
        if (t, up, down) not in self.solved:  # the same for every layer and token of a text
            self.solved = dict([*self.solved.items()][-31:])
            self.solved[t, up, down] = self.field(t)
        return self.solved[t, up, down], 1.0


def stretched(rows: int, tokens: int, max_length: int, generator: Generator, /) -> Tensor:
    """The positions of the windows of a step, all in a text of the same length, drawn up to L'.

    A text of n tokens is one of t = n / L: t is as continuous as positions are whole.
    """
    text = int(torch.randint(max(tokens, 3), max_length + 1, (), generator=generator))
    between = [randomised(tokens - 2, text - 2, generator) + 1 for _ in range(rows)]
    ends = torch.tensor([[0], [text - 1]]).expand(2, rows)[..., None]
    return torch.cat([ends[0], torch.stack(between), ends[1]], 1)
