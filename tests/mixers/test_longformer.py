"""Longformer is masked attention with its paper's pattern, in both forms."""

import pytest
import torch

from zoo.mixers.longformer import Longformer
from zoo.positions.alibi import ALiBi
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope

WIDTH, HEADS, D = 16, 4, 4
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def build(**options) -> Longformer:
    torch.manual_seed(0)
    return Longformer(width=WIDTH, heads=HEADS, **options).double()


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def heads(mixer: Longformer, proj, x: torch.Tensor, turn: bool = True) -> torch.Tensor:
    y = (x @ proj.weight.T).unflatten(-1, (HEADS, D))
    return mixer.positions.rotate(y, 0) if turn else y


def softmax_over(q, k, v, mask):
    """(b, i, h, d) queries over keys where mask (h, i, j) is True."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def dense(mixer: Longformer, x: torch.Tensor, window: int, dilations: list[int]) -> torch.Tensor:
    """The pattern as one (h, t, t) mask; then the rows of global tokens anew."""
    t, g = x.shape[1], mixer.global_tokens
    apart = torch.arange(t)[:, None] - torch.arange(t)
    first, last = (0, window) if mixer.causal else (-window // 2, window // 2)
    mask = torch.stack(
        [(apart >= first * r) & (apart <= last * r) & (apart % r == 0) for r in dilations]
    )
    before = apart >= 0 if mixer.causal else torch.ones_like(apart, dtype=torch.bool)
    mask[:, :, :g] |= before[:, :g]
    q, k = heads(mixer, mixer.q_proj, x), heads(mixer, mixer.k_proj, x)
    out = softmax_over(q, k, heads(mixer, mixer.v_proj, x, turn=False), mask)
    if g:
        q, k = heads(mixer, mixer.q_global, x), heads(mixer, mixer.k_global, x)
        whole = softmax_over(q, k, heads(mixer, mixer.v_global, x, turn=False), before[None])
        out = torch.cat([whole[:, :g], out[:, g:]], 1)
    return out.flatten(-2) @ mixer.o_proj.weight.T


@pytest.mark.parametrize("positions", [Rope, NoPositions])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("global_tokens", [0, 3])
@pytest.mark.parametrize("dilation", [1, 2, [1, 3, 1, 2]])
def test_it_is_attention_under_the_papers_mask(positions, causal, global_tokens, dilation):
    mixer = build(
        window=10, dilation=dilation, global_tokens=global_tokens, positions=positions,
        causal=causal,
    )  # fmt: skip
    if global_tokens:
        with torch.no_grad():  # apart from what they were copied from
            for proj in (mixer.q_global, mixer.k_global, mixer.v_global):
                proj.weight += torch.randn_like(proj.weight)
    dilations = [dilation] * HEADS if isinstance(dilation, int) else dilation
    for length in (1, 2, 12, 57):
        x = tokens(length)
        found, expected = mixer(x), dense(mixer, x, 10, dilations)
        torch.testing.assert_close(found, expected, **EXACT)
    leaves = [x, *mixer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), leaves),
        torch.autograd.grad(expected.sin().sum(), leaves),
        **EXACT,
    )


@pytest.mark.parametrize("chunks", [[1] * 40, [2, 1, 37], [39, 1], [7, 20, 13]])
@pytest.mark.parametrize("dilation", [1, [1, 3, 1, 2]])
def test_chunks_compose_with_global_tokens_and_dilations(chunks, dilation):
    mixer = build(window=6, dilation=dilation, global_tokens=4)
    x, state, outs = tokens(40), mixer.empty_state(2), []
    for chunk in x.split(chunks, 1):
        y, state = mixer(chunk, state)
        outs.append(y)
    whole, expected = mixer(x, mixer.empty_state(2))
    torch.testing.assert_close(torch.cat(outs, 1), whole, **EXACT)
    torch.testing.assert_close(state, expected, **EXACT)
    assert state.k.shape[1] == min(40, 6 * (3 if dilation != 1 else 1))


def test_global_tokens_do_not_see_the_future_causally():
    mixer, x = build(window=4, global_tokens=5), tokens(30)
    for cut in (1, 3, 5, 12):
        (grad,) = torch.autograd.grad(mixer(x)[:, :cut].sin().sum(), x)
        assert (grad[:, cut:] == 0).all()
        assert (grad[:, 0] != 0).any()


def test_global_tokens_carry_across_any_distance():
    x = tokens(60)
    for mixer, reaches in ((build(window=4, global_tokens=2), True), (build(window=4), False)):
        (grad,) = torch.autograd.grad(mixer(x)[:, -1].sum(), x)
        assert (grad[:, 0] != 0).any() == reaches
        assert (grad[:, 30] == 0).all()


def test_it_is_the_encoder_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = transformers.LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[8], num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = LongformerSelfAttention(config, layer_id=0).double().eval()
    mixer = build(window=8, global_tokens=3, positions=NoPositions, causal=False)
    with torch.no_grad():
        pairs = {
            "query": "q_proj", "key": "k_proj", "value": "v_proj",
            "query_global": "q_global", "key_global": "k_global", "value_global": "v_global",
        }  # fmt: skip
        for name, own in pairs.items():
            getattr(theirs, name).bias.zero_()
            getattr(theirs, name).weight.normal_(std=0.3)
            getattr(mixer, own).weight.copy_(getattr(theirs, name).weight)
        mixer.o_proj.weight.copy_(torch.eye(WIDTH))
    x = tokens(40).detach()
    marked = torch.zeros(2, 40, dtype=torch.bool)
    marked[:, :3] = True
    expected = theirs(
        x,
        attention_mask=torch.where(marked, 10000.0, 0.0).double(),
        is_index_masked=torch.zeros(2, 40, dtype=torch.bool),
        is_index_global_attn=marked,
        is_global_attn=True,
    )[0]
    torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-6)  # their softmax: float32


def test_global_projections_begin_as_copies_of_the_local_ones():
    mixer = build(global_tokens=2)
    for own, copy in (("q_proj", "q_global"), ("k_proj", "k_global"), ("v_proj", "v_global")):
        assert torch.equal(getattr(mixer, own).weight, getattr(mixer, copy).weight)


def test_windows_are_spread_over_the_layers_and_dilation_keeps_to_the_upper_half():
    def stack(layers: int, window) -> list[Longformer]:
        return [
            build(window=window, dilation=2, layer=layer, layers=layers) for layer in range(layers)
        ]

    assert [m.window for m in stack(4, [2, 4, 6, 8])] == [2, 4, 6, 8]
    assert [m.window for m in stack(2, [2, 4, 6, 8])] == [2, 6]
    assert [m.window for m in stack(3, 5)] == [5, 5, 5]
    assert [m.window for m in stack(6, [2, 4])] == [2, 2, 2, 4, 4, 4]
    assert [m.dilations[0] for m in stack(4, 5)] == [1, 1, 2, 2]
    assert [m.dilations[0] for m in stack(1, 5)] == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads=3: must divide width=16"),
        ({"window": 0}, "window=0: must be an integer >= 1"),
        ({"window": []}, r"window=\[\]: must be one or more"),
        ({"window": 7, "causal": False}, "window=7: .*even numbers"),
        ({"dilation": [1, 2]}, r"dilation=\[1, 2\]: .* 4 heads"),
        ({"dilation": 0}, "dilation=0: must be an integer >= 1"),
        ({"global_tokens": -1}, "global_tokens=-1: must be an integer >= 0"),
        ({"global_tokens": 1}, "global_tokens=1: .* itself alone"),
        ({"positions": ALiBi}, "positions=alibi: must be rope or none"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Longformer(**{"width": WIDTH, "heads": HEADS, **options})
    assert "\n" not in str(error.value)
