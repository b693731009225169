"""LongNet is a softmax in which each key counts as often as branches see it."""

import pytest
import torch

from zoo.mixers.longnet import LongNet
from zoo.positions.alibi import ALiBi
from zoo.positions.rope import apply_rope, inverse_frequencies

WIDTH, HEADS, D = 18, 3, 6
EXACT = {"rtol": 1e-9, "atol": 1e-10}
BRANCHES = [
    ([8], [1]),
    ([4, 8, 32], [1, 2, 4]),
    ([6, 24], [1, 6]),  # more offsets than heads
    ([8, 8, 16], [1, 1, 2]),  # a branch twice
    ([4, 64], [1, 2]),
]


def build(branches, **options) -> LongNet:
    torch.manual_seed(0)
    segments, dilations = branches
    return LongNet(
        width=WIDTH, heads=HEADS, segments=segments, dilations=dilations, **options
    ).double()


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def counts(branches, t: int) -> torch.Tensor:
    """How many branches let query i of head h see key j, one by one."""
    found = torch.zeros(HEADS, t, t, dtype=torch.float64)
    for w, r in zip(*branches, strict=True):
        for h in range(HEADS):
            for i in range(h % r, t, r):
                for j in range(i // w * w, i + 1):
                    found[h, i, j] += j % r == h % r
    return found


def dense(mixer: LongNet, x: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        (x @ p.weight.T).unflatten(-1, (HEADS, D))
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    q, k = (apply_rope(x, inverse_frequencies(q.shape[-1])) for x in (q, k))
    weights = pairs * torch.exp(torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5)
    out = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
    return out.flatten(-2) @ mixer.o_proj.weight.T


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 71])
def test_it_is_a_softmax_over_the_branches_keys(branches, dedup, length):
    mixer, x = build(branches, dedup=dedup), tokens(length)
    pairs = counts(branches, length)
    found = mixer(x)
    expected = dense(mixer, x, (pairs > 0).double() if dedup else pairs)
    torch.testing.assert_close(found, expected, **EXACT)
    leaves = [x, *mixer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), leaves),
        torch.autograd.grad(expected.sin().sum(), leaves),
        **EXACT,
    )


def test_without_overlap_counting_once_changes_nothing_and_with_it_it_does():
    x = tokens(40)
    for branches, same in ((BRANCHES[0], True), (BRANCHES[1], False)):
        often, once = build(branches), build(branches, dedup=True)
        assert torch.allclose(often(x), once(x), rtol=1e-10) == same


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("chunks", [[1] * 75, [3, 1, 12, 59], [74, 1], [31, 2, 42]])
def test_chunks_compose_across_the_segments(branches, dedup, chunks):
    mixer, x, outs = build(branches, dedup=dedup), tokens(75), []
    state = mixer.empty_state(2)
    for chunk in x.split(chunks, 1):
        y, state = mixer(chunk, state)
        outs.append(y)
    whole, expected = mixer(x, mixer.empty_state(2))
    torch.testing.assert_close(torch.cat(outs, 1), whole, **EXACT)
    torch.testing.assert_close(state, expected, **EXACT)
    held = sum(kv.numel() for kv in state.branches)
    assert held * 8 == mixer.state_bytes(75, 2)
    most = sum(w // r for w, r in zip(*branches, strict=True))
    assert mixer.state_bytes(10**6) == 8 * 2 * WIDTH * most


def test_nothing_passes_the_longest_segment():
    mixer, x = build(BRANCHES[1]), tokens(70)
    (grad,) = torch.autograd.grad(mixer(x)[:, 40].sum(), x)
    assert (grad[:, :32] == 0).all()
    assert (grad[:, 32] != 0).any()


def test_a_branch_takes_only_its_own_positions():
    """Head 0 of dilation 4 takes 0, 4, 8, ..: only such queries see beyond the short segment."""
    mixer, x = build(([4, 32], [1, 4])), tokens(32)
    for query, beyond in ((28, True), (31, False)):  # 31 mod 4 = 3, and there are three heads
        (grad,) = torch.autograd.grad(mixer(x)[:, query].sum(), x)
        assert (grad[:, :28] != 0).any() == beyond


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, "heads=4: must divide width=18"),
        ({"segments": [8], "dilations": [1, 2]}, "must be as many as dilations"),
        ({"segments": [], "dilations": []}, "at least one"),
        ({"segments": [0], "dilations": [1]}, "a list, each an integer >= 1"),
        ({"segments": [8, 16], "dilations": [2, 4]}, "must begin with 1"),
        ({"segments": [8, 12], "dilations": [1, 2]}, "must each divide the next one"),
        ({"segments": [8, 16, 48], "dilations": [1, 2, 3]}, "must each divide the next one"),
        ({"segments": [2, 8], "dilations": [1, 4]}, "its own and the preceding segment"),
        ({"positions": ALiBi}, "positions=alibi: must be rope or none"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(options, message):
    given = {"width": WIDTH, "heads": HEADS, "segments": [8, 16], "dilations": [1, 2], **options}
    with pytest.raises(ValueError, match=message) as error:
        LongNet(**given)
    assert "\n" not in str(error.value)
