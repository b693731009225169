"""DeltaNet is its paper's layer, token by token."""

import pytest
import torch

from zoo.mixers.deltanet import DeltaNet

WIDTH, HEADS, TOKENS = 16, 2, 43


@pytest.fixture(params=[False, True], ids=["beta to 1", "beta to 2"])
def mixer(request) -> DeltaNet:
    torch.manual_seed(0)
    return DeltaNet(width=WIDTH, heads=HEADS, negative_eigenvalues=request.param).double()


def by_hand(mixer: DeltaNet, x: torch.Tensor) -> torch.Tensor:
    """The published layer on one sequence (t, d), in the paper's orientation: S is (v, k)."""
    projected = x @ mixer.qkv_proj.weight.T
    taps = mixer.conv_weight  # (channels, 4), the last for the token itself
    head, S, rows = WIDTH // HEADS, torch.zeros(HEADS, WIDTH // HEADS, WIDTH // HEADS), []
    S = S.double()
    for t in range(len(x)):
        products = [projected[t - 3 + i] * taps[:, i] for i in range(4) if t - 3 + i >= 0]
        u = sum(products)
        u = u / (1 + torch.exp(-u))
        q, k, v = (part.view(HEADS, head) for part in u.split(WIDTH))
        q, k = (part / part.square().sum(-1, keepdim=True).sqrt() for part in (q, k))
        beta = mixer.largest_beta / (1 + torch.exp(-(mixer.beta_proj.weight @ x[t])))
        outs = []
        for h in range(HEADS):
            old = S[h] @ k[h]
            new = beta[h] * v[h] + (1 - beta[h]) * old  # the paper's reading of the rule
            S = S.clone()
            S[h] = S[h] - torch.outer(old, k[h]) + torch.outer(new, k[h])
            o = S[h] @ q[h]
            outs.append(o / (o.square().mean() + 1e-5).sqrt() * mixer.norm.weight)
        rows.append(mixer.o_proj.weight @ torch.cat(outs))
    return torch.stack(rows)


def test_the_layer_is_the_paper_token_by_token(mixer):
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 2.0)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    wanted = torch.stack([by_hand(mixer, row) for row in x])
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("negative", "after_two"), [(True, 1.0), (False, 0.0)])
def test_with_negative_eigenvalues_a_key_flips_what_it_held_and_back(negative, after_two):
    """The transition along a key is 1 - beta: -1 at most with beta up to 2, 0 with beta up to 1."""
    from zoo.ops.delta_rule import delta_rule

    largest = DeltaNet(width=WIDTH, heads=1, negative_eigenvalues=negative).largest_beta
    key = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    key[..., 0] = 1.0
    start = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    beta = torch.full((1, 3, 1), largest, dtype=torch.float64)
    y, _ = delta_rule(key, key, torch.zeros_like(key), beta, state=start)
    held = y[0, :, 0, 0].tolist()
    assert held == [1 - largest, after_two, after_two * (1 - largest)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_backends_agree(mixer, backend):
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    wanted = mixer(x)
    mixer.backend = backend
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-11, atol=1e-12)


def test_what_is_not_overwritten_stays(mixer):
    """Empty tokens have no key: once the convolution has let go of the last word, S is constant."""
    _, state = mixer(torch.randn(1, 5, WIDTH, dtype=torch.float64), mixer.empty_state(1))
    empty = torch.zeros(1, 203, WIDTH, dtype=torch.float64)
    _, state = mixer(empty[:, :3], state)
    _, after = mixer(empty[:, 3:], state)
    assert state.S.abs().max() > 0.01
    assert torch.equal(after.S, state.S)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3}, "heads=3: must divide width=16"),
        ({"heads": 0}, "heads=0: must be an integer >= 1"),
        ({"heads": 2, "conv_width": 1}, "conv_width=1: must be an integer from 2 to 8"),
        ({"heads": 2, "conv_width": 9}, "conv_width=9: must be an integer from 2 to 8"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeltaNet(width=WIDTH, **arguments)
