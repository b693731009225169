"""The tokens of a label are those that a line shows."""

import numpy as np
import pytest
from tokenizing import EVERY, opened

from zoo.data.demonstrations import LETTERS, lines
from zoo.data.tokenizers import BYTE_TOKENIZER
from zoo.errors import UserError


@pytest.mark.parametrize("kind", EVERY)
def test_every_line_is_its_question_its_label_and_the_same_end(kind, tmp_path):
    tokenizer = opened(kind, tmp_path)
    found = lines(tokenizer, 5, np.random.default_rng(0))
    ends = set()
    for _ in range(40):
        one = next(found.drawn)
        read_first = [*one.question, *found.labels[one.label]]
        assert one.shown[: len(read_first)] == read_first
        ends.add(tuple(one.shown[len(read_first) :]))
        read = "".join(tokenizer.decode(read_first))
        assert read.split(": ")[1] == LETTERS[one.label]
    assert len(ends) == 1


def merged(*pairs: tuple[bytes, int]):
    """Bytes, of which some together are one token."""

    def encode(document: bytes):
        tokens = [*document, 0]
        for text, token in pairs:
            at = document.find(text)
            if at >= 0:
                tokens[at : at + len(text)] = [token]
        return np.array(tokens)

    return BYTE_TOKENIZER._replace(encode=encode)


def test_labels_that_a_tokenizer_writes_alike_or_otherwise_elsewhere_are_refused():
    generator = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"^task=many_shot: .* writes different labels alike\."):
        lines(merged((b" A", 300), (b" C", 300)), 4, generator)
    with pytest.raises(UserError, match="a question otherwise where its label follows"):
        lines(merged((b": ", 300)), 4, generator)
    items = lines(merged((b"a:", 301), (b"i: ", 300)), 4, generator).drawn
    with pytest.raises(UserError, match="a question otherwise where its label follows"):
        [next(items) for _ in range(40)]
    items = lines(merged((b"e: B", 300), (b"e:", 301), (b" B\n", 302)), 4, generator).drawn
    with pytest.raises(UserError, match="otherwise"):
        [next(items) for _ in range(80)]
