"""T5's buckets: hand-made tables, exact integers, transformers; and the learned bias."""

import pytest
import torch
from schemes import WIDTH, assert_same, inputs

from zoo.positions.t5 import RelativeBias, bucket, t5_attention


def test_buckets_of_the_published_table():
    near = [0, 1, 2, 14, 15, 16, 18, 19, 20]
    assert bucket(torch.tensor(near)).tolist() == [0, 1, 2, 14, 15, 16, 16, 17, 17]
    assert bucket(torch.tensor([63, 64, 112, 113, 127, 128, 10**6])).tolist() == [
        26, 26, 30, 31, 31, 31, 31,
    ]  # fmt: skip
    assert bucket(torch.tensor([-1, -50])).tolist() == [0, 0]
    assert bucket(torch.tensor([-1, 1, -128, 128]), bidirectional=True).tolist() == [17, 1, 31, 15]


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (16, 128), (64, 2048), (8, 64), (6, 81)])
def test_the_edges_of_the_buckets_are_those_of_exact_arithmetic(buckets, far):
    """n is in the k-th wide bucket from (n/e)^m >= (far/e)^k on, e = m = buckets/2."""
    exact = buckets // 2
    found = bucket(torch.arange(far), buckets=buckets, max_distance=far).tolist()
    for n in range(exact, far):
        k = max(k for k in range(exact) if n**exact * exact**k >= exact**exact * far**k)
        assert found[n] == exact + k, n


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_those_of_transformers(bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    apart = torch.arange(-600, 600)
    theirs = t5.T5Attention._relative_position_bucket(-apart, bidirectional, 32, 128)
    assert torch.equal(bucket(apart, bidirectional=bidirectional), theirs)


def test_the_bias_is_the_tables_row_of_the_distance():
    bias = RelativeBias(heads=3, buckets=8, max_distance=20)
    assert not bias.weight.any()
    torch.nn.init.normal_(bias.weight)
    table = bias(torch.arange(30, 33), torch.arange(33))
    assert table.shape == (3, 3, 33)
    for i in range(3):
        for j in range(33):
            row = bucket(torch.tensor(30 + i - j), buckets=8, max_distance=20)
            assert torch.equal(table[:, i, j], bias.weight[row])
    table.sum().backward()
    assert bias.weight.grad is not None
    assert (bias.weight.grad != 0).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"buckets": 1}, "buckets=1: must be at least 2"),
        ({"buckets": 2, "bidirectional": True}, "buckets=2: must be at least 4"),
        ({"max_distance": 16}, "max_distance=16"),
    ],
)
def test_tables_without_room_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        bucket(torch.arange(3), **given)


@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (40, 0), (1, 30), (40, 30)])
def test_t5_is_the_dense_formula_with_a_bias_per_bucket(tokens, past, monkeypatch):
    monkeypatch.setattr("zoo.positions.t5.TILE", 7)
    bias = RelativeBias(heads=3, buckets=8, max_distance=20).double()
    torch.nn.init.normal_(bias.weight)
    leaves = [*inputs(tokens, past), bias.weight]
    q, k, v, _ = leaves
    apart = torch.arange(past, past + tokens)[:, None] - torch.arange(past + tokens)
    # 8 buckets: 0 1 2 3, then from 4 (20/4)^(i/4): 4 .. 5, 6 .. 8, 9 .. 13, 14 and more
    row = torch.bucketize(apart, torch.tensor([1, 2, 3, 4, 6, 9, 14]), right=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / WIDTH**0.5 + bias.weight[row].movedim(-1, 0)
    weights = scores.masked_fill(apart < 0, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhe->bihe", weights, v)
    assert_same(t5_attention(q, k, v, bias), expected, leaves)
