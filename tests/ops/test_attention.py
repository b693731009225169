"""Attention over parts of the keys: every backend is the formula, and the merge is exact."""

import math
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import UserError
from zoo.ops import attention
from zoo.ops.attention import Part, attend
from zoo.ops.merge import merge

D, E, H = 8, 6, 3


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention, "TILE", 5)


def leaves(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Random q, k, v in float64 for each (tq or tk) given as q, k, k, q, k, k, ..."""
    generator = torch.Generator().manual_seed(seed)
    widths = [D, D, E]
    return [
        torch.randn(
            2, t, H, widths[i % 3], generator=generator, dtype=torch.float64
        ).requires_grad_()
        for i, t in enumerate(lengths)
    ]


def dense(q, k, v, visible, softcap=None):
    """softmax(q k^T / sqrt d) v, written out for one visibility matrix; (out, lse)."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.exp(scores - scores.logsumexp(-1, keepdim=True))
    return torch.einsum("bhij,bjhe->bihe", weights, v), scores.logsumexp(-1).transpose(1, 2)


def gradients(out, lse, inputs):
    """Of a function of both results, so that the path through the lse counts."""
    return torch.autograd.grad(out.sin().sum() + (lse * lse).sum(), inputs)


@pytest.mark.parametrize("backend", ["reference", "torch", "flash"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
def test_a_causal_part_is_the_dense_formula(backend, tokens):
    q, k, v = inputs = leaves(tokens, tokens, tokens)
    expected = dense(q, k, v, torch.ones(tokens, tokens, dtype=torch.bool).tril())
    found = attend([Part(q, k, v, causal=True)], backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(*found, inputs), gradients(*expected, inputs), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("backend", ["reference", "torch", "flash"])
def test_parts_merge_to_attention_over_their_union(backend):
    q, k, v = leaves(13, 13, 13)
    past_k, past_v = leaves(13, 21, 21, seed=1)[1:]
    mask = torch.rand(13, 21, generator=torch.Generator().manual_seed(2)) > 0.5
    mask[4] = False  # a query that sees nothing of the past
    visible = torch.cat([mask, torch.ones(13, 13, dtype=torch.bool).tril()], 1)
    inputs = [q, k, v, past_k, past_v]
    expected = dense(q, torch.cat([past_k, k], 1), torch.cat([past_v, v], 1), visible)
    found = attend(
        [Part(q, past_k, past_v, mask=mask), Part(q, k, v, causal=True)], backend=backend
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(*found, inputs), gradients(*expected, inputs), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("backend", ["reference", "torch", "flash"])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_of_queries_may_share_one_of_keys(backend, tokens, masked):
    """Queries of heads 0, 1 read head 0 of the keys, queries of heads 2, 3 head 1."""
    torch.manual_seed(0)
    q = torch.randn(2, tokens, 4, D, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 9, 2, D, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 9, 2, E, dtype=torch.float64, requires_grad=True)
    visible = torch.rand(2, 4, tokens, 9) > 0.3 if masked else torch.ones(tokens, 9).bool()
    order = [0, 0, 1, 1]
    expected = dense(q, k[:, :, order], v[:, :, order], visible)
    found = attend([Part(q, k, v, mask=visible if masked else None)], backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(*found, (q, k, v)), gradients(*expected, (q, k, v)), rtol=1e-10, atol=1e-11
    )
    on_accelerator = attention._sdpa(Part(q, k, v, mask=visible if masked else None), None)
    torch.testing.assert_close(on_accelerator, expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_cap_bounds_the_scores_of_every_part(backend, tokens):
    torch.manual_seed(0)
    q = torch.randn(2, tokens, 4, D, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, tokens + 9, 2, D, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, tokens + 9, 2, E, dtype=torch.float64, requires_grad=True)
    visible = torch.rand(tokens, 9) > 0.3
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    order, cap = [0, 0, 1, 1], 0.7
    every = torch.cat([visible, causal], 1)
    expected = dense(q, k[:, :, order], v[:, :, order], every, cap)
    parts = [Part(q, k[:, :9], v[:, :9], mask=visible[None, None])]
    parts += [Part(q, k[:, 9:], v[:, 9:], causal=True)]
    found = attend(parts, softcap=cap, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(*found, (q, k, v)), gradients(*expected, (q, k, v)), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("backend", ["flash", "native"])
def test_a_backend_without_a_cap_is_refused_where_there_is_one(backend):
    q = torch.randn(1, 1, 2, D)
    with pytest.raises(UserError, match=f"backend={backend}"):
        attend([Part(q, q, q)], softcap=1.0, backend=backend)


def test_one_token_reads_shared_keys_without_repeating_them(monkeypatch):
    shapes, fused = [], attention._fused

    def watched(kernel, q, k, v, *more):
        shapes.append(tuple(k.shape))
        return fused(kernel, q, k, v, *more)

    monkeypatch.setitem(attention._FORMS, "flash", partial(watched, attention._CPU))
    q, k = torch.randn(1, 1, 4, D), torch.randn(1, 40, 2, D)
    attend([Part(q, k, k)], backend="flash")
    assert shapes == [(1, 2, 40, D)]


def test_the_merge_does_not_depend_on_the_order_of_the_parts():
    q, k, v = leaves(4, 12, 12)
    thirds = [Part(q, a, b) for a, b in zip(k.split(4, 1), v.split(4, 1), strict=True)]
    torch.testing.assert_close(attend(thirds), attend(thirds[::-1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch", "flash"])
def test_a_query_that_sees_no_key_gets_zero_and_a_finite_gradient(backend):
    q, k, v = inputs = leaves(3, 4, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    out, lse = attend([Part(q, k, v, mask=mask)], backend=backend)
    assert (out[:, 1] == 0).all()
    assert (lse[:, 1] == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert grad.isfinite().all()
    merged, total = merge([(out, lse), (out, lse)])
    assert (merged[:, 1] == 0).all()
    assert (total[:, 1] == -torch.inf).all()
    for grad in torch.autograd.grad(merged.sum(), [out, lse], allow_unused=True):
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "flash"])
def test_scores_far_apart_stay_finite(backend):
    q, k, v = (x.detach().float() for x in leaves(6, 6, 6))
    out, lse = attend([Part(q * 1e3, k * 1e3, v, causal=True)], backend=backend)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_flash_passes_gradcheck_through_the_lse():
    q, k, v = leaves(3, 3, 3)
    assert torch.autograd.gradcheck(
        lambda *x: attend([Part(*x, causal=True)], backend="flash"), (q, k, v)
    )


def test_an_unknown_backend_is_refused_by_name():
    q, k, v = leaves(2, 2, 2)
    with pytest.raises(UserError, match=r"^backend=flsh: unknown backend of attend\."):
        attend([Part(q, k, v)], backend="flsh")


def test_a_causal_part_takes_no_mask():
    q, k, v = leaves(2, 3, 3)
    with pytest.raises(ValueError, match="as many keys as queries"):
        attend([Part(q, k, v, causal=True)])


def test_operations_are_two_products_per_score_and_half_of_them_where_causal():
    q, k, v = (x.detach() for x in leaves(32, 32, 32))
    for causal, share in ((False, 1.0), (True, 0.5)):
        with FlopCounterMode(display=False) as counter:
            attend([Part(q, k, v, causal=causal)], backend="flash")
        width = max(D, E)  # the kernel's one width for queries, keys and values
        assert counter.get_total_flops() == share * 2 * 2 * H * 32 * 32 * 2 * width


@pytest.mark.parametrize("tokens", [0, 5])
def test_queries_of_no_keys_have_output_0_and_a_gradient(tokens):
    q, k, v = (torch.ones(2, n, 3, 8, requires_grad=True) for n in (tokens, 0, 0))
    out, lse = attend([Part(q, k, v)])
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == -torch.inf).all()
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert not gradient.any()
