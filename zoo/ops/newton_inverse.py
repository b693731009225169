"""The inverse of a positive definite matrix by Newton's iteration (Lu 2021, algorithm 1)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class NewtonInverse(torch.autograd.Function):
    """A^-1 of positive definite A: X <- 2 X - X A X from X = alpha A   (algorithm 1).

    It converges for alpha < 2 / ||A||^2; alpha is 0.9 times 2 / ||A||_1^2, as at 2 a matrix whose
    largest eigenvalue is its norm (a single landmark) would stay where it begins. The gradient is
    the inverse's own, -X^T G X^T, whatever the number of iterations.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, iterations: int) -> Tensor:
        with torch.autocast(A.device.type, enabled=False):
            norm = A.abs().sum(-2, keepdim=True).amax(-1, keepdim=True)
            X = 1.8 / norm.square() * A
            for _ in range(iterations):
                X = 2 * X - X @ A @ X
        ctx.save_for_backward(X)
        return X

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (G,) = grads
        (X,) = ctx.saved_tensors
        with torch.autocast(G.device.type, enabled=False):
            return -X.mT @ G @ X.mT, None


def inverse_residual(A: Tensor, X: Tensor) -> Tensor:
    """The largest ||I - A X|| (Frobenius) of a batch: 0 for an inverse, sqrt(m) for X = 0."""
    with torch.autocast(A.device.type, enabled=False):
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        return torch.linalg.matrix_norm(eye - A @ X).max()
