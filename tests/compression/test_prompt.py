"""A text in pieces and units."""

import pytest
from texts import text

from zoo.compression.prompt import compressed, pieces_of, prompt_of
from zoo.compression.units import KINDS, units
from zoo.data.tokenizers import BYTE_TOKENIZER


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_whole_characters_and_units_of_them_the_whole_text(kind):
    whole = text(1)
    pieces = pieces_of(whole, BYTE_TOKENIZER)
    assert "".join(piece.text for piece in pieces) == whole
    assert b"".join(bytes(piece.tokens) for piece in pieces) == whole.encode()
    assert all(len(piece.text) == 1 for piece in pieces)
    found = units(pieces, kind)
    assert [number for one in found for number in one] == [*range(len(pieces))]


def test_units_are_what_their_names_say():
    pieces = pieces_of(
        'He left, and "she" stayed in town. Then? Rain.\n\nA new day', BYTE_TOKENIZER
    )
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
