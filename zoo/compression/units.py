"""Lexical units of a text: tokens, words, phrases and sentences, by a plain splitter.

The authors of Selective Context take noun phrases of spaCy's parser. Here a phrase is what is
between two punctuation marks or function words, each unit with the white space before it.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

from zoo.compression.prompt import Piece
from zoo.errors import choose

KINDS = ("token", "word", "phrase", "sentence")
WORD = re.compile(r"\s*\S+|\s+$")
CLOSING = "\"')\\]\u201d\u2019"  # what may be between a mark and the white space after it
SENTENCE_END = re.compile(f"[.!?][{CLOSING}]*$")
PHRASE_END = re.compile(f"[.,;:!?)\\]\u201d\u2013\u2014][{CLOSING}]*$")
FUNCTION_WORDS = """
a an the and or but nor so yet for of to in on at by with from into onto over under about as than
that which who whom whose when where while if because though although unless until
"""
OPENERS = frozenset(FUNCTION_WORDS.split())  # before one of these a new phrase begins


def units(pieces: Sequence[Piece], kind: str) -> list[range]:
    """Cut pieces into units: ranges of their numbers that follow each other.

    A piece belongs to the unit in which it begins.
    """
    choose("unit", kind, KINDS)
    if kind == "token":
        return [range(number, number + 1) for number in range(len(pieces))]
    text = "".join(piece.text for piece in pieces)
    begins = {0, *(_starts(text, kind))}
    at, cuts = 0, [0]
    for number, piece in enumerate(pieces):
        if number and any(at + i in begins for i in range(max(len(piece.text), 1))):
            # A piece that holds the boundary begins the unit, unless it only ends the one before.
            cuts.append(number if at in begins else number + 1)
        at += len(piece.text)
    edges = sorted({*cuts, len(pieces)})
    return [range(first, last) for first, last in pairwise(edges) if last > first]


def _starts(text: str, kind: str) -> list[int]:
    """Where units begin, in characters."""
    found, ends = [], True
    for word in WORD.finditer(text):
        bare = word[0].strip()
        new_paragraph = "\n\n" in word[0]
        function = bare.lower().strip("\"'(\u201c\u2018") in OPENERS
        if kind == "word" or ends or new_paragraph or (kind == "phrase" and function):
            found.append(word.start())
        ends = bool((SENTENCE_END if kind == "sentence" else PHRASE_END).search(bare))
    return found
