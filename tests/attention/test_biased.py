"""Extensions of models without rotation: biases, and masks, of the distances that a remap gives."""

import pytest
import torch

from zoo.attention import biased
from zoo.attention.pattern import distances
from zoo.config.compose import compose
from zoo.model.extend import extend
from zoo.positions.t5 import bucket

REMAPS = ["dca", "streaming_llm", "window", "lm_infinite", "self_extend", "rerope", "leaky_rerope"]
REMAPS += ["pcw", "structured"]
LEAVE_OUT = ["streaming_llm", "window", "lm_infinite", "pcw", "structured"]  # keys, of any model


def by_slope(positions, apart):
    return -torch.tensor(positions.slopes(), dtype=torch.float64)[:, None, None] * apart


def by_bucket(positions, apart):
    table = positions.bias.weight
    found = bucket(
        apart.floor().long(), buckets=len(table), max_distance=positions.bias.max_distance
    )
    return table[found].movedim(-1, 0)


def by_nothing(_positions, apart):
    return torch.zeros_like(apart)


CASES = [(model, name, bias) for model, bias in (("alibi", by_slope), ("t5", by_bucket))
         for name in REMAPS]  # fmt: skip
CASES += [("nope", name, by_nothing) for name in LEAVE_OUT]


@pytest.mark.parametrize(("model", "name", "bias"), CASES)
def test_every_remap_gives_biases_its_distances(model, name, bias, tiny, monkeypatch):
    """softmax(q.k / sqrt(d) + B(M_ij)) over seen keys, each counted as often as it counts."""
    monkeypatch.setattr(biased, "TILE_QUERIES", 7)
    monkeypatch.setattr(biased, "TILE_KEYS", 5)
    small = ["extension.attention.sinks=2"] if name == "lm_infinite" else []
    extension = compose("eval", ["run=x", f"extension={name}", *small]).extension
    mixer = extend(tiny(model), extension, 8).sublayers()[0]
    if model == "t5":
        torch.nn.init.normal_(mixer.positions.bias.weight)
    pattern, t = mixer.positions.pattern, 45
    apart = distances(pattern, t)
    times = torch.ones(t, t).double()
    if name == "structured":
        context = 6 * 4
        times[context:, context:] = 4.0
    x = torch.randn(2, t, mixer.q_proj.in_features, dtype=torch.float64)
    q, k, v = (
        p(x).unflatten(-1, (mixer.heads, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / mixer.head_width**0.5
    scores = scores + bias(mixer.positions, apart.nan_to_num()) + times.log()
    weights = scores.masked_fill(apart.isnan(), -torch.inf).softmax(-1)
    expected = mixer.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-8, atol=1e-9)
    state, outs = mixer.empty_state(2), []
    for piece in x.split([11, 1, 1, 20, 12], 1):
        out, state = mixer(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("model", ["t5", "alibi", "nope"])
def test_gradients_reach_what_a_remap_attends_to(model, tiny):
    extension = compose("eval", ["run=x", "extension=pcw"]).extension
    network = extend(tiny(model), extension, 8).train().requires_grad_(True)
    network.loss(torch.randint(32, (2, 40))).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in network.parameters())


@pytest.mark.parametrize("model", ["learned", "sinusoidal"])
def test_embedded_positions_are_those_of_the_windows(model, tiny):
    """A window is read as if alone, and the task behind the longest of them."""
    extension = compose(
        "eval", ["run=x", "extension=pcw", "extension.attention.windows=2"]
    ).extension
    alone, parallel = tiny(model), extend(tiny(model), extension, 8)
    text = torch.randint(32, (2, 14), generator=torch.Generator().manual_seed(0))
    found = parallel(text)
    for window in (text[:, :6], text[:, 6:12]):
        first = 0 if window is text[:, :6] else 6
        expected = alone(text[:, first : first + 6])
        torch.testing.assert_close(found[:, first : first + 6], expected, rtol=1e-9, atol=1e-10)
    placed = parallel.positions.positions_from(0, 14).tolist()
    assert placed == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7]
    one, state = parallel(text[:, :9], parallel.empty_state(2))
    two, _ = parallel(text[:, 9:], state)
    torch.testing.assert_close(torch.cat([one, two], 1), found, rtol=1e-9, atol=1e-10)
    if model == "learned":
        assert parallel.max_length == 2 * 6 + (alone.max_length - 6)
        with pytest.raises(ValueError, match=f"at most {parallel.max_length} tokens"):
            parallel(torch.zeros(1, parallel.max_length + 1, dtype=torch.int64))
