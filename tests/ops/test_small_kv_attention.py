"""Attention over a handful of keys is attention: any width, any number of keys, large scores."""

import fuzz
import pytest
import torch

from zoo.ops.attention import Part, _formula, attend
from zoo.ops.runtime.dispatch import reset, used_backends
from zoo.ops.small_kv_attention import KERNEL, MAX_KEYS, accepts, small_kv_attention


def inputs(keys: int, width: int, value_width: int, tokens: int = 300):
    torch.manual_seed(0)
    shapes = [(2, tokens, 3, width), (2, keys, 3, width), (2, keys, 3, value_width)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("keys", [1, 2, 3, 8])
@pytest.mark.parametrize(("width", "value_width"), [(2, 1), (20, 36), (64, 64), (256, 8)])
def test_it_is_the_formula(keys, width, value_width):
    if keys > KERNEL.constant("max_keys", torch.float64):
        pytest.skip("registers of this machine have fewer lanes")
    q, k, v = inputs(keys, width, value_width)
    wanted = attend([Part(q, k, v)], scale=0.7, backend="reference")
    torch.testing.assert_close(small_kv_attention(q, k, v, 0.7), wanted, rtol=1e-12, atol=1e-12)
    out, lse = small_kv_attention(q.float(), k.float(), v.float(), 0.7)
    assert (out - wanted[0]).norm() <= 1e-6 * wanted[0].norm()
    assert (lse - wanted[1]).norm() <= 1e-6 * wanted[1].norm()


def test_as_many_keys_as_a_register_of_single_precision_has_lanes():
    q, k, v = inputs(MAX_KEYS, 16, 16)
    found = attend([Part(q.float(), k.float(), v.float())])
    wanted = attend([Part(q, k, v)], backend="reference")
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 7, 8, 127, 129])
def test_any_number_of_queries_in_slices(tokens, poisoned):
    q, k, v = inputs(2, 20, 20, tokens=140)
    q, k, v = q[:, 3 : 3 + tokens, 1:], k[:, :, 1:], v[:, :, :2]
    wanted = attend([Part(q, k, v)], scale=1.0, backend="reference")
    torch.testing.assert_close(small_kv_attention(q, k, v, 1.0), wanted, rtol=1e-12, atol=1e-12)


def test_scores_of_thousands_neither_overflow_nor_vanish():
    q, k, v = inputs(2, 16, 16)
    q = 1e3 * q
    wanted = attend([Part(q, k, v)], scale=1.0, backend="reference")
    torch.testing.assert_close(small_kv_attention(q, k, v, 1.0), wanted, rtol=1e-11, atol=1e-11)


def test_threads_do_not_change_a_bit():
    q, k, v = (x.float() for x in inputs(2, 32, 32, tokens=2000))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(small_kv_attention(q, k, v, 1.0))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_attention_takes_it_where_no_gradient_is_wanted_and_keys_are_few():
    q, k, v = inputs(2, 16, 16)
    reset()
    attend([Part(q, k, v)])
    assert used_backends() == {"attend": "native"}
    for part in (
        Part(q.clone().requires_grad_(), k, v),
        Part(q, *inputs(17, 16, 16)[1:]),
        Part(q, k, v, mask=torch.ones(1, 1, 300, 2, dtype=torch.bool)),
        Part(q[:, :2], k, v, causal=True),
    ):
        reset()
        attend([part])
        assert used_backends() == {"attend": "flash"}
    with pytest.raises(ValueError, match="17 keys of width 16 are too many"):
        small_kv_attention(*inputs(17, 16, 16), 1.0)
    assert accepts(q.bfloat16(), k.bfloat16(), v.bfloat16()) is False


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_keys_that_count_three_times_are_three_of_each(needs_gradient):
    q, k, v = inputs(2, 16, 16, tokens=9)
    q.requires_grad_(needs_gradient)
    thrice = attend([Part(q, k, v, times=3.0)])
    copies = attend([Part(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))], backend="reference")
    torch.testing.assert_close(thrice, copies, rtol=1e-12, atol=1e-12)


def lanes() -> int:
    """The keys that the kernel has room for, in either dtype: 8 under AVX-512, 4 under AVX2."""
    return min(KERNEL.constant(KERNEL.bounds["keys"][1], d) for d in (torch.float32, torch.float64))


def random_small_kv_attention_call(draw: fuzz.Draw) -> fuzz.Call:
    b, t, h = draw.batch(), draw.size(128), draw.size()
    keys, d, e = draw.random.randint(0, lanes()), draw.size(), draw.size()
    tensors = [draw.values(b, t, h, d), draw.values(b, keys, h, d), draw.values(b, keys, h, e)]
    scale = draw.random.choice([0.3, 5.0])

    def run(backend, *qkv):
        if backend == "native":
            return small_kv_attention(*qkv, scale)
        if backend == "auto":
            return attend([Part(*qkv)], scale=scale)
        out, lse = _formula(*(x.transpose(1, 2) for x in qkv), None, False, scale)
        return out.transpose(1, 2), lse.transpose(1, 2)

    return fuzz.Call(run, [draw.layout(x) for x in tensors], gradients=False)
