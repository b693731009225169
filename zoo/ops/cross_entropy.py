"""The cost of tokens under a linear head, without the logits of all of them at once.

    l_i = log sum_j exp(w_j . x_i) - w_{y_i} . x_i        sum over i with y_i != ignored

    dl / dx_i = sum_j (p_ij - [j = y_i]) w_j,   dl / dw_j = sum_i (p_ij - [j = y_i]) x_i

with p_i = softmax(w x_i). Logits are (n, v): of 65,536 tokens over 32,768 words 8 GiB in float32,
and as much again for their gradient. Where they are many, they are computed for a chunk of tokens
at a time and the gradients with them, so that they are never held and no product is made twice
(Hsu 2024, Liger, arXiv:2410.10989, section 3.2).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.ops.dtypes import wide_dtype
from zoo.ops.runtime.checks import check

HELD = 2**26  # logits that may be held at once: 256 MiB in float32


def summed_cross_entropy(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, " n"],
    ignored: int = -100,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """The sum of the targets' nats, in float32 or better; those that are `ignored` cost nothing.

    Args:
        x: what the head reads, one row a token.
        weight: the head's.
        targets: a token each, or `ignored`.
        chunk: tokens whose logits are held at once; by default all while they are at most `HELD`
            numbers, else as many as that.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check("cross_entropy", {"x": "n d", "weight": "v d"}, x, weight)
    if targets.shape != x.shape[:1]:
        raise ValueError(f"cross_entropy: {len(x)} rows and targets {tuple(targets.shape)}")
    size = chunk or max(1, HELD // len(weight))
    if size >= len(x):
        return _nats(F.linear(x, weight), targets, ignored)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Chunked.apply(x, weight, targets, ignored, size)  # type: ignore[return-value]
    pieces = zip(x.split(size), targets.split(size), strict=True)
    return torch.stack([_nats(F.linear(a, weight), b, ignored) for a, b in pieces]).sum()


def _nats(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    wide = logits.to(wide_dtype(logits))
    return F.cross_entropy(wide, targets, ignore_index=ignored, reduction="sum")


class _Chunked(torch.autograd.Function):
    """The sum over chunks; the gradients are computed beside it and kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignored: int, size: int
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if needs_x else None
        dweight = torch.zeros_like(weight) if needs_weight else None
        total = []
        for start in range(0, len(x), size):
            rows, wanted = x[start : start + size], targets[start : start + size]
            logits = F.linear(rows, weight)  # as autocast has it
            log_p = logits.to(wide_dtype(logits)).log_softmax(-1)
            total.append(F.nll_loss(log_p, wanted, ignore_index=ignored, reduction="sum"))
            p = log_p.exp()
            scored = wanted != ignored
            p[scored.nonzero()[:, 0], wanted[scored]] -= 1
            p = (p * scored[:, None]).to(logits.dtype)
            if dx is not None:
                dx[start : start + size] = p @ weight.to(p.dtype)
            if dweight is not None:
                dweight += p.T @ rows.to(p.dtype)
        ctx.save_for_backward(dx, dweight)
        return torch.stack(total).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        dx, dweight = ctx.saved_tensors
        scaled = (part if part is None else part * grad.to(part.dtype) for part in (dx, dweight))
        return (*scaled, None, None, None)
