"""Linear attention by chunks is the token loop: outputs, states and every gradient."""

import pytest
import torch

from zoo.ops import linear_attention as module
from zoo.ops.linear_attention import CHUNK_TOKENS, LinearState, linear_attention

LENGTHS = [1, 2, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS + 7]
DECAYS = ["none", "head", "token", "channel"]
B, H, K, V = 2, 3, 4, 5


def inputs(t: int, decay: str, *, bonus=False, normalise=False, one_head=False, size=1.0, seed=0):
    """q, k, v, log_decay, bonus, S, z: float64 leaves, None where there is none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = 1 if one_head else H
    q, k, v, S = draw(B, t, heads, K), draw(B, t, heads, K), draw(B, t, H, V), draw(B, H, K, V)
    if normalise:
        q, k = q.abs(), k.abs()
    shapes = {"head": (H,), "token": (B, t, H), "channel": (B, t, H, K)}
    w = -size * draw(*shapes[decay]).abs() if decay in shapes else None
    leaves = [q, k, v, w, draw(H, K).abs() if bonus else None, S, draw(B, H, K).abs()]
    return [x if x is None else x.requires_grad_() for x in leaves]


def run(leaves, backend: str, normalise: bool) -> list[torch.Tensor]:
    """y, the state and the gradient of a fixed score of both."""
    q, k, v, w, u, S, z = leaves
    state = LinearState(S, z) if normalise else S
    y, after = linear_attention(
        q, k, v, w, bonus=u, normalise=normalise, state=state, backend=backend
    )
    outs = [y, *(after if isinstance(after, LinearState) else [after])]
    generator = torch.Generator().manual_seed(7)
    score = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outs)
    used = [x for x in leaves[:6] + ([z] if normalise else []) if x is not None]
    return [*outs, *torch.autograd.grad(score, used)]


def same(leaves, normalise=False, rtol=1e-9, atol=1e-10) -> None:
    found, wanted = (run(leaves, backend, normalise) for backend in ("torch", "reference"))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_chunks_are_the_loop(decay, t):
    same(inputs(t, decay))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    "variant",
    [{"bonus": True}, {"one_head": True}, {"normalise": True}, {"bonus": True, "one_head": True}],
)
def test_every_variant_is_the_loop(decay, variant):
    same(inputs(CHUNK_TOKENS + 9, decay, **variant), variant.get("normalise", False))


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("size", [1e-6, 13.8, 1e4])
def test_any_decay_is_exact(decay, bonus, size):
    """From next to none over 1e-6 per token to one that forgets everything at once."""
    same(inputs(2 * CHUNK_TOKENS + 3, decay, bonus=bonus, size=size), rtol=1e-8)


@pytest.mark.parametrize("decay", DECAYS[2:])
def test_a_token_that_forgets_everything_leaves_its_neighbours_exact(decay):
    leaves = inputs(CHUNK_TOKENS + 5, decay, size=1e-3)
    with torch.no_grad():
        leaves[3][:, 20] = -1e6
    same(leaves)


def test_pieces_recomputed_in_the_backward_change_nothing(monkeypatch):
    leaves = inputs(3 * CHUNK_TOKENS + 7, "channel", bonus=True)
    whole = run(leaves, "torch", False)
    monkeypatch.setattr(module, "SEGMENT_TOKENS", CHUNK_TOKENS)
    for one, other in zip(run(leaves, "torch", False), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("decay", DECAYS)
def test_float32_is_as_exact_as_its_rounding(decay):
    leaves = inputs(3 * CHUNK_TOKENS, decay, size=2.0)
    low = [x if x is None else x.detach().float() for x in leaves]
    y, S = linear_attention(*low[:4], state=low[5])
    expected, state = linear_attention(*leaves[:4], state=leaves[5], backend="reference")
    for one, other in ((y, expected), (S, state)):
        assert one.dtype == torch.float32
        error = (one.double() - other).norm() / other.norm()
        assert error < 1e-6


def test_bfloat16_autocast_leaves_the_sums_in_float32():
    leaves = [x if x is None else x.detach().float() for x in inputs(3 * CHUNK_TOKENS, "token")]
    expected, _ = linear_attention(*leaves[:4])
    with torch.autocast("cpu", torch.bfloat16):
        y, S = linear_attention(*leaves[:4])
    assert S.dtype == torch.float32
    torch.testing.assert_close(y, expected)


def test_without_decay_it_is_the_masked_product_of_the_paper():
    q, k, v, *_ = (x.detach() for x in inputs(50, "none") if x is not None)
    scores = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    torch.testing.assert_close(
        linear_attention(q, k, v)[0], torch.einsum("bhij,bjhv->bihv", scores, v)
    )


def test_no_weight_divides_by_the_smallest_normaliser_and_stays_finite():
    v = torch.ones(1, 5, 1, 2)
    q = torch.zeros(1, 5, 1, 3)
    y, state = linear_attention(q, q, v, normalise=True)
    assert (y == 0).all()
    assert (state.z == 0).all()


@pytest.mark.parametrize("size", [1e-4, 1.0])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_normalised_it_is_an_average_of_the_values_however_small_the_weights(backend, size):
    q, k, v, *_ = (x.detach() for x in inputs(50, "none", normalise=True) if x is not None)
    weights = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    wanted = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), v)
    found, _ = linear_attention(size * q, k, v, normalise=True, backend=backend)
    torch.testing.assert_close(found, wanted)


@pytest.mark.mistyped
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 2, 4)}, r"q is \(2, 5, 2, 4\)"),
        ({"k": torch.zeros(2, 4, 3, 4)}, r"k is \(2, 4, 3, 4\)"),
        ({"log_decay": torch.zeros(2, 5)}, r"log_decay is \(2, 5\)"),
        ({"v": torch.zeros(2, 0, 3, 5)}, "no tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    sound = {
        "q": torch.zeros(2, 5, 3, 4),
        "k": torch.zeros(2, 5, 3, 4),
        "v": torch.zeros(2, 5, 3, 5),
    }
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**sound, **change})
