"""The Star-Transformer is its two steps written out, in both forms and through its layers."""

import pytest
import torch
import torch.nn.functional as F

from zoo.mixers.star import Star

WIDTH, HEADS, D, BLOCK = 12, 2, 6, 5
EXACT = {"rtol": 1e-9, "atol": 1e-10}
OWN, EMBEDDED, RELAY, BEFORE, AFTER = range(5)  # rows of `places`


def stack(causal: bool, layers: int = 3) -> list[Star]:
    torch.manual_seed(0)
    mixers = [
        Star(
            width=WIDTH, heads=HEADS, block=BLOCK, causal=causal, layer=layer, layers=layers
        ).double()
        for layer in range(layers)
    ]
    with torch.no_grad():
        for mixer in mixers:
            mixer.places.normal_()
            mixer.relay_norm.weight.normal_()
            mixer.relay_norm.bias.normal_()
    return mixers


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def read(mixers: list[Star], x: torch.Tensor) -> torch.Tensor:
    cross_layer = {}
    for mixer in mixers:
        x = x + mixer(x, cross_layer=cross_layer)
    return x


def multi_att(projections, query, keys, places=None) -> torch.Tensor:
    """MultiAtt(query, keys) of one token, (d,) over (n, d)."""
    w_q, w_k, w_v, w_o = (p.weight for p in projections)
    q = (w_q @ query).view(HEADS, D)
    k, v = ((torch.stack(keys) @ w.T).view(-1, HEADS, D) for w in (w_k, w_v))
    k = k if places is None else k + torch.stack(places)
    weights = ((q * k).sum(-1) / D**0.5).softmax(0)
    return w_o @ (weights[..., None] * v).sum(0).flatten()


def relay_step(mixer: Star, s, satellites) -> torch.Tensor:
    projections = (mixer.relay_q, mixer.relay_k, mixer.relay_v, mixer.relay_o)
    out = F.relu(multi_att(projections, s, [s, *satellites]))
    norm = mixer.relay_norm
    return (out - out.mean()) / (out.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias


def one_by_one(mixers: list[Star], e: torch.Tensor, causal: bool) -> torch.Tensor:
    """Section 3.2 of the paper, a token at a time, of one text (t, d)."""
    h, s, t = e, e.mean(0), len(e)
    for mixer in mixers:
        if causal:
            norm = mixer.relay_norm
            s = F.relu(mixer.relay_o.weight @ mixer.first_relay)
            s = (s - s.mean()) / (s.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
        else:
            s = relay_step(mixer, s, list(h))
        outs = []
        for i in range(t):
            if causal and i and i % BLOCK == 0:
                s = relay_step(mixer, s, list(h[i - BLOCK : i]))
            keys, places = [h[i], e[i], s], [OWN, EMBEDDED, RELAY]
            if i:
                keys, places = [*keys, h[i - 1]], [*places, BEFORE]
            if i + 1 < t and not causal:
                keys, places = [*keys, h[i + 1]], [*places, AFTER]
            projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
            vectors = [mixer.places[place] for place in places]
            outs.append(h[i] + multi_att(projections, h[i], keys, vectors))
        h = torch.stack(outs)
    return h


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 5, 6, 23])
def test_it_is_the_papers_two_steps(causal, length):
    mixers, x = stack(causal), tokens(length)
    found = read(mixers, x)
    expected = torch.stack([one_by_one(mixers, text, causal) for text in x])
    torch.testing.assert_close(found, expected, **EXACT)
    leaves = [x, *(p for mixer in mixers for p in mixer.parameters())]
    grads = [
        torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True, materialize_grads=True)
        for y in (found, expected)
    ]
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("chunks", [[1] * 23, [4, 1, 18], [22, 1], [5, 10, 8], [7, 3, 13]])
def test_chunks_compose_within_and_at_the_edges_of_blocks(chunks):
    mixers, x = stack(causal=True), tokens(23)
    states, outs = [mixer.empty_state(2) for mixer in mixers], []
    sizes = [mixer.state_bytes(1, 2) for mixer in mixers]
    for y in x.split(chunks, 1):
        cross_layer = {}
        for index, mixer in enumerate(mixers):
            out, states[index] = mixer(y, states[index], cross_layer)
            y = y + out
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), read(mixers, x), **EXACT)
    assert sizes == [8 * 2 * (4 * WIDTH + HEADS)] * 3


def test_information_goes_one_token_a_layer_and_by_the_relay_after_each_block():
    x = tokens(23)
    mixers = stack(causal=True, layers=2)
    (grad,) = torch.autograd.grad(read(mixers, x)[:, 13].sum(), x)
    reached = [i for i in range(23) if (grad[:, i] != 0).any()]
    # 13 in block 10 .. 14: its two neighbours to the left, and blocks that are complete
    assert reached == [*range(10), 11, 12, 13]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads=5: must divide width=12"),
        ({"block": 0}, "block=0: must be an integer >= 1"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Star(**{"width": WIDTH, "heads": HEADS, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("causal", [True, False])
def test_satellites_may_have_the_papers_norm_after_a_relu(causal):
    torch.manual_seed(0)
    made = {"width": WIDTH, "heads": HEADS, "block": BLOCK, "causal": causal}
    plain, normed = Star(**made).double(), Star(**made, satellite_norm=True).double()
    normed.load_state_dict(
        plain.state_dict() | normed.satellite_norm.state_dict(prefix="satellite_norm.")
    )
    x = tokens(14)
    out = F.relu(plain(x))
    centred = out - out.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normed(x), expected, **EXACT)
