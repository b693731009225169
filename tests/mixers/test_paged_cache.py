"""A cache in pages is the contiguous one, however pages lie, are shared and given back."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.mixers.paged_cache import PAGE, SLAB, PagedCache, PagedKeyValues, gather, paged
from zoo.mixers.parts import KeyValues, append
from zoo.mixers.softmax import SoftmaxAttention
from zoo.positions.rope import Rope

HEADS, WIDTH = 2, 4


def cache() -> PagedCache:
    return PagedCache(Rope(HEADS, WIDTH), heads=HEADS, head_width=WIDTH)


def tokens(count: int) -> Tensor:
    return torch.randn(2, count, HEADS, WIDTH, dtype=torch.float64)


def used(store: PagedCache) -> int:
    """Pages that some state has."""
    return sum(len(pool.memory) - len(pool.free) for pool in store.pools.values())


def assert_held(store: PagedCache, texts: list[tuple[PagedKeyValues, Tensor]]) -> None:
    """Each state holds its own tokens, in as few pages as they need, and no page is lost."""
    for state, expected in texts:
        if state.tokens_seen:
            assert torch.equal(torch.cat(gather(state)), expected)
        assert state.tokens_seen == expected.shape[1]
        assert len(state.pages) == -(-state.tokens_seen // PAGE)
    assert used(store) == len({page.slot for state, _ in texts for page in state.pages})


Steps = st.lists(
    st.tuples(st.sampled_from(["write", "write", "fork", "drop"]), st.integers(0, 99)),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(Steps, st.integers(0, 2**32 - 1))
def test_pages_in_any_order_hold_what_was_written_to_each_text(steps, seed):
    """Whatever is written behind states that share pages, at places given back in any order."""
    store, shuffle = cache(), random.Random(seed)
    texts = [(PagedKeyValues((), 0), tokens(0))]
    for step, number in steps:
        place = number % len(texts)
        state, held = texts[place]
        for pool in store.pools.values():
            shuffle.shuffle(pool.free)
        if step == "write":
            more = tokens(1 + number % 37)
            texts[place] = store.append(state, more), append(held, more)
        elif step == "fork":
            texts.append((state, held))
        elif len(texts) > 1:
            del texts[place]
        del state, held
        assert_held(store, texts)
    texts.clear()
    assert used(store) == 0


def test_a_prefix_is_kept_once_and_its_last_page_is_copied_when_two_texts_write_behind_it():
    store = cache()
    common = store.append(PagedKeyValues((), 0), tokens(3 * PAGE + 5))
    one, other = store.append(common, tokens(1)), store.append(common, tokens(1))
    assert used(store) == 5
    assert [a is b for a, b in zip(one.pages, other.pages, strict=True)] == [True] * 3 + [False]
    assert one.pages[3] is common.pages[3]  # the first wrote into the page itself


@pytest.mark.parametrize("chunks", [[1] * 40, [40], [17, 1, 1, 21]])
def test_attention_over_pages_is_that_over_one_tensor_to_the_bit(chunks):
    torch.manual_seed(0)
    mixer = SoftmaxAttention(width=16, heads=4, kv_heads=2).double().eval()
    x = torch.randn(1, 40, 16, dtype=torch.float64)

    def found() -> list[Tensor]:
        state, outs = mixer.empty_state(1), []
        for part in x.split(chunks, 1):
            y, state = mixer(part, state)
            outs.append(y)
        return outs

    with torch.inference_mode():
        expected = found()
        with paged(mixer):
            store = mixer.kv_cache
            assert isinstance(store, PagedCache)
            taken = store.append(PagedKeyValues((), 0), torch.zeros(2, 900, 2, 4).double())
            del taken
            random.Random(0).shuffle(*(pool.free for pool in store.pools.values()))
            assert all(map(torch.equal, found(), expected))
        assert mixer.kv_cache is None


def test_a_mixed_batch_wastes_less_than_four_percent_of_its_memory():
    """Memory allocated for pages, by what tokens need; caches that grow in place waste up to a
    fifth."""
    store, lengths = cache(), random.Random(1).choices(range(100, 2000), k=16)
    texts = [store.append(PagedKeyValues((), 0), tokens(length)) for length in lengths]
    allocated = sum(len(pool.memory) * PAGE for pool in store.pools.values())
    assert sum(text.tokens_seen for text in texts) > 0.96 * allocated
    assert allocated < PAGE * (used(store) + SLAB)


def test_a_state_in_pages_is_that_of_one_text():
    none = torch.empty(2, 0, HEADS, WIDTH)
    with pytest.raises(ValueError, match="one text"):
        cache().empty(KeyValues(none, none, 0))
