"""Additive attention: the tiles are the formula, at every length and in every gradient."""

import pytest
import torch

from zoo.errors import UserError
from zoo.ops import kernel_attention as op
from zoo.ops.kernel_attention import gaussian, kernel_attention

D, E, H = 8, 6, 3
TILE = 4
LENGTHS = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (19, 19), (1, 9), (3, 19), (6, 8), (9, 12)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(op, "TILE", TILE)


def leaves(queries: int, keys: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries + 31 * keys)
    shapes = [(2, queries, H, D), (2, keys, H, D), (2, keys, H, E)]
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


def dense(q, k, v, kernel, slopes=None, causal=True):
    """The definition, one (t, t) matrix per head."""
    i = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    j = torch.arange(k.shape[1])
    if kernel == "gaussian":
        squares = (q[:, :, None] - k[:, None]).square().sum(-1)  # (b, i, j, h)
        weights = torch.exp(-squares / (2 * D**0.5)).permute(0, 3, 1, 2)
    else:
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5
        if slopes is not None:
            scores = scores - slopes[:, None, None] * (i - j)
        weights = scores.clamp(min=0) ** {"relu": 1, "squared_relu": 2}[kernel]
    if causal:
        weights = weights.masked_fill(j > i, 0)
    return torch.einsum("bhij,bjhe->bihe", weights, v)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kernel", op.KERNELS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_it_is_the_formula_and_so_are_its_gradients(backend, kernel, causal, lengths):
    inputs = leaves(*lengths)
    expected = dense(*inputs, kernel, causal=causal)
    found = kernel_attention(*inputs, kernel, causal=causal, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
        rtol=1e-10,
        atol=1e-11,
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kernel", ["relu", "squared_relu"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_slopes_lower_the_scores_by_distance_before_the_kernel(backend, kernel, lengths):
    inputs = leaves(*lengths)
    slopes = torch.tensor([0.5, 0.1, 0.0], dtype=torch.float64)
    expected = dense(*inputs, kernel, slopes)
    found = kernel_attention(*inputs, kernel, slopes=slopes, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
        rtol=1e-10,
        atol=1e-11,
    )


@pytest.mark.parametrize("kernel", op.KERNELS)
def test_results_over_disjoint_keys_add(kernel):
    q, k, v = leaves(19, 19)
    whole = kernel_attention(q, k, v, kernel)
    past = kernel_attention(q[:, 7:], k[:, :7], v[:, :7], kernel, causal=False)
    own = kernel_attention(q[:, 7:], k[:, 7:], v[:, 7:], kernel)
    torch.testing.assert_close(past + own, whole[:, 7:], rtol=1e-12, atol=1e-12)


def test_a_point_is_at_distance_zero_from_itself_however_far_out():
    x = 1e3 * torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gaussian(x, x, 0.01).diagonal(), torch.ones(5), rtol=0.2, atol=0)
    assert (gaussian(x, x, 0.01) <= 1).all()


def test_a_tile_is_never_larger_than_it_says(monkeypatch):
    sizes = []
    whole = op._scores

    def watched(*args):
        scores, visible = whole(*args)
        sizes.append(scores.shape[-2] * scores.shape[-1])
        return scores, visible

    monkeypatch.setattr(op, "_scores", watched)
    inputs = leaves(19, 57)
    kernel_attention(*inputs, "relu").sum().backward()
    assert max(sizes) <= TILE * TILE
    assert sum(sizes) < 2 * 19 * 57  # forward and backward: those in the future are skipped


@pytest.mark.parametrize("kernel", op.KERNELS)
def test_sums_over_many_keys_are_not_rounded_to_bfloat16(kernel):
    q, k, v = (x.detach().bfloat16() for x in leaves(1, 4097, torch.float32))
    found = kernel_attention(q, k, v, kernel)
    assert found.dtype == torch.float32
    expected = dense(q.double(), k.double(), v.double(), kernel)
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 0.03


def test_autocast_does_not_round_the_gaussian():
    inputs = leaves(9, 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = kernel_attention(*inputs, "gaussian")
        grads = torch.autograd.grad(found.sum(), inputs)
    expected = kernel_attention(*inputs, "gaussian")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), inputs), rtol=0, atol=0)


def test_wrong_arguments_are_refused_in_a_line():
    q, k, v = leaves(3, 2)
    with pytest.raises(ValueError, match="3 queries for 2 tokens"):
        kernel_attention(q, k, v, "relu")
    with pytest.raises(ValueError, match="slopes"):
        kernel_attention(q, k, v, "relu", slopes=torch.ones(H), causal=False)
    with pytest.raises(UserError, match=r"kernel=rleu: unknown kernel. Did you mean 'relu'"):
        kernel_attention(q, k, v, "rleu")
    with pytest.raises(UserError, match=r"^backend=tiled: unknown backend of kernel_attention\."):
        kernel_attention(q, q, q, "relu", backend="tiled")
