"""The linear recurrence h_t = a_t h_{t-1} + u_t, element by element, over all steps at once.

Affine maps h -> a h + u compose: every block of steps from zero, then the states between blocks,
then their decay into each block. Decays are only ever multiplied, never divided, so any decay in
[0, 1] is exact, 0 and 1 included. Steps are tokens, or chunks of tokens for matrix-valued states.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def linear_scan(
    a: Float[Tensor, "b t ..."], u: Float[Tensor, "b t ..."], h: Float[Tensor, "b ..."]
) -> Float[Tensor, "b t ..."]:
    """Every state h_1 .. h_t after the one before the first step; `a` broadcasts against `u`.

    Differentiable in all three; the gradient is the same recurrence backwards in time.
    """
    return _LinearScan.apply(a, u, h)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, u, h):
        hs = _scan(a, u, h)
        ctx.save_for_backward(a, h, hs)
        return hs

    @staticmethod
    def backward(ctx, dhs):
        a, h, hs = ctx.saved_tensors
        # g_t = dh_t + a_{t+1} g_{t+1}
        following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        g = _scan(following.flip(1), dhs.flip(1), torch.zeros_like(h)).flip(1)
        before = torch.cat([h[:, None], hs[:, :-1]], 1)
        return (g * before).sum_to_size(a.shape), g, a[:, 0] * g[:, 0]


def _scan(a: Tensor, u: Tensor, h: Tensor) -> Tensor:
    """By blocks of about sqrt(t) steps."""
    t = a.shape[1]
    size = math.isqrt(t - 1) + 1
    short = -t % size
    if short:
        a = torch.cat([a, torch.ones_like(a[:, :short])], 1)
        u = torch.cat([u, torch.zeros_like(u[:, :short])], 1)
    a, u = (x.unflatten(1, (-1, size)) for x in (a, u))
    hs, decays = torch.empty_like(u), torch.empty_like(a)  # from the start of each block
    hs[:, :, 0], decays[:, :, 0] = u[:, :, 0], a[:, :, 0]
    for i in range(1, size):
        torch.addcmul(u[:, :, i], a[:, :, i], hs[:, :, i - 1], out=hs[:, :, i])
        torch.mul(a[:, :, i], decays[:, :, i - 1], out=decays[:, :, i])
    starts = []
    for end, decay in zip(hs[:, :, -1].unbind(1), decays[:, :, -1].unbind(1), strict=True):
        starts.append(h)
        h = torch.addcmul(end, decay, h)
    hs.addcmul_(decays, torch.stack(starts, 1)[:, :, None])
    return hs.flatten(1, 2)[:, :t]
