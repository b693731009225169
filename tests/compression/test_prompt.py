"""A text in pieces and units."""

import pytest
from texts import text
from tokenizing import EVERY, opened

from zoo.compression.prompt import compressed, pieces_of, prompt_from, prompt_of
from zoo.compression.units import KINDS, units
from zoo.data.tokenizers import BYTE_TOKENIZER


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_whole_characters_and_units_of_them_the_whole_text(kind):
    whole = text(1)
    pieces = pieces_of(BYTE_TOKENIZER.tokens(whole), BYTE_TOKENIZER)
    assert "".join(piece.text for piece in pieces) == whole
    assert b"".join(bytes(piece.tokens) for piece in pieces) == whole.encode()
    assert all(len(piece.text) == 1 for piece in pieces)
    found = units(pieces, kind)
    assert [number for one in found for number in one] == [*range(len(pieces))]


def test_units_are_what_their_names_say():
    read = 'He left, and "she" stayed in town. Then? Rain.\n\nA new day'
    pieces = pieces_of(BYTE_TOKENIZER.tokens(read), BYTE_TOKENIZER)
    cut = {
        kind: ["".join(pieces[n].text for n in one) for one in units(pieces, kind)]
        for kind in KINDS
    }
    assert cut["sentence"] == [
        'He left, and "she" stayed in town.', " Then?", " Rain.", "\n\nA new day",
    ]  # fmt: skip
    assert cut["phrase"][:3] == ["He left,", ' and "she" stayed', " in town."]
    assert cut["word"][:4] == ["He", " left,", " and", ' "she"']
    assert cut["token"] == [piece.text for piece in pieces]


def test_a_prompt_within_the_budget_comes_back_whole():
    def never(*_):
        raise AssertionError

    prompt = prompt_of(text(2), BYTE_TOKENIZER, "Read.", "What?")
    assert prompt.text(prompt.instruction) == "Read."
    assert prompt.text(prompt.question) == "What?"
    assert len(prompt.demonstrations) == 13
    every = [*range(len(prompt.pieces))]
    assert compressed(never, None, prompt, rate=None, tokens=prompt.size()) == every


@pytest.mark.parametrize("kind", EVERY)
def test_all_pieces_together_are_the_tokens_and_the_text_of_the_whole(kind, tmp_path):
    """Also where a tokenizer puts a space before every text, and characters are several tokens."""
    tokenizer = opened(kind, tmp_path)
    parts = "Read the text.\n\n", f"the day.\n\n\nthe {text(2)}\n\n", "the caf\u00e9 \U0001f600?"
    instruction, around, question = parts
    prompt = prompt_of(around, tokenizer, instruction, question)
    every = range(len(prompt.pieces))
    assert prompt.tokens(every) == tokenizer.tokens("".join(parts))
    assert prompt.text(every) == "".join(parts)
    assert [prompt.text(prompt.instruction), prompt.text(prompt.question)] == [*parts[::2]]
    shown = [prompt.text(one) for one in prompt.demonstrations]
    assert "".join(shown) == around
    assert shown[:2] == ["the day.\n\n\n", shown[1]]
    assert all(one.endswith("\n\n") for one in shown)
    assert not any("\n\n" in one.rstrip() for one in shown)


@pytest.mark.parametrize("kind", EVERY)
def test_pieces_of_tokens_are_these_tokens_wherever_they_were_cut(kind, tmp_path):
    """A window begins within a word or a character, which a text of its own would not."""
    tokenizer = opened(kind, tmp_path)
    tokens = tokenizer.tokens("the \u7d42 the\n\nand \U0001f600 then the end the ")
    for first in range(12):
        for last in range(len(tokens) - 12, len(tokens)):
            prompt = prompt_from(tokens[first:last], tokenizer, tokens[last:])
            assert prompt.tokens(range(len(prompt.pieces))) == tokens[first:]
            behind = prompt.tokens(prompt.question)
            assert behind[len(behind) - len(tokens[last:]) :] == tokens[last:]
            read = "".join(tokenizer.decode(tokens[first:]))
            assert prompt.text(range(len(prompt.pieces))) == read
