"""ETC is its four attentions written out, in both forms and through its layers."""

import pytest
import torch

from zoo.mixers.etc import ETC

WIDTH, HEADS, D = 12, 2, 6
WINDOW, BLOCK, LABELS = 9, 5, 3
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def stack(causal: bool, layers: int = 2) -> list[ETC]:
    torch.manual_seed(0)
    options = {"window": WINDOW, "block": BLOCK, "labels": LABELS, "causal": causal}
    mixers = [
        ETC(width=WIDTH, heads=HEADS, layer=layer, layers=layers, **options).double()
        for layer in range(layers)
    ]
    with torch.no_grad():
        for mixer in mixers:
            for table in (mixer.l2l, mixer.g2g, mixer.l2g, mixer.g2l, mixer.first_global):
                table.normal_()
            mixer.global_norm.weight.normal_()
    return mixers


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def read(mixers: list[ETC], x: torch.Tensor) -> torch.Tensor:
    cross_layer = {}
    for mixer in mixers:
        x = x + mixer(x, cross_layer=cross_layer)
    return x


def clipped(apart: int, causal: bool) -> int:
    """The label of a key so many tokens before the query: 0 .. k before, k + 1 .. 2 k after."""
    before = min(apart, LABELS)
    return before if causal or apart >= 0 else LABELS + min(-apart, LABELS)


def attend_one(mixer: ETC, query, keys) -> torch.Tensor:
    """One token's output over a list of (key's input, label vector)."""
    q = (mixer.q_proj.weight @ query).view(HEADS, D)
    inputs = torch.stack([key for key, _ in keys])
    k = (inputs @ mixer.k_proj.weight.T).view(-1, HEADS, D)
    k = k + torch.stack([label for _, label in keys])
    v = (inputs @ mixer.v_proj.weight.T).view(-1, HEADS, D)
    weights = ((q * k).sum(-1) / D**0.5).softmax(0)
    return mixer.o_proj.weight @ (weights[..., None] * v).sum(0).flatten()


def normed(mixer: ETC, g: torch.Tensor) -> torch.Tensor:
    return g * (g.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * mixer.global_norm.weight


def one_by_one(mixers: list[ETC], x: torch.Tensor, causal: bool) -> torch.Tensor:
    """Section 3 of the paper, a token at a time, of one text (t, d)."""
    t = len(x)
    count = t // BLOCK if causal else -(-t // BLOCK)
    g = torch.zeros(count, WIDTH, dtype=x.dtype)
    for mixer in mixers:
        g = g + mixer.first_global
        read, moved = normed(mixer, g), []
        for j in range(count):
            keys = [
                (read[i], mixer.g2g[clipped(j - i, causal)])
                for i in range(count)
                if i <= j or not causal
            ]
            for m in range(t):
                if m // BLOCK == j or not causal:
                    keys.append((x[m], mixer.g2l[0 if m // BLOCK == j else 1]))
            moved.append(g[j] + attend_one(mixer, read[j], keys))
        g = torch.stack(moved) if moved else g
        read, outs = normed(mixer, g), []
        for m in range(t):
            keys = [
                (x[n], mixer.l2l[clipped(m - n, causal)])
                for n in range(t)
                if abs(m - n) <= WINDOW and (n <= m or not causal)
            ]
            for j in range(count):
                if causal and j < m // BLOCK:
                    keys.append((read[j], mixer.l2g[0]))
                elif not causal:
                    keys.append((read[j], mixer.l2g[0 if m // BLOCK == j else 1]))
            outs.append(x[m] + attend_one(mixer, x[m], keys))
        x = torch.stack(outs)
    return x


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 33])
def test_it_is_the_papers_four_attentions(causal, length):
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


@pytest.mark.parametrize("chunks", [[1] * 33, [4, 1, 28], [32, 1], [7, 13, 13]])
def test_chunks_compose_through_layers_that_share_their_globals(chunks):
    mixers, x = stack(causal=True), tokens(33)

    def stream(sizes):
        states, outs = [mixer.empty_state(2) for mixer in mixers], []
        for y in x.split(sizes, 1):
            cross_layer = {}
            for index, mixer in enumerate(mixers):
                out, states[index] = mixer(y, states[index], cross_layer)
                y = y + out
            outs.append(y)
        return torch.cat(outs, 1), states

    (found, states), (expected, after) = stream(chunks), stream([33])
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(states, after, **EXACT)
    torch.testing.assert_close(expected, read(mixers, x), **EXACT)


def test_what_left_the_window_is_seen_through_globals_of_completed_blocks():
    (mixer,) = stack(causal=True, layers=1)
    x = tokens(40)
    (grad,) = torch.autograd.grad(mixer(x)[:, 33].sum(), x)
    assert (grad[:, 0] != 0).any()  # far outside the window, in block 0
    with torch.no_grad():
        x = tokens(12)
        changed = x.clone()
        changed[:, 0] += 1.0
        touched = (mixer(changed) != mixer(x)).any(-1).all(0)
    assert touched.all()  # 0 .. 9 by the window, 10 and 11 by the first block's global
    (grad,) = torch.autograd.grad(mixer(tokens(34))[:, 9].sum(), list(mixer.parameters())[:1])
    assert grad.isfinite().all()


@pytest.mark.parametrize("window", [3, 16, 21])
def test_a_carried_state_of_any_window_goes_on(window):
    mixer = stack(causal=True, layers=1)[0]
    _, state = mixer(tokens(18), mixer.empty_state(2))
    state = mixer.truncate_state(state, window)
    assert state.k.shape[1] == min(window, WINDOW)
    assert state.globals_out[0].shape[1] == min(window // BLOCK, 18 // BLOCK)
    y, state = mixer(tokens(9), state)
    assert y.isfinite().all()
    assert state.tokens_seen == 27


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads=5: must divide width=12"),
        ({"labels": 1}, "labels=1: must be an integer >= 2"),
        ({"labels": 90}, "labels=90: must be at most window=84"),
        ({"block": 0}, "block=0: must be an integer >= 1"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ETC(**{"width": WIDTH, "heads": HEADS, **options})
    assert "\n" not in str(error.value)
