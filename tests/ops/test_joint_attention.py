"""Several parts of the keys under one gradient: the formula over their union, and its gradients."""

import pytest
import torch
from torch import Tensor

from zoo.ops.attention import Part, attention
from zoo.ops.joint_attention import accepts

SHAPES = [(2, 7, 13, 4, 4, 16), (1, 65, 200, 4, 2, 32), (2, 33, 1, 2, 1, 8), (1, 1, 5, 2, 2, 8)]


def parts_of(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Part]]:
    """Queries over a past and their own keys, and a sink: leaves, and parts of the softmax."""
    torch.manual_seed(0)
    b, t, n, heads, groups, width = shape
    sizes = [(t, heads), (n + t, groups), (n + t, groups), (1, groups), (1, groups)]
    q, k, v, sink_k, sink_v = leaves = [
        torch.randn(b, *size, width, dtype=dtype, requires_grad=True) for size in sizes
    ]
    own, past = Part(q, k[:, n:], v[:, n:], causal=True), Part(q, k[:, :n], v[:, :n])
    return leaves, [own, past, Part(q, sink_k, sink_v)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_outputs_and_gradients_are_those_of_the_formula(shape, dtype, close):
    leaves, parts = parts_of(shape, dtype)
    assert accepts(parts, "auto")
    weights = torch.randn_like(leaves[0])

    def found(backend: str) -> list[Tensor]:
        out = attention(parts, backend=backend)
        return [out, *torch.autograd.grad((out * weights).sum(), leaves)]

    for one, other in zip(found("auto"), found("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=10 * close, atol=10 * close)


def test_partial_results_are_not_kept():
    leaves, parts = parts_of((1, 64, 64, 2, 2, 16), torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attention(parts)
    inputs = {x.untyped_storage().data_ptr() for x in leaves}
    own = [x for x in saved if x.untyped_storage().data_ptr() not in inputs]
    assert sum(x.numel() for x in own) == out.numel() + out.shape[1] * out.shape[2]


def test_a_causal_part_has_as_many_keys_as_queries():
    _, (own, past, _) = parts_of(SHAPES[0], torch.float64)
    with pytest.raises(ValueError, match="as many keys as queries"):
        attention([own, past._replace(causal=True)])
