"""LED units: products of two factors wherever the transformer has a matrix, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.mixers.base import linear
from zoo.mixers.feed_forward import SwiGLU
from zoo.mixers.low_rank import LowRank, LowRankAttention, LowRankFeedForward
from zoo.mixers.softmax import SoftmaxAttention
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope

WIDTH, HEADS = 24, 3


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("shape", [(24, 24), (24, 64), (64, 24)])
def test_the_full_rank_reproduces_the_matrix(shape):
    dense = linear(*shape).double()  # the factors of float32 differ by more, as LAPACK rounds
    unit = LowRank.from_dense(dense, min(shape))
    assert (unit.weight - dense.weight).abs().max() < 1e-14
    x = torch.randn(5, shape[0], dtype=torch.float64)
    torch.testing.assert_close(unit(x), dense(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 23])
def test_no_product_of_that_rank_is_nearer_to_the_matrix(rank):
    dense = linear(24, 32).double()
    unit = LowRank.from_dense(dense, rank)
    error = torch.linalg.matrix_norm(dense.weight - unit.weight)
    beyond = torch.linalg.svdvals(dense.weight)[rank:].square().sum().sqrt()  # Eckart & Young
    torch.testing.assert_close(error, beyond, rtol=1e-10, atol=1e-12)
    assert unit.E.weight.shape == (32, rank)
    assert unit.D.weight.shape == (rank, 24)


def test_a_bias_stays_and_a_rank_that_no_matrix_has_is_refused():
    dense, x = nn.Linear(6, 4).double(), torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(LowRank.from_dense(dense, 4)(x), dense(x))
    with pytest.raises(ValueError, match="rank=5: must be from 1 to 4"):
        LowRank.from_dense(linear(4, 6), 5)


@pytest.mark.parametrize("rank", [4, 64, 256])
@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_a_unit_keeps_the_variance_a_matrix_would(rank, gain):
    torch.manual_seed(0)
    x = torch.randn(1024, 256)
    found = torch.stack([LowRank(256, 512, rank, gain=gain)(x).var() for _ in range(20)]).mean()
    expected = linear(256, 512, gain=gain)(x).var()
    assert 0.85 < found / expected < 1.15


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", [Rope, NoPositions])
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_the_attention_is_softmax_attention_with_the_products_for_matrices(
    causal, positions, kv_heads
):
    options = {"width": WIDTH, "heads": HEADS, "kv_heads": kv_heads, "positions": positions}
    mixer = LowRankAttention(**options, rank=7, causal=causal).double()
    dense = SoftmaxAttention(**options, causal=causal).double()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(dense, name).weight.copy_(getattr(mixer, name).weight)
    x = tokens(17)
    torch.testing.assert_close(mixer(x), dense(x), rtol=1e-10, atol=1e-12)


def test_the_attention_has_the_parameters_of_its_factors_and_no_others():
    count = sum(p.numel() for p in LowRankAttention(width=WIDTH, heads=HEADS, rank=5).parameters())
    assert count == 4 * 5 * 2 * WIDTH


def test_the_feed_forward_is_swiglu_with_the_products_for_matrices():
    mixer = LowRankFeedForward(width=WIDTH, hidden_width=40, rank=6).double()
    dense = SwiGLU(width=WIDTH, hidden_width=40).double()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(dense, name).weight.copy_(getattr(mixer, name).weight)
    torch.testing.assert_close(mixer(tokens(9)), dense(tokens(9)), rtol=1e-10, atol=1e-12)


def test_ungated_the_feed_forward_is_the_papers_two_layers():
    mixer = LowRankFeedForward(width=WIDTH, rank=6, gated=False).double()
    x = tokens(9)
    up = mixer.up_proj.E.weight @ mixer.up_proj.D.weight
    down = mixer.down_proj.E.weight @ mixer.down_proj.D.weight
    assert up.shape == (4 * WIDTH, WIDTH)
    torch.testing.assert_close(mixer(x), F.relu(x @ up.T) @ down.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [0, -1, WIDTH + 1])
def test_wrong_ranks_are_refused_in_a_line(rank):
    said = f"rank={rank}: must be from 1 to {WIDTH}"
    with pytest.raises(ValueError, match=said):
        LowRankAttention(width=WIDTH, heads=HEADS, rank=rank)
    with pytest.raises(ValueError, match=said):
        LowRankFeedForward(width=WIDTH, rank=rank)
