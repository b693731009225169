"""Attention patterns against dense attention with an explicit matrix of distances, cell by cell.

The matrices below are drawn by the papers' rules; `dense` knows nothing of key blocks.
"""

import re

import pytest
import torch

from zoo.attention import lm_infinite, pattern
from zoo.attention.dual_chunk import DualChunk
from zoo.attention.key_blocks import KeyBlock, identity
from zoo.attention.lm_infinite import LMInfinite
from zoo.attention.parallel_windows import ParallelWindows
from zoo.attention.pattern import AttentionPattern, distances
from zoo.attention.self_extend import ReRoPE, SelfExtend
from zoo.attention.streaming_llm import StreamingLLM
from zoo.errors import UserError
from zoo.positions.rope import inverse_frequencies

WIDTH = 8
UNSEEN = None


def scaling(tokens: int):
    return inverse_frequencies(WIDTH, 100.0), 1.0


def by_plain(i, j):
    return i - j


def by_dual_chunk(i, j, c=10, s=6, w=4):
    apart, inside = i // s - j // s, i % s
    if apart == 0:
        at = inside
    elif apart == 1:
        at = min(s + inside, c - 1) if inside < w else c - 1
    else:
        at = c - 1
    return at - j % s


def by_streaming(i, j, window=6, sinks=2):
    """Distances inside the cache: the sinks, then the last tokens."""
    cache = [n for n in range(i + 1) if n < sinks or n > i - (window - sinks)]
    return len(cache) - 1 - cache.index(j) if j in cache else UNSEEN


def by_window(i, j):
    return by_streaming(i, j, window=5, sinks=0)


def by_lm_infinite(i, j, window=5, sinks=2):
    return min(i - j, window) if i - j < window or j < sinks else UNSEEN


def by_self_extend(i, j, window=4, group=3):
    return i - j if i - j < window else i // group + window - window // group - j // group


def by_rerope(i, j, window=4):
    return min(i - j, window)


def by_leaky_rerope(i, j, window=4, leak=0.25):
    return i - j if i - j < window else window + leak * (i - j - window)


def by_parallel(i, j, window=6, windows=4):
    """Windows side by side at 0 .. window - 1, the task behind them."""
    context = window * windows
    if i < context:
        return i - j if i // window == j // window else UNSEEN
    return i - j if j >= context else window + (i - context) - j % window


UNEQUAL = [5, 2, 6]  # tokens of windows that begin with a token of their own each


def by_unequal(i, j, aligned_ends=False):
    """Windows of these sizes, by a walk over the prompt; the task sees one beginning token."""
    at = [(number, place) for number, size in enumerate(UNEQUAL) for place in range(size)]
    at += [(None, max(UNEQUAL) + place) for place in range(100)]
    (own, here), (other, there) = at[i], at[j]
    if own != other and (own is not None or (there == 0 and other > 0)):
        return UNSEEN
    ahead = [max(UNEQUAL) - size if aligned_ends else 0 for size in UNEQUAL]
    return here - there - (ahead[other] if own is None and other is not None else 0)


def counted(pattern, tokens: int) -> torch.Tensor:
    """How often each query counts each key: in structured prompting the task's own many times."""
    times = torch.ones(tokens, tokens, dtype=torch.float64)
    if getattr(pattern, "rescaled", False):
        sizes = UNEQUAL if pattern.begun else [6] * 4
        times[sum(sizes) :, sum(sizes) :] = len(sizes)
    return times


CASES = {
    "plain": (AttentionPattern(scaling), by_plain),
    "dual_chunk": (DualChunk(scaling, original_length=10, chunk=6, local=4), by_dual_chunk),
    "dual_chunk_local": (
        DualChunk(scaling, original_length=10, chunk=6, local=2),
        lambda i, j: by_dual_chunk(i, j, w=2),
    ),
    "streaming_llm": (StreamingLLM(scaling, original_length=6, sinks=2), by_streaming),
    "window": (StreamingLLM(scaling, original_length=5, sinks=0), by_window),
    "lm_infinite": (LMInfinite(scaling, original_length=5, sinks=2), by_lm_infinite),
    "self_extend": (SelfExtend(scaling, original_length=8, group=3, window=4), by_self_extend),
    "rerope": (ReRoPE(scaling, original_length=8, window=4), by_rerope),
    "leaky_rerope": (
        ReRoPE(scaling, original_length=8, window=4, leak=0.25),
        by_leaky_rerope,
    ),
    "pcw": (ParallelWindows(scaling, original_length=8, windows=4), by_parallel),
    "structured": (
        ParallelWindows(scaling, original_length=8, windows=4, rescaled=True),
        by_parallel,
    ),
    "pcw_unequal": (
        ParallelWindows(scaling, original_length=8, windows=4).arranged(UNEQUAL, begun=True),
        by_unequal,
    ),
    "structured_unequal": (
        ParallelWindows(scaling, original_length=8, windows=4, rescaled=True).arranged(
            UNEQUAL, begun=True
        ),
        lambda i, j: by_unequal(i, j, aligned_ends=True),
    ),
}


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    """A pattern, in blocks of seven queries where it has no blocks of its own, and its rule."""
    found, rule = CASES[request.param]
    blocks = [7 if step >= pattern.BLOCK_QUERIES else step for step in found.steps]
    monkeypatch.setattr(found, "steps", blocks)
    return found, rule


def matrix(rule, tokens: int) -> torch.Tensor:
    cells = [[rule(i, j) if j <= i else UNSEEN for j in range(tokens)] for i in range(tokens)]
    return torch.tensor(
        [[torch.nan if cell is UNSEEN else cell for cell in row] for row in cells]
    ).double()


def scores_at(q, k, apart: torch.Tensor) -> torch.Tensor:
    """(R_{M_ij} q_i) . k_j / sqrt(d), (b, i, h, j), every score rotated on its own."""
    angles = apart.nan_to_num()[..., None] * torch.tensor(scaling(0)[0], dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    q1, q2 = q[:, :, None].transpose(2, 3).chunk(2, -1)  # (b, i, h, 1, d/2)
    k1, k2 = k.transpose(1, 2)[:, None].chunk(2, -1)  # (b, 1, h, j, d/2)
    cos, sin = cos[None, :, None], sin[None, :, None]  # (1, i, 1, j, d/2)
    return ((q1 * cos - q2 * sin) * k1 + (q1 * sin + q2 * cos) * k2).sum(-1) / WIDTH**0.5


def dense(q, k, v, apart: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """softmax over seen keys of the scores at these distances. Key j counts times_ij times."""
    scores = scores_at(q, k, apart) + times.log()[None, :, None]
    weights = scores.masked_fill(apart.isnan()[None, :, None], -torch.inf).softmax(-1)
    return torch.einsum("bihj,bjhe->bihe", weights, v)


def test_the_papers_row_of_dual_chunk_attention():
    """c=10, s=6, w=4, query 12 (figure 2's rules by hand)."""
    found = distances(CASES["dual_chunk"][0], 14)[12, :13]
    assert found.tolist() == [9, 8, 7, 6, 5, 4, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("tokens", [1, 6, 14, 40])
def test_every_query_sees_the_keys_of_the_rule_at_its_distance(case, tokens):
    found, rule = case
    torch.testing.assert_close(
        distances(found, tokens), matrix(rule, tokens), equal_nan=True, rtol=0, atol=0
    )


def random_inputs(tokens: int):
    generator = torch.Generator().manual_seed(0)
    shape = (2, tokens, 3, WIDTH)
    draw = lambda: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [draw().requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("backend", ["reference", "flash"])
def test_outputs_and_gradients_equal_dense_attention_with_these_distances(case, backend):
    found, rule = case
    inputs = random_inputs(40)
    out = found(*inputs, 0, backend=backend)
    expected = dense(*inputs, matrix(rule, 40), counted(found, 40))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for grad, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-9)


def test_an_attention_factor_multiplies_all_scores_by_its_square(case, monkeypatch):
    found, _ = case
    q, k, v = random_inputs(40)
    wanted = found(1.3**2 * q, k, v, 0)
    monkeypatch.setattr(found, "scaling", lambda tokens: (scaling(tokens)[0], 1.3))
    torch.testing.assert_close(found(q, k, v, 0), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sizes", [[1] * 40, [39, 1], [1, 39], [5, 7, 13, 2, 13]])
def test_any_chunking_sees_the_same_and_keeps_as_much_as_declared(case, sizes):
    found, _ = case
    q, k, v = random_inputs(40)
    whole = found(q, k, v, 0)
    cached_k, cached_v, start, outs = k[:, :0], v[:, :0], 0, []
    for size in sizes:
        now = slice(start, start + size)
        cached_k, cached_v = (
            torch.cat([cached_k, k[:, now]], 1),
            torch.cat([cached_v, v[:, now]], 1),
        )
        outs.append(found(q[:, now], cached_k, cached_v, start))
        start += size
        cached_k, cached_v = found.evict(cached_k, cached_v)
        assert cached_k.shape[1] == found.cached(start)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gone", [3, 9, 20])
def test_keys_that_are_gone_are_not_seen_and_others_stay_where_they_are(case, gone):
    """As after a training window that left keys behind; sinks stay."""
    found, rule = case
    q, k, v = random_inputs(40)
    visible = matrix(rule, 40)
    visible[:, found.sinks : found.sinks + gone] = torch.nan
    times = counted(found, 40)
    cached = [torch.cat([x[:, : found.sinks], x[:, found.sinks + gone :]], 1) for x in (k, v)]
    out = found(q[:, 25:], *cached, 25)
    torch.testing.assert_close(out, dense(q, k, v, visible, times)[:, 25:], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["dual_chunk", "streaming_llm", "lm_infinite", "self_extend"])
def test_within_its_window_a_pattern_is_plain_rotary_attention(name):
    found, _ = CASES[name]
    inputs = random_inputs(4)
    torch.testing.assert_close(found(*inputs, 0), AttentionPattern(scaling)(*inputs, 0))


@pytest.mark.parametrize("rescaled", [False, True])
def test_one_parallel_window_is_the_model_itself(rescaled):
    inputs = random_inputs(20)
    one = ParallelWindows(scaling, original_length=8, windows=1, rescaled=rescaled)
    torch.testing.assert_close(one(*inputs, 0), AttentionPattern(scaling)(*inputs, 0))


def test_windows_of_the_context_may_change_places():
    """The task sees all of them alike, and none sees another."""
    q, k, v = random_inputs(30)
    found = ParallelWindows(scaling, original_length=8, windows=4)
    swapped = torch.cat([torch.arange(12, 24), torch.arange(12), torch.arange(24, 30)])
    whole = found(q, k, v, 0)
    again = found(q[:, swapped], k[:, swapped], v[:, swapped], 0)
    torch.testing.assert_close(again, whole[:, swapped], rtol=1e-9, atol=1e-10)


def test_a_scaling_that_changes_with_length_does_so_at_buckets_not_at_chunks():
    """Each query is read with the frequencies of its own bucket, its keys with the same ones."""

    def by_length(tokens: int):
        return inverse_frequencies(WIDTH, 100.0 * max(1, tokens / 8)), 1.0 + tokens / 80

    q, k, v = random_inputs(30)
    found = AttentionPattern(by_length, bucket=8)
    whole = found(q, k, v, 0)
    for first in range(0, 30, 8):
        last = min(first + 8, 30)
        alone = AttentionPattern(lambda _, last=first + 8: by_length(last))(
            q[:, :last], k[:, :last], v[:, :last], 0
        )
        torch.testing.assert_close(whole[:, first:last], alone[:, first:])
    one_by_one = [found(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1], i) for i in range(30)]
    torch.testing.assert_close(torch.cat(one_by_one, 1), whole, rtol=1e-9, atol=1e-10)


def test_a_key_seen_twice_is_an_error_of_the_pattern():
    class Twice(AttentionPattern):
        def views(self, rows):
            return [*super().views(rows), *super().views(rows)]

    with pytest.raises(ValueError, match="Twice: a query attends to a key twice"):
        distances(Twice(scaling), 5)


BROKEN = {
    "with sinks=2 every key block must hold sinks alone. Got range(0, 3)": (
        lambda rows: [KeyBlock(range(3), identity, identity, rows)]
    ),
    "the rows of a key block must be among range(0, 5)": (
        lambda rows: [KeyBlock(range(1), identity, identity, range(4, 6))]
    ),
    "a causal key block must have as many keys as queries": (
        lambda rows: [KeyBlock(range(2), identity, identity, range(2, 5), causal=True)]
    ),
    "no query may attend to later keys": (
        lambda rows: [KeyBlock(range(2), identity, identity, range(5))]
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_pattern_that_breaks_a_rule_is_neither_computed_nor_drawn(message):
    class Broken(AttentionPattern):
        def views(self, rows):
            return BROKEN[message](rows)

    found = Broken(scaling)
    found.sinks = 2 if "sinks" in message else 0
    for use in (lambda: distances(found, 5), lambda: found(*random_inputs(5), 0)):
        with pytest.raises(ValueError, match=re.escape(f"Broken: {message}")):
            use()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DualChunk(scaling, original_length=10, chunk=10), "chunk=10: must be from 1 to 9"),
        (lambda: DualChunk(scaling, original_length=10, chunk=6, local=5), "local=5: must be from"),
        (lambda: DualChunk(scaling, original_length=1), "original_length=1: must be >= 2"),
        (lambda: StreamingLLM(scaling, original_length=8, sinks=8), "sinks=8: must be from 0 to 7"),
        (lambda: StreamingLLM(scaling, original_length=8, window=-1), "window=-1: must be from 1"),
        (lambda: StreamingLLM(scaling, original_length=8, window=9), "window=9: must be from 1"),
        (lambda: LMInfinite(scaling, original_length=8, sinks=9), "sinks=9: must be from 0 to 7"),
        (lambda: SelfExtend(scaling, original_length=8, group=0), "group=0: must be >= 1"),
        (lambda: SelfExtend(scaling, original_length=8, group=2, window=9), "window=9: must be"),
        (lambda: ReRoPE(scaling, original_length=8, window=0), "window=0: must be from 1 to 8"),
        (lambda: ParallelWindows(scaling, original_length=8, windows=0), "windows=0: must be >= 1"),
        (lambda: ParallelWindows(scaling, original_length=8, windows=2, window=8), "window=8: mus"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_lm_infinite_attends_to_the_keys_between_of_highest_scores(top_k, monkeypatch):
    """Query by query and head by head, from the definition."""
    monkeypatch.setattr(lm_infinite, "TILE", 7)
    window, sinks, middle, tokens = 5, 2, 3, 30
    found = LMInfinite(scaling, original_length=6, window=window, sinks=sinks, top_k=top_k)
    assert found.middle == middle
    q, k, v = random_inputs(tokens)
    apart, times = matrix(by_lm_infinite, tokens), torch.ones(tokens, tokens).double()
    at_middle = torch.full((tokens, tokens), float(middle), dtype=torch.float64)
    expected = torch.zeros_like(v)
    for head in range(q.shape[2]):
        one = [x[:, :, head : head + 1] for x in (q, k)]
        high = scores_at(*one, at_middle)[:, :, 0].detach()
        for row in range(len(q)):
            visible = apart.clone()
            for i in range(window + sinks, tokens):
                between = range(sinks, i - window + 1)
                best = sorted(between, key=lambda j: -float(high[row, i, j]))[:top_k]
                visible[i, best] = middle
            given = [x[row : row + 1, :, head : head + 1] for x in (q, k, v)]
            expected[row : row + 1, :, head : head + 1] = dense(*given, visible, times)
    torch.testing.assert_close(found(q, k, v, 0), expected, rtol=1e-9, atol=1e-10)
    outs = [found(q[:, a:b], k[:, :b], v[:, :b], a) for a, b in ((0, 9), (9, 10), (10, 30))]
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-9, atol=1e-10)
    assert found.cached(1000) == 1000


def test_keys_between_are_of_rotary_models_and_their_distance_was_trained():
    with pytest.raises(UserError, match=r"^top_k=2: selects by rotated keys"):
        LMInfinite(lambda _: ((), 1.0), original_length=6, sinks=2, top_k=2)
    for options in ({"middle": 3}, {"middle": 6, "top_k": 2}):
        with pytest.raises(UserError, match=r"^middle=[36]: must be less than the trained length"):
            LMInfinite(scaling, original_length=6, sinks=2, **options)
