"""Selective Context: drop a text's units of least information (Li 2023, sections 3.1-3.3, arXiv
2310.06201).

    I(x_t)      -log p(x_t | x_<t), equation 1, here given the whole text before
    I(u)        the sum of its tokens' I, equation 4; or their mean (form=mean), as in the authors'
                program, which scores each sentence by itself and fails beyond its scorer's window
    I_p         the p-th percentile of the I(u): units below it are dropped, equation 6

p is the one that meets the budget: units are kept from the highest I(u) on, ties from the front.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from zoo.compression.prompt import Prompt
from zoo.compression.scorer import Scorer
from zoo.compression.units import units
from zoo.errors import choose


def compress(
    scorer: Scorer, prompt: Prompt, budget: int, *, unit: str = "phrase", form: str = "sum"
) -> list[int]:
    """Keep the units of a prompt's demonstrations with most information; the rest of it stays.

    Args:
        budget: tokens to keep, met within half a unit.
        unit: token, word, phrase or sentence.
        form: of I(u): sum or mean.
    """
    information = piece_information(scorer, prompt)
    inside = [number for part in prompt.demonstrations for number in part]
    fixed = [*prompt.instruction, *prompt.question]
    if not inside:
        inside, fixed = fixed, []
    first = inside[0]
    ranges = [
        range(first + one.start, first + one.stop)
        for one in units([prompt.pieces[number] for number in inside], unit)
    ]
    scores = unit_information(information, [prompt.size([n]) for n in range(len(prompt.pieces))],
                              ranges, form)  # fmt: skip
    sizes = [prompt.size(one) for one in ranges]
    kept = highest(scores, sizes, budget - prompt.size(fixed))
    return sorted([*fixed, *(number for one in kept for number in ranges[one])])


def piece_information(scorer: Scorer, prompt: Prompt) -> Float[np.ndarray, " pieces"]:
    """I of every piece given all before it: the sum of its tokens'."""
    every = range(len(prompt.pieces))
    nats = scorer.information(scorer.start(), prompt.tokens(every))
    edges = np.cumsum([0, *(len(piece.tokens) for piece in prompt.pieces)])
    return np.add.reduceat(nats, edges[:-1])


def unit_information(
    information: Float[np.ndarray, " pieces"],
    sizes: Sequence[int],
    ranges: Sequence[range],
    form: str = "sum",
) -> Float[np.ndarray, " units"]:
    """I(u) of every unit: the sum over its tokens, or their mean."""
    choose("form", form, ["sum", "mean"])
    sums = np.array([information[one.start : one.stop].sum() for one in ranges])
    if form == "sum":
        return sums
    return sums / np.array([sum(sizes[one.start : one.stop]) for one in ranges])


def highest(scores: Float[np.ndarray, " units"], sizes: Sequence[int], budget: float) -> list[int]:
    """The units of the highest scores, as many as come nearest to a budget of tokens, in order."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    kept, total = [], 0
    for one in order.tolist():
        if total + sizes[one] - budget > budget - total:  # farther from it than without the unit
            break
        kept.append(one)
        total += sizes[one]
    return sorted(kept)
