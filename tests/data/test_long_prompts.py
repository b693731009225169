"""Prompts fit their length; what is cut or left out is counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizing import KINDS

from zoo.data.long_contexts import GENERATED, Example
from zoo.data.long_prompts import cut_to, fitting, levelled, solved, with_shots
from zoo.data.tokenizers import BYTE_TOKENIZER, open_tokenizer
from zoo.errors import UserError

TEXT = [f"Sentence {i} of a book." for i in range(50)]
BEGINS = BYTE_TOKENIZER._replace(bos=255)  # no byte of UTF-8
UNIT = {"variable_tracking": 25, "common_words": 40, "babilong": 30}  # tokens of one step in size


def written(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token != 255).decode()


@pytest.mark.parametrize("name", GENERATED)
@settings(max_examples=6)
@given(most=st.integers(5000, 7000), seed=st.integers(0, 2**20))
def test_generated_prompts_fill_their_length(name, most, seed):
    prompt = fitting(BYTE_TOKENIZER, name, [seed, 0], TEXT, most)
    assert most - UNIT[name] < len(prompt.tokens) <= most
    longer = fitting(BYTE_TOKENIZER, name, [seed, 0], TEXT, 2 * most)
    assert len(longer.answers) == len(prompt.answers)


def test_a_length_without_room_for_an_example_is_refused():
    with pytest.raises(UserError, match=r"lengths=100: .*common_words, which has at least \d+"):
        fitting(BYTE_TOKENIZER, "common_words", [0, 0], [], 100)


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("tokenizer", [BYTE_TOKENIZER, BEGINS], ids=["bytes", "begins"])
def test_generated_demonstrations_are_read_as_far_as_they_fit(name, tokenizer):
    alone = fitting(tokenizer, name, [7, 0], TEXT, 12000)
    several = fitting(tokenizer, name, [7, 0], TEXT, 12000, shown=(name, 7, 2))
    assert (alone.shots, several.shots) == (0, 2)
    assert 12000 - UNIT[name] < len(several.tokens) <= 12000
    assert several.answers == alone.answers
    assert several.tokens.count(255) == alone.tokens.count(255)
    text = written(several.tokens)
    assert text.count(written(alone.tokens).partition("\n\n")[0]) == 3  # its instruction
    size = len(fitting(tokenizer, name, [7, 0], TEXT, 12000, shown=(name, 7, 0)).tokens)
    assert size == len(alone.tokens)
    least = next(n for n in range(100, 12000, 50) if _fits(name, tokenizer, n))
    assert fitting(tokenizer, name, [7, 0], TEXT, least, shown=(name, 7, 2)).shots == 0


def _fits(name: str, tokenizer, most: int) -> bool:
    try:
        fitting(tokenizer, name, [7, 0], TEXT, most)
    except UserError:
        return False
    return True


@given(st.text("ab \n", max_size=40), st.integers(0, 60), st.sampled_from(["left", "middle"]))
def test_a_cut_prompt_has_all_tokens_that_there_is_room_for(text, room, truncate):
    example = Example("Read.", text, "Why?", ["so"])
    most = len("Read.\n\n\n\nWhy?") + room
    if not room and text:
        with pytest.raises(UserError, match="a question alone has"):
            cut_to(BYTE_TOKENIZER, example, most, truncate)
        return
    prompt = cut_to(BYTE_TOKENIZER, example, most, truncate)
    assert prompt.cut == max(0, len(text) - room)
    assert len(prompt.tokens) + prompt.cut >= len(text) + len("Read.\n\nWhy?")
    assert len(prompt.tokens) <= most


texts = st.text("abc", min_size=1, max_size=60)


@given(
    *(texts, st.lists(texts, max_size=4), st.integers(0, 200)),
    *(st.sampled_from([None, "left", "middle"]), st.sampled_from([BYTE_TOKENIZER, BEGINS])),
)
@settings(max_examples=400)
def test_as_many_demonstrations_are_read_as_there_is_room_for(
    text, others, room, truncate, tokenizer
):
    example = Example("Read.", text, "Why?", ["so"])
    shown = [solved(Example("Read.", other, "Who?", ["I"])) for other in others]
    bos = len(tokenizer.start(""))
    most = bos + len(f"Read.\n\n{'' if truncate else text}\n\nWhy?") + 1 + room
    prompt = with_shots(tokenizer, example, shown, most, truncate)
    said = written(prompt.tokens)
    assert len(prompt.tokens) <= most
    assert prompt.tokens.count(255) == bos
    assert said.endswith("\n\nWhy?")
    assert said.count("Who? I\n\n") == prompt.shots
    usable = [one for one in shown if one.context != text]
    sizes = [len(f"Read.\n\n{one.context}\n\nWho? I\n\n") for one in usable]
    if truncate is None:
        assert prompt.cut == prompt.shots_cut == 0
        left = most - bos - len(f"Read.\n\n{text}\n\nWhy?")
        expected = 0
        for size in sizes:  # each whole, in order, or left out
            if size <= left:
                left, expected = left - size, expected + 1
        assert prompt.shots == expected
        return
    kept = sum(len(one.context) for one in usable) - prompt.shots_cut
    if prompt.shots == len(usable):
        around = len("Read.\n\n\n\nWho? I\n\n") * len(usable) + len("Read.\n\n\n\nWhy?")
        assert len(prompt.tokens) == bos + kept + len(text) - prompt.cut + around
    unused = most - len(prompt.tokens)
    if unused:  # what is read is whole, and there is no room for any of the others
        assert prompt.cut == prompt.shots_cut == 0
        assert prompt.shots == len(usable) or unused < len("Read.\n\nx\n\nWho? I\n\n")
    if bos + len(f"Read.\n\n{text}\n\nWhy?") + sum(sizes) <= most:
        assert (prompt.shots, prompt.cut, prompt.shots_cut) == (len(usable), 0, 0)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 200))
def test_a_room_is_divided_to_one_level(sizes, room):
    shares = levelled(sizes, room)
    assert sum(shares) == min(room, sum(sizes))
    cut = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert all(share <= size for share, size in zip(shares, sizes, strict=True))
    assert max(cut, default=0) - min(cut, default=0) <= 1
    assert all(share <= min(cut, default=50) + 1 for share in shares)


def test_a_tested_text_that_is_short_leaves_its_share_to_the_demonstrations():
    example = Example("", "short", "Why?", ["so"])
    shown = [solved(Example("", "x" * 1000, "Who?", ["I"]))]
    prompt = with_shots(BYTE_TOKENIZER, example, shown, 500, "middle")
    assert (prompt.shots, prompt.cut, len(prompt.tokens)) == (1, 0, 500)
    long = Example("", "y" * 1000, "Why?", ["so"])
    both = with_shots(BYTE_TOKENIZER, long, shown, 500, "left")
    assert (both.shots, len(both.tokens)) == (1, 500)
    said = written(both.tokens)
    assert said.count("x") + len("\n\nWho? I\n\n") == 250


def test_one_of_the_tested_text_itself_is_no_demonstration():
    example = Example("", "text", "Why?", ["so"])
    shown = [solved(Example("", "text", "Who?", ["I"])), solved(Example("", "b", "Who?", ["J"]))]
    prompt = with_shots(BYTE_TOKENIZER, example, shown, 500, None)
    assert prompt.shots == 1
    assert "J" in written(prompt.tokens)
    assert written(prompt.tokens).count("text") == 1


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    KINDS[request.param]().save(str(path))
    return open_tokenizer(str(path))


def decoded(tokenizer, prompt) -> str:
    return "".join(tokenizer.decode(prompt.tokens))


@pytest.mark.parametrize("truncate", [None, "left", "middle"])
def test_a_whole_prompt_has_its_text_under_every_tokenizer(kind, truncate):
    example = Example("the cat", "then a\n", "ten?", ["so"])
    shown = [solved(Example("", text, "dad?", ["I"])) for text in ("the", "a cat", "hen")]
    prompt = with_shots(kind, example, shown, 10_000, truncate)
    expected = with_shots(BYTE_TOKENIZER, example, shown, 10_000, truncate)
    assert decoded(kind, prompt) == written(expected.tokens)
    assert prompt.shots == expected.shots == 3
    for most in range(20, 120):  # cut where it must be, and never longer
        try:
            found = with_shots(kind, example, shown, most, truncate)
        except UserError:
            continue
        assert len(found.tokens) <= most
        assert decoded(kind, found).endswith("\n\nten?")
        if not found.cut + found.shots_cut:  # what is read is a whole text
            assert found.tokens == kind.tokens(decoded(kind, found))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_demonstrations_have_their_text_under_every_tokenizer(kind, name):
    prompt = fitting(kind, name, [7, 0], TEXT, 12_000, shown=(name, 7, 2))
    assert prompt.shots == 2
    assert len(prompt.tokens) <= 12_000
    assert prompt.tokens == kind.tokens(decoded(kind, prompt))
