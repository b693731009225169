"""Passkeys: a key stated somewhere in a text and queried at its end (Mohtashami & Jaggi 2023,
"Landmark Attention", section 4.2), so made that small models learn to find it.

The filler is the corpus's own text, of which the sentences overwrite what was in their place. A
key has few digits and before it a sign that is rare in text: what is to follow the last such sign
is what followed an earlier one. With _ for the text:

    ____________________ The pass key is ~4071. ____________________ Pass key? ~4071. ____________

`passkey_prompt` ends where the key is to follow. A training window has up to `TIMES` questions, at
growing distances from the statement, so that it gives several examples to learn from.

Of several facts each key has a sign of its own, one of `SIGNS`, and a question names the sign: what
is to follow depends on which one is queried.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from zoo.data.tokenizers import Encode
from zoo.errors import refuse

DIGITS = 4
SIGNS = "~^|`@#$%+=<>{}\\_"  # rare in prose; of a single key the first
STATEMENT, QUESTION, END = "\nThe pass key is ~", "\nPass key? ~", ".\n"
TIMES = 8  # questions of a training window
STREAM = 0x9A55  # sets these random numbers apart from others of the same (seed, step, row)


class Passkeys(NamedTuple):
    """Keys in a `share` of the training windows, up to `facts` of them in one."""

    share: float
    encode: Encode
    facts: int = 1

    def plant(
        self, windows: Int[np.ndarray, "b t"], seeds: Sequence[Sequence[int]]
    ) -> Int[np.ndarray, "b t"]:
        """The windows, some of them with a passkey; each window's seed decides which, where, what.

        Raises UserError where a window has no room for one.
        """
        planted = windows.copy()
        for window, seed in zip(planted, seeds, strict=True):
            generator = np.random.default_rng([*seed, STREAM])
            chosen, depth = generator.random(2)
            stated, questions = self._facts(generator)
            size = max(map(len, questions))
            most = self.facts * max(map(len, stated)) + size
            if self.facts > 1 and most > len(window):
                rule = f"takes windows of {most} tokens, and these have {len(window)}"
                refuse("data.passkey_facts", self.facts, rule, "Use fewer, or a longer seq_len")
            if (least := sum(map(len, stated)) + size) > len(window):
                rule = f"must be at least {least - 1} tokens, to hold a passkey and its question"
                refuse("seq_len", len(window) - 1, rule)
            room = place(len(window), sum(map(len, stated)), size, depth)
            if chosen < self.share:
                gaps = np.sort([*generator.integers(room + 1, size=len(stated) - 1), room])
                after = 0
                for gap, before in zip(np.diff(gaps, prepend=0), stated, strict=True):
                    start = after + gap
                    after = start + len(before)
                    window[start:after] = before
                times = min(TIMES, (len(window) - after) // size)
                for end in after + (len(window) - after) * np.arange(1, times + 1) // times:
                    queried = questions[generator.integers(len(stated))]
                    window[end - len(queried) : end] = queried
        return planted

    def _facts(
        self, generator: np.random.Generator
    ) -> tuple[list[Int[np.ndarray, " t"]], list[Int[np.ndarray, " t"]]]:
        """The statements of a window, and for each of them its question with the answer."""
        keys, signs = [random_key(generator)], SIGNS
        if self.facts > 1:
            more = generator.integers(self.facts)
            keys += [random_key(generator) for _ in range(more)]
            signs = generator.permutation([*SIGNS]).tolist()
        facts = [*zip(signs, keys, strict=False)]
        stated = [sentence(STATEMENT, *fact, self.encode) for fact in facts]
        return stated, [sentence(QUESTION, *fact, self.encode) for fact in facts]


def passkey_prompt(
    filler: Int[np.ndarray, " t"], key: str, depth: float, encode: Encode
) -> Int[np.ndarray, " t"]:
    """The filler with the key stated at `depth`, 0 (at once) to 1 (last), and queried at the end.

    Raises UserError where it has no room for both.
    """
    stated = sentence(STATEMENT, SIGNS[0], key, encode)
    question = tokens(QUESTION, encode)
    start = place(len(filler), len(stated), len(question), depth)
    prompt = filler.copy()
    prompt[start : start + len(stated)] = stated
    prompt[len(prompt) - len(question) :] = question
    return prompt


def facts_prompt(
    filler: Int[np.ndarray, " t"], facts: Sequence[tuple[str, str]], queried: int, encode: Encode
) -> Int[np.ndarray, " t"]:
    """The filler with facts, each a sign and a key, evenly from its beginning to its end, and at
    the end the question for one of them, by its number.

    Raises UserError where it has no room for them.
    """
    stated = [sentence(STATEMENT, sign, key, encode) for sign, key in facts]
    question = tokens(signed(QUESTION, facts[queried][0]), encode)
    room = place(len(filler), sum(map(len, stated)), len(question), 1.0)
    prompt, before = filler.copy(), 0
    for number, words in enumerate(stated):
        start = before + round(number / max(1, len(stated) - 1) * room)
        prompt[start : start + len(words)] = words
        before += len(words)
    prompt[-len(question) :] = question
    return prompt


def sentence(words: str, sign: str, key: str, encode: Encode) -> Int[np.ndarray, " t"]:
    """A statement or a question with its sign, and the key behind it."""
    return np.concatenate([tokens(part, encode) for part in (signed(words, sign), key, END)])


def signed(words: str, sign: str) -> str:
    """A statement or a question, up to the key, with this sign."""
    return words[: -len(SIGNS[0])] + sign


def prompt_tokens(key: str, encode: Encode) -> int:
    """The least tokens that `passkey_prompt` has room in: the statement and the question."""
    return sum(len(tokens(part, encode)) for part in (STATEMENT, key, END, QUESTION))


def random_key(generator: np.random.Generator) -> str:
    return "".join(map(str, generator.integers(10, size=DIGITS)))


def tokens(text: str, encode: Encode) -> Int[np.ndarray, " t"]:
    """Without that of a document's end; a part of a sentence is the same at any place."""
    return np.array(encode(text.encode())[:-1], dtype=np.int64)


def place(size: int, stated: int, question: int, depth: float) -> int:
    """Where the statement starts in a text of `size` tokens that ends with the question."""
    room = size - stated - question
    if room < 0:
        rule = f"must be at least {stated + question} tokens, to hold a passkey and its question"
        refuse("length", size, rule)
    return round(depth * room)
