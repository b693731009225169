"""ALiBi: the published slopes, and the channel form against the bias it stands for."""

import math

import pytest
import torch

from zoo.ops.attention import Part, attend
from zoo.positions.alibi import add_bias_channels, slopes


def test_slopes_are_the_published_ones():
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(12)[8:] == pytest.approx([0.7071, 0.3536, 0.1768, 0.0884], abs=1e-4)


def test_interpolated_slopes_give_a_longer_text_the_biases_of_a_shorter_one():
    for short, long in zip(slopes(6), slopes(6, factor=4), strict=True):
        assert long * 1024 == short * 256
    with pytest.raises(ValueError, match=r"factor=0\.5"):
        slopes(6, factor=0.5)


@pytest.mark.parametrize(
    ("heads", "past", "factor"), [(4, 0, 1.0), (4, 70, 1.0), (3, 130, 1.0), (4, 70, 8.0)]
)
def test_two_more_channels_are_the_linear_bias(heads, past, factor):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, heads, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, past + 9, heads, 8, generator=generator, dtype=torch.float64)
    i, j = torch.arange(past, past + 9)[:, None], torch.arange(past + 9)
    slope = torch.tensor(slopes(heads), dtype=torch.float64)[:, None, None] / factor
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8) - slope * (i - j)
    weights = scores.masked_fill(j > i, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v)

    q2, k2 = add_bias_channels(q, k, origin=past, factor=factor)
    parts = [Part(q2, k2[:, past:], v[:, past:], causal=True)]
    if past:
        parts.append(Part(q2, k2[:, :past], v[:, :past]))
    torch.testing.assert_close(attend(parts, scale=1.0)[0], expected, rtol=1e-10, atol=1e-12)


def test_float32_holds_the_bias_where_it_matters_a_million_keys_in():
    """Near keys decide a steep head; their bias must survive beside a key index of 2^20."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 64, 4, 8, generator=generator)
    k = torch.randn(1, 2**14, 4, 8, generator=generator)
    for dtype, tolerance in [(torch.float32, 2e-4), (torch.bfloat16, 5e-2)]:
        q2, k2 = add_bias_channels(q.to(dtype), k.to(dtype), origin=2**14 - 64)
        near = torch.einsum("bihd,bjhd->bhij", q2.float()[..., 8:], k2.float()[:, -64:, :, 8:])
        i = torch.arange(64)
        slope = torch.tensor(slopes(4))[:, None, None]
        torch.testing.assert_close(
            near - near[..., :1], (slope * (i - i[:1])).expand(1, 4, 64, 64), rtol=0, atol=tolerance
        )
