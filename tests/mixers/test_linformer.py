"""Linformer is its paper's formula both ways; the causal form keeps compressed blocks apart."""

import math

import pytest
import torch

from zoo.mixers.linformer import Linformer
from zoo.positions.alibi import ALiBi, slopes
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope, apply_rope, inverse_frequencies

WIDTH, HEADS, D = 16, 4, 4
BLOCK, SLOTS = 6, 2
LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]


def build(**options) -> Linformer:
    torch.manual_seed(0)
    place = {"width": WIDTH, "heads": HEADS, "block": BLOCK, "slots": SLOTS}
    return Linformer(**{**place, **options}).double()


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=generator)


def projections(mixer: Linformer, x: torch.Tensor):
    return (
        (x @ p.weight.T).unflatten(-1, (HEADS, D))
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )


def softmax_rows(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(b, keys) scores and (b, keys, d) values of one query and head."""
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights[..., None] * values).sum(1) / weights.sum(-1, keepdim=True)


def causal_formula(mixer: Linformer, x: torch.Tensor) -> torch.Tensor:
    """Query by query: the slots of completed blocks before its own, and its own block exactly."""
    q, k, v = projections(mixer, x)
    theta = inverse_frequencies(D)
    rows = []
    for t in range(x.shape[1]):
        j, heads = t // BLOCK, []
        own = slice(j * BLOCK, t + 1)
        for h in range(HEADS):
            E, F = (P[h % len(P)] for P in (mixer.E, mixer.F))
            scores, values = [], []
            for b in range(j):
                block = slice(b * BLOCK, (b + 1) * BLOCK)
                slot = torch.einsum("rn,bnd->brd", E, k[:, block, h])
                score = (slot @ q[:, t, h, :, None]).squeeze(-1) / math.sqrt(D)
                bias = slopes(HEADS)[h] * (j - b) if isinstance(mixer.positions, Rope) else 0
                scores.append(score - bias)
                values.append(torch.einsum("rn,bnd->brd", F, v[:, block, h]))
            query, keys = q[:, t : t + 1, h : h + 1], k[:, own, h : h + 1]
            if isinstance(mixer.positions, Rope):  # at their places in the text
                query, keys = apply_rope(query, theta, t), apply_rope(keys, theta, own.start)
            scores.append((query[:, :, 0] @ keys[:, :, 0].mT).squeeze(1) / math.sqrt(D))
            values.append(v[:, own, h])
            heads.append(softmax_rows(torch.cat(scores, 1), torch.cat(values, 1)))
        rows.append(torch.cat(heads, -1))
    return torch.stack(rows, 1) @ mixer.o_proj.weight.T


@pytest.fixture(params=[1, 2, 512])
def segment(request, monkeypatch):
    """Blocks whose queries read the slots together, so that slots end inside of a segment too."""
    monkeypatch.setattr("zoo.mixers.linformer.SEGMENT", request.param * BLOCK)


@pytest.mark.usefixtures("segment")
@pytest.mark.parametrize("sharing", ["none", "headwise", "kv"])
@pytest.mark.parametrize("positions", [Rope, NoPositions])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_causal_form_is_one_softmax_over_slots_and_own_block(sharing, positions, length):
    mixer = build(sharing=sharing, positions=positions)
    x = tokens(length)
    torch.testing.assert_close(mixer(x), causal_formula(mixer, x), rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("segment")
@pytest.mark.parametrize("sizes", [[1] * 23, [1, 22], [22, 1], [5, 1, 8, 9], [12, 11]])
def test_any_chunking_gives_the_whole(sizes):
    mixer, x = build(), tokens(23)
    whole, final = mixer(x, mixer.empty_state(2))
    state, outs = mixer.empty_state(2), []
    for chunk in x.split(sizes, 1):
        y, state = mixer(chunk, state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(tuple(state), tuple(final), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sharing", ["none", "headwise", "kv"])
@pytest.mark.parametrize("length", [1, 7, 20])
def test_the_bidirectional_form_is_the_paper_equation_7(sharing, length):
    mixer = build(sharing=sharing, causal=False, max_length=20, rank=5)
    x = tokens(length)
    q, k, v = projections(mixer, x)
    heads = []
    for h in range(HEADS):
        E, F = (P[h % len(P), :, :length] for P in (mixer.E, mixer.F))
        scores = torch.einsum("bid,bjd->bij", q[:, :, h], E @ k[:, :, h]) / math.sqrt(D)
        heads.append(torch.softmax(scores, -1) @ (F @ v[:, :, h]))
    expected = torch.cat(heads, -1) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-10)


def test_the_bidirectional_form_refuses_more_than_its_length():
    with pytest.raises(ValueError, match="at most 20 tokens and was given 21"):
        build(causal=False, max_length=20, rank=5)(tokens(21))


def test_sharing_is_what_it_says():
    count = {name: len(list(build(sharing=name).parameters())) for name in ("headwise", "kv")}
    assert count == {"headwise": 6, "kv": 5}
    assert build(sharing="none").E.shape == (HEADS, SLOTS, BLOCK)
    assert build(sharing="headwise").E.shape == (1, SLOTS, BLOCK)


def test_slots_have_the_variance_of_keys_however_long_a_block():
    torch.manual_seed(0)
    for block in (32, 512):
        E = Linformer(width=WIDTH, heads=HEADS, block=block, slots=32).E
        assert 0.8 < (E @ torch.randn(block, 64)).var() < 1.2


def test_after_a_window_is_carried_the_last_slots_and_the_block_being_read_are_left():
    mixer, x = build(positions=Rope), tokens(5 * BLOCK + 3)
    _, state = mixer(x[:, : 4 * BLOCK + 2], mixer.empty_state(2))
    carried = mixer.truncate_state(
        state, 3 * BLOCK
    )  # has room for two blocks' slots beside two keys
    assert carried.slot_k.shape[1] == 2 * SLOTS
    assert carried.k.shape[1] == 2
    assert carried.tokens_seen == 4 * BLOCK + 2
    y, after = mixer(x[:, 4 * BLOCK + 2 :], carried)
    expected = causal_formula(mixer, x[:, 2 * BLOCK :])[:, 2 * BLOCK + 2 :]
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    assert after.slot_k.shape[1] == 3 * SLOTS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 3}, "heads=3: must divide width=16"),
        ({"block": 0}, "block=0: must be an integer >= 1"),
        ({"slots": 7}, "slots=7: must be at most block=6"),
        ({"causal": False, "rank": 9, "max_length": 8}, "rank=9: must be at most max_length=8"),
        ({"sharing": "layerwise"}, "sharing=layerwise: must be none, headwise or kv"),
        ({"sharing": "all"}, "sharing=all: must be none, headwise or kv"),
        ({"positions": ALiBi}, "positions=alibi: must be rope or none"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
