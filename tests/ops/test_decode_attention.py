"""One query over many keys is attention, however they are cut and whichever heads share them."""

import fuzz
import pytest
import torch

from zoo.ops.attention import Part, attend, repeat_heads
from zoo.ops.decode_attention import KERNEL, MAX_HEADS, accepts, decode_attention
from zoo.ops.runtime.dispatch import reset, used_backends

CHUNK = KERNEL.constant("chunk", torch.float64)


def inputs(keys: int, heads: int = 4, kv_heads: int = 4, width: int = 20, value_width: int = 20):
    torch.manual_seed(0)
    shapes = [(2, 1, heads, width), (2, keys, kv_heads, width), (2, keys, kv_heads, value_width)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def formula(q, k, v, scale: float):
    k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
    return attend([Part(q, k, v)], scale=scale, backend="reference")


@pytest.mark.parametrize("keys", [1, 2, 15, 17, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (5, 1), (12, 2), (6, 6)])
def test_it_is_the_formula(keys, heads, kv_heads):
    for width, value_width in ((2, 1), (20, 36), (64, 64), (80, 130)):
        q, k, v = inputs(keys, heads, kv_heads, width, value_width)
        wanted = formula(q, k, v, 0.7)
        torch.testing.assert_close(decode_attention(q, k, v, 0.7), wanted, rtol=1e-12, atol=1e-12)
        out, lse = decode_attention(q.float(), k.float(), v.float(), 0.7)
        assert (out - wanted[0]).norm() <= 2e-6 * wanted[0].norm()
        assert (lse - wanted[1]).norm() <= 2e-6 * wanted[1].norm()


def test_keys_and_values_in_the_memory_of_a_longer_cache(poisoned):
    q, k, v = inputs(300)
    k, v = k[:, 7:200, :, 1:17], v[:, 7:200, :, ::2]
    wanted = formula(q[..., :16], k, v, 1.0)
    found = decode_attention(q[..., :16], k, v, 1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_scores_of_thousands_neither_overflow_nor_vanish():
    q, k, v = inputs(2 * CHUNK + 5)
    wanted = formula(1e3 * q, k, v, 1.0)
    found = decode_attention(1e3 * q, k, v, 1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_threads_do_not_change_a_bit():
    q, k, v = (x.float() for x in inputs(20 * CHUNK, 8, 2, 64, 64))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(decode_attention(q, k, v, 1.0))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_attention_takes_it_for_one_query_where_no_gradient_is_wanted():
    q, k, v = inputs(40, 4, 2)
    reset()
    found = attend([Part(q, k, v)])
    assert used_backends() == {"attend": "native"}
    torch.testing.assert_close(found, formula(q, k, v, 20**-0.5))
    for part in (
        Part(q.clone().requires_grad_(), k, v),
        Part(q, k, v, mask=torch.ones(1, 1, 1, 40, dtype=torch.bool)),
        Part(q.expand(-1, 2, -1, -1), k, v),
    ):
        reset()
        attend([part])
        assert used_backends() == {"attend": "flash"}
    many = [x.repeat(1, 1, MAX_HEADS // 2, 1) for x in (q, k, v)]
    assert accepts(*many) is False
    assert accepts(q.bfloat16(), k.bfloat16(), v.bfloat16()) is False
    with pytest.raises(ValueError, match="must fit"):
        decode_attention(q, *inputs(3, 4, 3)[1:], 1.0)
    with pytest.raises(ValueError, match="heads is 256, must be 0 to 128"):
        decode_attention(*many, 1.0)


def test_keys_that_count_three_times_are_three_of_each():
    q, k, v = inputs(30)
    thrice = attend([Part(q, k, v, times=3.0)])
    copies = attend([Part(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))], backend="reference")
    torch.testing.assert_close(thrice, copies, rtol=1e-12, atol=1e-12)


def random_decode_attention_call(draw: fuzz.Draw) -> fuzz.Call:
    b, keys, g = draw.batch(), draw.size(CHUNK, 2 * CHUNK, zero=False), draw.size(zero=False)
    h = g * draw.random.choice([1, 1, 2, 3, 5]) if g < 20 else g
    d, e = draw.size(), draw.size()
    tensors = [draw.values(b, 1, h, d), draw.values(b, keys, g, d), draw.values(b, keys, g, e)]
    scale = draw.random.choice([0.3, 5.0])

    def run(backend, q, k, v):
        if backend == "native":
            return decode_attention(q, k, v, scale)
        if backend == "auto":
            return attend([Part(q, k, v)], scale=scale)
        return formula(q, k, v, scale)

    return fuzz.Call(run, [draw.layout(x) for x in tensors], gradients=False)
