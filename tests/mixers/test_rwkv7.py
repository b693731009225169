"""RWKV-7 is its paper's layers, token by token, and its layers share the first one's values."""

import math

import numpy as np
import pytest
import torch

from zoo.mixers.rwkv7 import RWKV7, LowRankMap, RWKV7ChannelMixing
from zoo.model.backbone import Backbone

WIDTH, HEADS, LAYERS, TOKENS = 16, 2, 3, 43
HEAD = WIDTH // HEADS


@pytest.fixture
def layers() -> list[RWKV7]:
    """With every parameter moved from where it starts, so that none could be left out."""
    torch.manual_seed(0)
    made = [RWKV7(width=WIDTH, heads=HEADS, layer=i, layers=LAYERS).double() for i in range(LAYERS)]
    with torch.no_grad():
        for parameter in (p for layer in made for p in layer.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(layer: RWKV7, x: np.ndarray, first: list | None) -> tuple[np.ndarray, list]:
    """The published layer on one sequence (t, d), and its values before the lerp, token by token.

    S is (v, k) per head; `first` holds the first layer's values.
    """
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}

    def low_rank(name, x, f):
        return p[f"{name}.up.weight"] @ f(p[f"{name}.down.weight"] @ x)

    S, last, outs, values = np.zeros((HEADS, HEAD, HEAD)), np.zeros(WIDTH), [], []
    for t, token in enumerate(x):
        r_in, w_in, k_in, v_in, a_in, g_in = (
            mu * last + (1 - mu) * token for mu in p["mu"]
        )  # fmt: skip
        r, k, v = (
            p["r_proj.weight"] @ r_in, p["k_proj.weight"] @ k_in, p["v_proj.weight"] @ v_in
        )  # fmt: skip
        d = p["w_0"] + low_rank("w_map", w_in, np.tanh)
        w = np.exp(-np.exp(-0.5) * sigmoid(d))
        a = sigmoid(p["a_0"] + low_rank("a_map", a_in, lambda y: y))
        g = low_rank("g_map", g_in, sigmoid)
        values.append(v)
        if first is not None:
            nu = sigmoid(p["v_0"] + low_rank("v_map", v_in, lambda y: y))
            v = (1 - nu) * v + nu * first[t]
        kappa = k * p["k_k"]
        key = k * (1 - p["k_a"] + a * p["k_a"])
        o = np.zeros(WIDTH)
        for h in range(HEADS):
            s = slice(h * HEAD, (h + 1) * HEAD)
            hat = kappa[s] / np.linalg.norm(kappa[s])
            transition = np.diag(w[s]) - np.outer(hat, a[s] * hat)
            S[h] = S[h] @ transition + np.outer(v[s], key[s])
            y = S[h] @ r[s]
            y = (y - y.mean()) / np.sqrt(y.var() + 64e-5)
            y = y * p["norm.weight"][s] + p["norm.bias"][s]
            o[s] = y + (r[s] * key[s] * p["r_k"][h]).sum() * v[s]
        outs.append(p["o_proj.weight"] @ (g * o))
        last = token
    return np.stack(outs), values


def test_the_layers_are_the_paper_token_by_token(layers):
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    cross_layer = {}
    first: list = [None, None]
    for index, layer in enumerate(layers):
        wanted = []
        for row in range(2):
            y, values = by_hand(layer, x[row].numpy(), first[row])
            wanted.append(y)
            if index == 0:
                first[row] = values
        found = layer(x, cross_layer=cross_layer)
        torch.testing.assert_close(
            found, torch.from_numpy(np.stack(wanted)), rtol=1e-10, atol=1e-11
        )


def test_layers_above_the_first_read_its_values_and_send_gradients_back(layers):
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64)
    cross_layer = {}
    layers[0](x, cross_layer=cross_layer)
    written = cross_layer["first_values"]
    y = layers[2](x, cross_layer=cross_layer)
    assert cross_layer["first_values"] is written
    gradients = torch.autograd.grad(y.sum(), [written, layers[2].v_0])
    assert all(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("cross_layer", [None, {}])
def test_a_layer_that_is_alone_keeps_its_own_values(layers, cross_layer):
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64)
    y = layers[1](x, cross_layer=cross_layer)
    wanted, _ = by_hand(layers[1], x[0].numpy(), None)
    torch.testing.assert_close(y[0], torch.from_numpy(wanted), rtol=1e-10, atol=1e-11)
    gradient, *rest = torch.autograd.grad(y.sum(), [layers[1].v_0, *layers[1].v_map.parameters()])
    assert gradient.eq(0).all()  # they change nothing, and say so
    assert all(g.eq(0).all() for g in rest)


@pytest.mark.parametrize("first", [RWKV7, "other"])
def test_recomputed_activations_give_the_same_gradients(first):
    """Also where the first layer of this kind is above one of another kind."""

    def build(checkpoint):
        torch.manual_seed(0)
        kinds = [
            lambda **place: RWKV7(heads=HEADS, **place),
            lambda **place: RWKV7ChannelMixing(**place),
        ]
        return Backbone(
            vocab_size=11,
            width=WIDTH,
            layers=4,
            mixers=kinds[:1] if first is RWKV7 else kinds[::-1],
            feed_forwards=[None],
            checkpoint_activations=checkpoint,
        ).double()

    tokens = torch.randint(11, (2, 20))
    plain, recomputed = build(False), build(True)
    losses = [model.loss(tokens) for model in (plain, recomputed)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-13, msg=name)


def test_decays_stay_above_the_papers_bound(layers):
    """exp(-exp(-1/2)) = 0.545, whatever comes in."""
    floor = math.exp(-math.exp(-0.5))
    assert round(floor, 3) == 0.545
    layer = layers[0]
    with torch.no_grad():
        layer.w_0.fill_(1e3)  # the strongest decay
        layer.v_proj.weight.zero_()  # nothing is written
        layer.a_0.fill_(-1e3)  # nothing is erased
        layer.a_map.up.weight.zero_()
    state = layer.empty_state(1)
    state = state._replace(S=torch.ones_like(state.S))
    _, state = layer(torch.randn(1, 1, WIDTH, dtype=torch.float64), state)
    torch.testing.assert_close(state.S, torch.full_like(state.S, floor))


@pytest.mark.parametrize(
    ("width", "ranks"),
    [(64, (16, 16, 40)), (128, (32, 16, 56)), (768, (64, 32, 128)), (2048, (128, 64, 224))],
)
def test_ranks_are_published_from_width_512_and_smaller_below(width, ranks):
    found = tuple(len(LowRankMap(width, factor).down.weight) for factor in (2.5, 1.7, 5.0))
    assert found == ranks


def test_channel_mixing_is_the_paper():
    torch.manual_seed(0)
    layer = RWKV7ChannelMixing(width=WIDTH, hidden_width=24, layer=1, layers=3).double()
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    mu, last, wanted = layer.mu, torch.zeros(2, WIDTH).double(), []
    np.testing.assert_allclose(
        mu.detach(), 1 - (np.arange(WIDTH) / WIDTH) ** (2 / 3) ** 4, atol=1e-6
    )
    for token in x.unbind(1):
        hidden = (mu * last + (1 - mu) * token) @ layer.k_proj.weight.T
        wanted.append((hidden.clamp(min=0) ** 2) @ layer.v_proj.weight.T)
        last = token
    torch.testing.assert_close(layer(x), torch.stack(wanted, 1), rtol=1e-12, atol=1e-13)


def test_heads_that_do_not_divide_the_width_are_refused():
    for heads in (0, 3):
        with pytest.raises(ValueError, match=f"heads={heads}: must "):
            RWKV7(width=WIDTH, heads=heads)
