"""Prompts of long texts: an example within so many tokens, with demonstrations before it.

A prompt is an instruction, a text and a question, apart by empty lines; a demonstration is one with
its answer, before it. Texts are cut on their tokens alone, and what was cut is counted.

Of several demonstrations as many are read as there is room for. Where texts are cut, the tested one
and the demonstrations are cut to one size, to which shorter ones leave what they do not need: the
length is filled, or all that is read is whole. Where texts are not cut, each is read whole or left
out, after the tested one has its place.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zoo.data.long_contexts import GENERATED, Example
from zoo.data.tokenizers import Tokenizer
from zoo.errors import refuse

BREAK = "\n\n"
Generated = tuple[str, int, int]  # of demonstrations: data set, seed, how many


class LongPrompt(NamedTuple):
    """A prompt's tokens, the right answers, and what there was no room for."""

    tokens: list[int]
    answers: list[str]
    cut: int = 0  # tokens of its text
    shots: int = 0  # demonstrations that are in it
    shots_cut: int = 0  # tokens of their texts


def least(
    tokenizer: Tokenizer,
    dataset: str,
    seed: list[int],
    text: Sequence[str],
    most: int,
    answer: int = 0,
) -> LongPrompt:
    """The generated example of size 0.

    `answer` more tokens are the length's, which a refusal names.

    Raises UserError where its prompt has more than `most` tokens.
    """
    found = _made(tokenizer, dataset, seed, text, 0)
    if len(found.tokens) > most:
        rule = (
            f"without the {answer} of the answer is shorter than any prompt of "
            f"dataset={dataset}, which has at least {len(found.tokens)} tokens"
        )
        refuse("task.documents.lengths", most + answer, rule, "Use a longer one")
    return found


def fitting(
    tokenizer: Tokenizer,
    dataset: str,
    seed: list[int],
    text: Sequence[str],
    most: int,
    answer: int = 0,
    shown: Generated | None = None,
) -> LongPrompt:
    """The generated example of the largest size whose prompt has at most so many tokens.

    Raises UserError as `least` does.
    """
    made = functools.partial(_made, tokenizer, dataset, seed, text)
    best, below, size = least(tokenizer, dataset, seed, text, most, answer), 0, 1
    before = []
    if shown:
        behind = made(0, further=True)
        room = most - max(len(best.tokens), len(behind.tokens))
        if before := _generated(tokenizer, shown, room):
            made, best = functools.partial(made, further=True), behind
            most -= sum(map(len, before))
    while len((found := made(size)).tokens) <= most and size < 2**24:
        best, below, size = found, size, 2 * size
    while size - below > 1:  # the largest that fits is in between
        middle = (below + size) // 2
        found = made(middle)
        if len(found.tokens) <= most:
            best, below = found, middle
        else:
            size = middle
    return _behind(tokenizer, before, best)


def _made(
    tokenizer: Tokenizer,
    dataset: str,
    seed: list[int],
    text: Sequence[str],
    size: int,
    *,
    further: bool = False,
) -> LongPrompt:
    """An example's prompt, `further` where demonstrations are before its text."""
    example = GENERATED[dataset](np.random.default_rng(seed), size, text)
    whole = BREAK.join((example.instruction, example.context, example.question))
    tokens = _tokens(tokenizer, whole, further)
    return LongPrompt([*tokenizer.start(""), *tokens], example.answers)


def _tokens(tokenizer: Tokenizer, text: str, further: bool) -> list[int]:
    """The tokens of a text, of one behind another where it is `further`."""
    return tokenizer.further(text) if further else tokenizer.tokens(text)


def _generated(tokenizer: Tokenizer, shown: Generated, room: int) -> list[list[int]]:
    """The demonstrations of size 0 that fit, in their order; their seeds are no example's."""
    dataset, seed, count = shown
    found: list[list[int]] = []
    for number in range(count):
        example = GENERATED[dataset](np.random.default_rng([seed, number, 1]), 0, [])
        text = _text(solved(example._replace(answers=[", ".join(example.answers)])))
        tokens = _tokens(tokenizer, f"{text}{BREAK}", bool(found))
        if len(tokens) > room:
            break
        found.append(tokens)
        room -= len(tokens)
    return found


def _behind(tokenizer: Tokenizer, before: Sequence[list[int]], prompt: LongPrompt) -> LongPrompt:
    """The prompt with demonstrations before it."""
    if not before:
        return prompt
    begin = len(tokenizer.start(""))
    tokens = prompt.tokens[:begin] + [token for one in before for token in one]
    return prompt._replace(tokens=tokens + prompt.tokens[begin:], shots=len(before))


def solved(example: Example) -> Example:
    """The example as a demonstration: the first of its answers behind its question."""
    return example._replace(question=f"{example.question} {example.answers[0]}".lstrip())


def _text(example: Example) -> str:
    parts = (example.instruction, example.context, example.question)
    return BREAK.join(part for part in parts if part)


def _cut(
    tokenizer: Tokenizer, example: Example, most: int, truncate: str | None, further: bool
) -> tuple[list[int], int] | None:
    """At most so many tokens of an example, and how many of its text were cut; None for no room.

    It is `further` where another is before it.
    """
    whole = _tokens(tokenizer, _text(example), further)
    if len(whole) <= most:
        return whole, 0
    before, behind = _around(tokenizer, example, further)
    text = _tokens(tokenizer, example.context, further or bool(before))
    room = most - len(before) - len(behind)
    if truncate is None or room < 1:
        return None
    kept = text[-room:]
    if truncate == "middle":
        kept = [*text[: room - room // 2], *text[len(text) - room // 2 :]]
    return [*before, *kept, *behind], len(text) - room


def _around(tokenizer: Tokenizer, example: Example, further: bool) -> tuple[list[int], list[int]]:
    """The tokens before an example's text, and behind it."""
    instruction = f"{example.instruction}{BREAK}" if example.instruction else ""
    before = _tokens(tokenizer, instruction, further)
    return before, tokenizer.further(f"{BREAK}{example.question}")


def _most_around(tokenizer: Tokenizer, example: Example) -> int:
    """As `_most`, of the tokens around an example's text."""
    every = [_around(tokenizer, example, further) for further in (False, True)]
    return max(len(before) + len(behind) for before, behind in every)


def _most(tokenizer: Tokenizer, text: str) -> int:
    """The tokens of a text where it is first or where it is not, whichever are more."""
    return max(len(tokenizer.tokens(text)), len(tokenizer.further(text)))


def cut_to(
    tokenizer: Tokenizer,
    example: Example,
    most: int,
    truncate: str | None,
    answer: int = 0,
    *,
    further: bool = False,
) -> LongPrompt:
    """A document's prompt of at most so many tokens, its text cut where it is longer.

    `answer` more are the length's, which a refusal names. The prompt is `further` where
    demonstrations are put before its text.

    Raises UserError where it is and `truncate` is None, and where question and instruction alone
    are.
    """
    start = tokenizer.start("")
    if (found := _cut(tokenizer, example, most - len(start), truncate, further)) is not None:
        return LongPrompt([*start, *found[0]], example.answers, found[1])
    if truncate is None:
        length = len(start) + len(tokenizer.tokens(_text(example)))
        rule = (
            f"an example has {length:,} tokens, more than a length of {most + answer:,} "
            f"without the {answer} of the answer"
        )
        refuse("task.documents.truncate", None, rule, "Use left or middle, or a longer length")
    alone = len(start) + sum(map(len, _around(tokenizer, example, further)))
    rule = f"without the {answer} of the answer is too short: a question alone has {alone} tokens"
    refuse("task.documents.lengths", most + answer, rule, "Use a longer one")


def with_shots(
    tokenizer: Tokenizer,
    example: Example,
    shown: Sequence[Example],
    most: int,
    truncate: str | None,
    answer: int = 0,
) -> LongPrompt:
    """A document's prompt behind as many of the demonstrations as there is room for.

    One of the tested text itself is left out. Raises UserError as `cut_to` does.
    """
    shown = [one for one in shown if one.context != example.context]
    if truncate is None:
        cut_to(tokenizer, example, most, None, answer)  # refuses what has no room
        left = most - len(tokenizer.start("")) - _most(tokenizer, _text(example))
        sizes = _whole_or_none(tokenizer, shown, left)
    else:
        sizes = _shared(tokenizer, example, shown, most)
    found, cut, end = [], 0, tokenizer.further(BREAK)
    for one, size in zip(shown, sizes, strict=True):
        if size:
            part = _cut(tokenizer, one, size - len(end), truncate, bool(found))
            assert part is not None, "a size has room for a question"
            found.append([*part[0], *end])
            cut += part[1]
    left = most - sum(map(len, found))
    prompt = cut_to(tokenizer, example, left, truncate, answer, further=bool(found))
    return _behind(tokenizer, found, prompt)._replace(shots_cut=cut)


def _size(tokenizer: Tokenizer, shown: Example) -> int:
    """The tokens of a whole demonstration."""
    return _most(tokenizer, _text(shown)) + len(tokenizer.further(BREAK))


def _whole_or_none(tokenizer: Tokenizer, shown: Sequence[Example], room: int) -> list[int]:
    """The tokens of each demonstration, in order, that fits into what those before it left."""
    sizes = []
    for one in shown:
        size = _size(tokenizer, one)
        sizes.append(size if size <= room else 0)
        room -= sizes[-1]
    return sizes


def _shared(
    tokenizer: Tokenizer, example: Example, shown: Sequence[Example], most: int
) -> list[int]:
    """The tokens that each demonstration has beside the tested example; 0 for one left out.

    Of those that cannot have as many as their question needs the last is left out, until all can.
    """
    end, start = len(tokenizer.further(BREAK)), len(tokenizer.start(""))
    whole = [start + _most(tokenizer, _text(example)), *(_size(tokenizer, one) for one in shown)]
    around = [_most_around(tokenizer, one) + 1 for one in (example, *shown)]
    extra = [start, *[end] * len(shown)]
    needs = [min(size, a + b) for size, a, b in zip(whole, around, extra, strict=True)]
    read, sizes = [*range(len(whole))], [0] * len(whole)
    while len(read) > 1:
        shares = dict(zip(read, levelled([whole[n] for n in read], most), strict=True))
        short = [n for n in read if shares[n] < needs[n]]
        if not short:
            break
        read.remove(max(short) or read[-1])  # never the tested one
    else:
        shares = {0: min(whole[0], most)}
    left = most - sum(shares.values())
    for n in range(1, len(whole)):
        if n not in shares and needs[n] <= left:  # all others are whole
            shares[n] = min(whole[n], left)
            left -= shares[n]
    for n, share in shares.items():
        sizes[n] = share
    return sizes[1:]


def levelled(sizes: Sequence[int], room: int) -> list[int]:
    """Divide a room among sizes: each has what it needs, or of those that need more, one level.

    Levels differ by 1 at most; nothing is left unless all have all.
    """
    shares, left = [0] * len(sizes), room
    for rank, n in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        shares[n] = min(sizes[n], left // (len(sizes) - rank))
        left -= shares[n]
    return shares
