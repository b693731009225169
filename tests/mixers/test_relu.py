"""ReLU attention is its formula, and chunks compose, in every variant."""

import math

import pytest
import torch
from building import train_config

from zoo.mixers.base import AUXILIARY
from zoo.mixers.relu import EPS, ReLUAttention
from zoo.model.build import build_model
from zoo.ops import kernel_attention
from zoo.positions.alibi import ALiBi, slopes
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope, apply_rope, inverse_frequencies
from zoo.positions.t5 import T5

WIDTH, HEADS, D = 16, 4, 4
VARIANTS = [
    {"kernel": kernel, "normalise": normalise, "positions": positions, "gated": gated}
    for kernel in ("relu", "squared_relu")
    for normalise, gated in (
        ("length", False),
        ("sum", False),
        ("rms", False),
        ("rms", True),
        ("root", False),
    )
    for positions in (Rope, ALiBi, NoPositions)
]


def name(variant: dict) -> str:
    return "-".join(getattr(value, "__name__", str(value)) for value in variant.values())


def build(**options) -> ReLUAttention:
    torch.manual_seed(0)
    mixer = ReLUAttention(width=WIDTH, heads=HEADS, **options).double()
    if mixer.gate is not None:
        torch.nn.init.normal_(mixer.gate)
    if mixer.norm is not None:
        torch.nn.init.normal_(mixer.norm.weight)
    return mixer


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=generator)


def dense(mixer: ReLUAttention, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """The papers' formulas, query by query and head by head."""
    return with_weights(mixer, x, causal)[0]


def with_weights(mixer: ReLUAttention, x: torch.Tensor, causal: bool):
    """The same, and each query's weights, (b, keys), one after another."""
    every = []
    q, k, v = (
        (x @ p.weight.T).unflatten(-1, (HEADS, D))
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    if isinstance(mixer.positions, Rope):
        q, k = (apply_rope(y, inverse_frequencies(D)) for y in (q, k))
    rows = []
    for t in range(x.shape[1]):
        visible = t + 1 if causal else x.shape[1]
        heads = []
        for h in range(HEADS):
            scores = (k[:, :visible, h] @ q[:, t, h, :, None]).squeeze(-1) / math.sqrt(D)
            if isinstance(mixer.positions, ALiBi):
                scores = scores - slopes(HEADS)[h] * (t - torch.arange(visible))
            weights = torch.where(scores > 0, scores, 0)
            weights = weights**2 if mixer.kernel == "squared_relu" else weights
            if mixer.normalise == "length":
                weights = weights / visible**mixer.alpha
            if mixer.normalise == "root":
                weights = weights / math.sqrt(visible / 2)
            if mixer.normalise == "sum":
                weights = weights / weights.sum(-1, keepdim=True).clamp(min=EPS)
            every.append(weights)
            heads.append((weights[..., None] * v[:, :visible, h]).sum(1))
        rows.append(torch.cat(heads, -1))
    o = torch.stack(rows, 1)
    if mixer.normalise == "rms":
        raw = o
        o = raw / (raw.square().mean(-1, keepdim=True) + EPS).sqrt() * mixer.norm.weight
        if mixer.gate is not None:
            o = o / (1 + torch.exp(-mixer.gate * raw))
    return o @ mixer.o_proj.weight.T, every


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_it_is_the_formula_of_the_papers(variant):
    mixer, x = build(**variant), tokens(19)
    torch.testing.assert_close(mixer(x), dense(mixer, x, causal=True), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v["positions"] is not ALiBi], ids=name)
def test_the_bidirectional_form_is_the_formula_of_the_papers(variant):
    mixer, x = build(**variant, causal=False), tokens(19)
    torch.testing.assert_close(mixer(x), dense(mixer, x, causal=False), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_weights_are_divided_by_a_power_of_the_visible_keys(alpha):
    mixer, x = build(alpha=alpha), tokens(19)
    torch.testing.assert_close(mixer(x), dense(mixer, x, causal=True), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kernel", ["relu", "squared_relu"])
@pytest.mark.parametrize("positions", [Rope, ALiBi, NoPositions])
@pytest.mark.parametrize("length", [1, 19])
def test_the_losses_in_training_are_those_of_the_weights(kernel, positions, length, monkeypatch):
    monkeypatch.setattr(kernel_attention, "TILE", 7)
    given = {"kernel": kernel, "positions": positions, "normalise": "root"}
    margin, x = 0.9, tokens(length)
    losses = {"norm_loss": 0.3, "entropy_loss": 0.2, "entropy_margin": margin}
    mixer = build(**given, **losses).train()
    _, every = with_weights(mixer, x, causal=True)
    norm, excess = [], []
    for weights in every:  # of one query and head each, of every text
        total = weights.sum(-1)
        p = weights / total[:, None].clamp(min=EPS)
        norm.append(torch.log(total.clamp(min=EPS)).abs())
        entropy = -(p * torch.where(p > 0, p, 1).log()).sum(-1)
        excess.append((entropy - margin).clamp(min=0))
    assert length == 1 or max(map(torch.max, excess)) > 0
    expected = 0.3 * torch.stack(norm).mean() + 0.2 * torch.stack(excess).mean()
    cross_layer = {}
    out = mixer(x, cross_layer=cross_layer)
    torch.testing.assert_close(cross_layer[AUXILIARY], expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out, build(**given)(x), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(cross_layer[AUXILIARY], mixer.q_proj.weight)[0]
    naive = torch.autograd.grad(expected, mixer.q_proj.weight)[0]
    torch.testing.assert_close(found, naive, rtol=1e-8, atol=1e-10)
    cross_layer = {}
    mixer.eval()(x, cross_layer=cross_layer)
    assert cross_layer == {}  # a measurement has the likelihood alone


def test_a_step_of_training_adds_every_layers_losses_to_the_likelihood():
    losses = ["model.mixer.normalise=root", "model.mixer.norm_loss=0.5"]
    losses += ["model.mixer.entropy_loss=0.1", "model.mixer.entropy_margin=0.2"]
    config = train_config("model=relu", "size=tiny", "match=none", "seq_len=32", *losses)
    torch.manual_seed(0)
    model = build_model(config, 32)[0].double()
    text = torch.randint(32, (2, 33))
    likelihood = model.eval().loss(text)
    found = {}
    for checkpointed in (False, True):
        model.checkpoint_activations = checkpointed
        loss = model.train().loss(text)
        added, x = 0.0, model.embedding(text[:, :-1])
        for block in model.blocks:
            cross_layer = {}
            x = block(x, None, cross_layer)
            added += cross_layer[AUXILIARY]
        torch.testing.assert_close(loss, likelihood + added, rtol=1e-10, atol=1e-12)
        grads = torch.autograd.grad(loss, [*model.parameters()])
        found[checkpointed] = grads
    torch.testing.assert_close(found[False], found[True], rtol=1e-10, atol=1e-12)
    assert model.labels_loss(text, text) > model.eval().labels_loss(text, text)
    nll = model.labels_loss(text, text).item()
    whole, weighed = (model.train().labels_loss(text, text, weight=w).item() for w in (1.0, 0.5))
    assert weighed - nll / 2 == pytest.approx(whole - nll, rel=1e-4)  # what layers add stays


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_any_chunking_gives_the_whole(variant):
    mixer, x = build(**variant), tokens(23)
    whole, final = mixer(x, mixer.empty_state(2))
    for sizes in ([1] * 23, [1, 22], [22, 1], [5, 3, 15]):
        state, outs = mixer.empty_state(2), []
        for chunk in x.split(sizes, 1):
            y, state = mixer(chunk, state)
            outs.append(y)
        torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(tuple(state), tuple(final), rtol=1e-9, atol=1e-10)


def test_a_query_that_likes_no_key_reads_nothing():
    mixer = build(positions=NoPositions)
    with torch.no_grad():
        mixer.q_proj.weight.copy_(-mixer.k_proj.weight)  # every score of equal tokens is negative
    x = tokens(1).expand(-1, 9, -1)
    assert (mixer(x) == 0).all()
    assert not (build(positions=NoPositions)(x) == 0).all()


def test_a_linear_bias_hides_keys_whose_score_is_below_the_slope_times_the_distance():
    mixer, x = build(positions=ALiBi), tokens(9)
    other = torch.cat([tokens(8), x[:, 8:]], 1)
    assert not torch.allclose(mixer(other)[:, -1], mixer(x)[:, -1])
    with torch.no_grad():
        mixer.q_proj.weight.mul_(1e-5)  # now every score is below the least slope
    torch.testing.assert_close(mixer(other)[:, -1], mixer(x)[:, -1], rtol=0, atol=0)
    assert (mixer(x)[:, -1] != 0).any()


def test_after_a_window_is_carried_queries_divide_by_the_keys_that_are_left():
    mixer, x = build(positions=NoPositions), tokens(12)
    _, state = mixer(x[:, :8], mixer.empty_state(2))
    y, _ = mixer(x[:, 8:], mixer.truncate_state(state, 4))
    torch.testing.assert_close(y, mixer(x[:, 4:])[:, 4:], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 3}, "heads=3: must divide width=16"),
        ({"kernel": "gelu"}, "kernel=gelu: must be relu or squared_relu. Did you mean 'relu'"),
        ({"normalise": "softmax"}, "normalise=softmax: must be length, sum, rms or root"),
        ({"gated": True}, "gated=true: acts with normalise=rms, here it is length"),
        ({"norm_loss": 0.1}, "norm_loss=0.1: acts with normalise=root, here it is length"),
        ({"entropy_loss": 0.1}, "entropy_loss=0.1: acts with normalise=root"),
        ({"entropy_loss": 1.0, "normalise": "root"}, "entropy_margin=null: must be given with"),
        ({"entropy_margin": 1.0}, "entropy_margin=1: must be given with entropy_loss above 0"),
        ({"positions": ALiBi, "causal": False}, "causal attention alone"),
        ({"positions": T5}, "positions=t5: must be rope, alibi or none"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(options, said):
    with pytest.raises(ValueError, match=said):
        ReLUAttention(**{"width": WIDTH, "heads": HEADS, **options})
