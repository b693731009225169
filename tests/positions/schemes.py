"""What tests of position schemes share: texts to attend over, and how results are compared."""

import torch

WIDTH = 8  # of a head


def inputs(tokens: int, past: int = 0) -> list[torch.Tensor]:
    """Queries of `tokens` tokens, and keys and values of `past` more before them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, 3, WIDTH) for n in (tokens, past + tokens, past + tokens)]
    draw = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [x.requires_grad_() for x in draw]


def assert_same(found, expected, leaves) -> None:
    """Equal outputs, and equal gradients of all leaves."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    weights = torch.randn_like(found)
    grads, wanted = (
        torch.autograd.grad((out * weights).sum(), leaves) for out in (found, expected)
    )
    torch.testing.assert_close(grads, wanted, rtol=1e-9, atol=1e-11)
