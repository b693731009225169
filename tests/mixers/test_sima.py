"""SimA is its paper's formula both ways, and what the causal norms make of it."""

import pytest
import torch

from zoo.mixers.sima import SimA

WIDTH, HEADS, D = 16, 2, 8


def build(**options) -> SimA:
    torch.manual_seed(0)
    return SimA(width=WIDTH, heads=HEADS, **options).double()


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=generator)


def paper(mixer: SimA, x: torch.Tensor) -> torch.Tensor:
    """(q^ k^T) v over all of x, the l1 norms written out."""
    q, k, v = (
        (x @ p.weight.T).unflatten(-1, (HEADS, D))
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    q, k = (torch.nn.functional.normalize(y, p=1, dim=1) for y in (q, k))
    o = torch.einsum("bihd,bjhd,bjhe->bihe", q, k, v).flatten(-2)
    o = o * x.shape[1] if mixer.scale == "t" else o
    return o @ mixer.o_proj.weight.T


@pytest.mark.parametrize("scale", ["none", "t"])
@pytest.mark.parametrize("length", [1, D - 1, D, D + 1, 40])
def test_the_bidirectional_form_is_the_paper_in_either_order(scale, length):
    mixer, x = build(scale=scale, causal=False), tokens(length)
    torch.testing.assert_close(mixer(x), paper(mixer, x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", ["none", "t"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("length", [1, 2, 64, 65, 199])
def test_a_causal_output_is_the_bidirectional_one_of_its_prefix(scale, backend, length):
    mixer, x = build(scale=scale, backend=backend), tokens(length)
    y = mixer(x)
    for t in {0, 1, length // 2, length - 1} & {*range(length)}:
        expected = paper(mixer, x[:, : t + 1])[:, -1]
        torch.testing.assert_close(y[:, t], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", ["none", "t"])
@pytest.mark.parametrize("sizes", [[1] * 70, [1, 69], [69, 1], [5, 64, 1]])
def test_any_chunking_gives_the_whole(scale, sizes):
    mixer, x = build(scale=scale), tokens(70)
    whole, final = mixer(x, mixer.empty_state(2))
    state, outs = mixer.empty_state(2), []
    for chunk in x.split(sizes, 1):
        y, state = mixer(chunk, state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(tuple(state), tuple(final), rtol=1e-9, atol=1e-10)


def test_the_output_falls_like_one_over_t_unless_scaled():
    x = tokens(40).repeat(1, 8, 1)  # the same text over and over: its means stay
    for scale, ratio in (("none", 1 / 8), ("t", 1.0)):
        y = build(scale=scale)(x)
        torch.testing.assert_close(y[:, -1], y[:, 39] * ratio, rtol=1e-9, atol=1e-12)


def test_a_channel_that_is_always_zero_stays_finite():
    mixer, x = build(), tokens(9)
    with torch.no_grad():
        mixer.q_proj.weight[3] = 0
        mixer.k_proj.weight[5] = 0
    x.requires_grad_()
    y = mixer(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 3}, "heads=3: must divide width=16"),
        ({"scale": "n"}, "scale=n: must be t or none"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(options, said):
    with pytest.raises(ValueError, match=said):
        SimA(**{"width": WIDTH, "heads": HEADS, **options})
