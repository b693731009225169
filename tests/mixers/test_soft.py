"""SOFT is its paper's formula both ways, and the causal landmarks are the projection they claim."""

import math
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F

from zoo.mixers.base import count_bytes
from zoo.mixers.soft import Soft
from zoo.ops.newton_inverse import NewtonInverse
from zoo.positions.alibi import ALiBi
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope, apply_rope, inverse_frequencies

WIDTH, HEADS, D = 16, 2, 8
BLOCK, LANDMARKS = 4, 3
VARIANTS = [
    {"normalise": normalise, "positions": positions}
    for normalise, positions in product(["none", "length", "sum"], [Rope, NoPositions])
]


def name(variant: dict) -> str:
    return "-".join(getattr(value, "__name__", str(value)) for value in variant.values())


def build(**options) -> Soft:
    torch.manual_seed(0)
    place = {"width": WIDTH, "heads": HEADS, "block": BLOCK, "landmarks": LANDMARKS}
    mixer = Soft(**{**place, **options}).double()
    with torch.no_grad():
        mixer.q_proj.weight.mul_(0.5)  # so that kernels are not all near 0
    return mixer


def tokens(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=generator)


def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """exp(-||x_i - y_j||^2 / (2 sqrt d)) from the differences themselves."""
    return torch.exp(-(x[..., :, None, :] - y[..., None, :, :]).square().sum(-1) / 2 / D**0.5)


def by_heads(mixer: Soft, x: torch.Tensor):
    """Queries before rotation, rotated queries, and values, (b, h, t, d) each."""
    q, v = ((x @ p.weight.T).unflatten(-1, (HEADS, D)) for p in (mixer.q_proj, mixer.v_proj))
    return (y.transpose(1, 2) for y in (q, placed(mixer, q, torch.arange(x.shape[1])), v))


def placed(mixer: Soft, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    rotary = isinstance(mixer.positions, Rope)
    return apply_rope(x, inverse_frequencies(D), positions) if rotary else x


def landmark(mixer: Soft, q: torch.Tensor, block: int) -> torch.Tensor:
    """(b, h, 1, d): of the queries before rotation (b, h, block, d) of one block."""
    raw = F.gelu(mixer.norm(q.flatten(-2) @ mixer.convolution.weight.T))
    middle = torch.tensor([block * BLOCK + (BLOCK - 1) / 2])
    return placed(mixer, raw[:, None], middle)[:, 0, :, None]


def finished(mixer: Soft, sums: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor):
    """y of the sums (b, h, t, d), the sums of their weights (b, h, t, 1) and numbers of keys."""
    divisor = {"none": torch.ones(()), "length": visible[:, None], "sum": weights.clamp(min=1)}
    o = (sums / divisor[mixer.normalise]).transpose(1, 2).flatten(-2)
    return o @ mixer.o_proj.weight.T


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_the_exact_form_is_the_masked_kernel(variant):
    mixer, x = build(form="exact", **variant), tokens(19)
    _, q, v = by_heads(mixer, x)
    S = kernel(q, q).tril()
    expected = finished(mixer, S @ v, S.sum(-1, keepdim=True), torch.arange(1.0, 20.0))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
@pytest.mark.parametrize("length", [1, BLOCK, 19])
def test_the_bidirectional_form_is_the_papers_equation_8(variant, length):
    mixer, x = build(causal=False, iterations=30, **variant), tokens(length)
    raw, q, v = by_heads(mixer, x)
    raw = F.pad(raw, (0, 0, 0, -length % BLOCK))
    blocks = raw.unflatten(2, (-1, BLOCK)).unbind(2)
    landmarks = torch.cat([landmark(mixer, block, i) for i, block in enumerate(blocks)], 2)
    A = kernel(landmarks, landmarks) + mixer.epsilon * torch.eye(len(blocks))
    P = kernel(landmarks, q)
    S = P.mT @ torch.linalg.inv(A) @ P
    expected = finished(mixer, S @ v, S.sum(-1, keepdim=True), torch.full((length,), float(length)))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-8, atol=1e-9)
    assert mixer.residual is not None
    assert mixer.residual < 1e-9


def token_by_token(mixer: Soft, x: torch.Tensor) -> torch.Tensor:
    """The causal landmark form as its docstring has it, with lists for what is kept."""
    raw, q, v = by_heads(mixer, x)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    held, c, outs = [], None, []
    for t in range(x.shape[1]):
        own = slice(t - t % BLOCK, t + 1)
        o = kernel(q[:, :, t : t + 1], q[:, :, own]) @ v[:, :, own]
        if held:
            o = o + kernel(q[:, :, t : t + 1], torch.cat(held, 2)) @ c
        outs.append(o)
        if t % BLOCK == BLOCK - 1:
            before = held
            held = [*held, landmark(mixer, raw[:, :, own], t // BLOCK)][-mixer.landmarks :]
            new = torch.cat(held, 2)
            weighted = kernel(new, q[:, :, own]) @ v[:, :, own]
            if before:
                weighted = weighted + kernel(new, torch.cat(before, 2)) @ c
            c = torch.linalg.inv(kernel(new, new) + mixer.epsilon * torch.eye(len(held))) @ weighted
    o = torch.cat(outs, 2)
    return finished(mixer, o[..., :-1], o[..., -1:], torch.arange(1.0, 1 + x.shape[1]))


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1, 6 * BLOCK + 3])
def test_the_landmark_form_is_its_recurrence(variant, length, monkeypatch):
    monkeypatch.setattr("zoo.mixers.soft.CHECKPOINTED_BLOCKS", 2)
    mixer, x = build(form="landmarks", **variant), tokens(length)
    torch.testing.assert_close(mixer(x), token_by_token(mixer, x), rtol=1e-8, atol=1e-9)


def test_with_every_query_for_a_landmark_the_landmark_form_is_the_exact_one(monkeypatch):
    """A projection on a span that holds the function loses nothing."""
    options = {"normalise": "none", "block": 1, "landmarks": 24}
    mixer = build(form="landmarks", epsilon=1e-11, **options)
    exact = build(form="exact", **options)
    monkeypatch.setattr(mixer, "_landmarks", lambda q, first: mixer.positions.rotate(q, first))
    x = tokens(24)
    torch.testing.assert_close(mixer(x), exact(x), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(mixer, "landmarks", 12)
    assert (mixer(x) - exact(x)).abs().max() > 1e-3


def test_what_was_read_does_not_grow_by_being_projected():
    mixer, x = build(form="landmarks", normalise="none"), tokens(12 * BLOCK)
    _, state = mixer(x[:, : 4 * BLOCK], mixer.empty_state(2))
    with torch.no_grad():
        mixer.v_proj.weight.zero_()
    sizes = []
    for chunk in x[:, 4 * BLOCK :].split(BLOCK, 1):
        landmarks = state.landmarks.transpose(1, 2)
        sizes.append((state.c.mT @ kernel(landmarks, landmarks) @ state.c).diagonal(0, -2, -1))
        _, state = mixer(chunk, state)
    for before, after in pairwise(sizes):
        assert (after <= before).all()
    assert (sizes[0] > 0).all()


@pytest.mark.parametrize("form", ["exact", "landmarks"])
@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_any_chunking_gives_the_whole(form, variant, monkeypatch):
    monkeypatch.setattr("zoo.mixers.soft.CHECKPOINTED_BLOCKS", 2)
    mixer, x = build(form=form, **variant), tokens(27)

    def run(sizes):
        state, outs = mixer.empty_state(2), []
        for chunk in x.split(sizes, 1):
            y, state = mixer(chunk, state)
            outs.append(y)
        y = torch.cat(outs, 1)
        score = y.sin().sum() + sum(leaf.sin().sum() for leaf in state[:-1])
        return y, *state, *torch.autograd.grad(score, list(mixer.parameters()))

    whole = run([27])
    for sizes in ([1] * 27, [1, 26], [26, 1], [5, 3, 16, 3], [8, 19]):
        torch.testing.assert_close(run(sizes), whole, rtol=1e-7, atol=1e-8)


def test_the_landmark_state_never_grows_and_the_exact_one_does():
    bounded, growing = build(form="landmarks"), build(form="exact")
    assert bounded.recurrent
    assert not growing.recurrent
    assert bounded.state_bytes(1) == bounded.state_bytes(10**6)
    assert growing.state_bytes(200) == 2 * growing.state_bytes(100)


def test_a_window_of_the_exact_form_is_carried():
    mixer, x = build(form="exact", positions=NoPositions, normalise="length"), tokens(12)
    _, state = mixer(x[:, :8], mixer.empty_state(2))
    y, _ = mixer(x[:, 8:], mixer.truncate_state(state, 4))
    torch.testing.assert_close(y, mixer(x[:, 4:])[:, 4:], rtol=1e-9, atol=1e-10)


def gram(count: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    x = spread * torch.randn(2, count, D, dtype=torch.float64, generator=generator)
    return kernel(x, x) + 0.01 * torch.eye(count)


@pytest.mark.parametrize("count", [1, 2, 49])
def test_newtons_iteration_finds_the_inverse_and_its_gradient(count):
    A = gram(count, 2.0).requires_grad_()
    X, exact = NewtonInverse.apply(A, 20), torch.linalg.inv(A)
    torch.testing.assert_close(X, exact, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(exact)
    torch.testing.assert_close(
        torch.autograd.grad((X * weights).sum(), A),
        torch.autograd.grad((exact * weights).sum(), A),
        rtol=1e-8,
        atol=1e-8,
    )


def test_the_residual_distinguishes_an_inverse_from_none():
    x = tokens(19)
    for iterations, converged in ((20, True), (2, False)):
        mixer = build(causal=False, iterations=iterations)
        assert mixer.residual is None
        mixer(x)
        assert (float(mixer.residual) < 1e-6) == converged
    collapsed = build(causal=False)
    with torch.no_grad():
        collapsed.norm.weight.zero_()  # every landmark is the same
    collapsed(tokens(49 * BLOCK))
    assert math.isfinite(collapsed.residual)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 3}, "heads=3: must divide width=16"),
        ({"block": 0}, "block=0: must be an integer >= 1"),
        ({"landmarks": 0}, "landmarks=0: must be an integer from 1 to 1048576"),
        ({"iterations": 0}, "iterations=0: must be an integer from 1 to 1000"),
        ({"epsilon": 0.0}, "epsilon=0: must be a number > 0 and <= 1000"),
        ({"form": "linear"}, "form=linear: must be exact or landmarks"),
        ({"normalise": "softmax"}, "normalise=softmax: must be none, length or sum"),
        ({"positions": ALiBi}, "positions=alibi: must be rope or none"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("form", ["exact", "landmarks", "bidirectional"])
def test_the_convolution_of_v_is_one_kernel_per_head_added_to_the_sums(form, taps):
    options = {"causal": False} if form == "bidirectional" else {"form": form}
    mixer, plain, x = build(value_conv=taps, **options), build(**options), tokens(19)
    missing = plain.load_state_dict(mixer.state_dict(), strict=False)
    assert missing.unexpected_keys == ["value_conv.weight"]
    assert not missing.missing_keys
    _, _, v = by_heads(mixer, x)  # (b, h, t, d): heads are the channels of a depthwise convolution
    ahead = taps - 1 if mixer.causal else (taps - 1) // 2
    padded = F.pad(v, (0, 0, ahead, taps - 1 - ahead))
    kernels = mixer.value_conv.weight[:, None, :, None]
    local = F.conv2d(padded, kernels, groups=mixer.heads).transpose(1, 2).flatten(-2)
    expected = plain(x) + local @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-10)
    if not mixer.causal:
        return
    state, outs = mixer.empty_state(len(x)), []
    for piece in x.split([1, 7, 1, 10], 1):
        out, state = mixer(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-9, atol=1e-10)
    assert count_bytes(state) == mixer.state_bytes(19, len(x))
    short = mixer.truncate_state(state, 5)
    assert torch.equal(short.values, state.values)
    assert form == "landmarks" or short.own.k.shape[1] == 5
