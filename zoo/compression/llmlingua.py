"""LLMLingua: a budget for each part of a prompt, whole demonstrations first, then tokens (Jiang
2023, section 4, arXiv 2310.05736).

    L, L_ins, L_dems, L_que    tokens of the prompt and of its parts; tau of each the share kept
    tau_dems                   (tau L - tau_ins L_ins - tau_que L_que) / L_dems, equation 2
    D                          the demonstrations of the highest perplexity, until they have k
                               tau_dems L_dems tokens (algorithm 1, k = `granularity`)
    dtau                       (k tau_dems L_dems - L_D) / (L_ins + L_que), equation 3: what is left
                               of that room goes to instruction and question
    s_j                        segments of what is left; s~_j what is kept of them
    p(s_j,i)                   given s_j,<i and s~_<j, equation 5 (algorithm 2): the tokens of the
                               lowest are dropped, as many as the budget of the segment's part says

The demonstrations that are left are compressed to what remains of the budget, so that the whole has
tau L tokens. A text without parts is its paragraphs, as demonstrations.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float

from zoo.compression.prompt import Prompt
from zoo.compression.scorer import Prefix, Scorer
from zoo.config.domains import Positive, Range

SEGMENT = 200  # tokens: the authors' program; the paper has 100


class PromptPart(NamedTuple):
    """Pieces of a prompt that share a budget, in tokens."""

    numbers: Sequence[int]
    budget: float


def compress(
    scorer: Scorer,
    prompt: Prompt,
    budget: int,
    *,
    segment: Positive = SEGMENT,
    instruction_rate: Annotated[float, Range(0, 1)] = 0.85,
    question_rate: Annotated[float, Range(0, 1)] = 0.9,
    granularity: Annotated[float, Range(1)] = 2.0,
) -> list[int]:
    """Keep `budget` tokens of a prompt.

    Args:
        segment: tokens of s_j.
        instruction_rate, question_rate: tau_ins and tau_que.
        granularity: k, how many times the demonstrations' budget whole ones may fill.
    """
    perplexity = scorer.means([prompt.tokens(one) for one in prompt.demonstrations])
    rates = instruction_rate, question_rate
    chosen, ins, dems, que = budgets(prompt, budget, perplexity, rates, granularity)
    inside = [number for one in chosen for number in prompt.demonstrations[one]]
    parts = [
        PromptPart(prompt.instruction, ins),
        PromptPart(inside, dems),
        PromptPart(prompt.question, que),
    ]
    return by_token(prompt, parts, segment, TokenInformation(scorer))


def budgets(
    prompt: Prompt,
    budget: float,
    ranking: Sequence[float],
    rates: tuple[float, float],
    granularity: float,
) -> tuple[list[int], float, float, float]:
    """The demonstrations that are left, and the tokens of instruction, demonstrations, question.

    Args:
        ranking: of each demonstration, highest first: its perplexity or a logarithm.
        rates: tau_ins and tau_que.
        granularity: k.
    """
    sizes = [prompt.size(one) for one in prompt.demonstrations]
    lengths = prompt.size(prompt.instruction), prompt.size(prompt.question)
    fixed = [rate * length for rate, length in zip(rates, lengths, strict=True)]
    room = budget - sum(fixed)
    if not sizes or room <= 0:  # instruction and question alone have the budget
        scale = min(1.0, budget / max(sum(fixed), 1e-9)) if sizes else budget / max(sum(lengths), 1)
        ins, que = (scale * x for x in (fixed if sizes else lengths))
        return [], ins, 0.0, que
    chosen, total = [], 0
    for one in np.argsort(-np.asarray(ranking), kind="stable").tolist():
        if chosen and total >= room and total + sizes[one] > granularity * room:
            break
        chosen.append(one)
        total += sizes[one]
    more = max(granularity * room - total, 0) / max(sum(lengths), 1)
    ins, que = (min(x + more * n, n) for x, n in zip(fixed, lengths, strict=True))
    dems = budget - ins - que
    if dems < 0:  # the room that was left is more than the budget has
        ins, que, dems = *(x * budget / (ins + que) for x in (ins, que)), 0.0
    return sorted(chosen), ins, min(dems, total), que


class TokenInformation:
    """p(s_j,i) given what was kept and the segment before it."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.prefix = scorer, scorer.start()

    def of(self, tokens: Sequence[int]) -> Float[np.ndarray, " t"]:
        """-log p of every token of the next segment."""
        return self.scorer.information(self.prefix, tokens)

    def keep(self, tokens: Sequence[int]) -> None:
        """Go on after these of the segment's tokens."""
        if tokens:
            self.prefix: Prefix = self.scorer.read(self.prefix, tokens)


def by_token(
    prompt: Prompt, parts: Sequence[PromptPart], segment: int, measure: TokenInformation
) -> list[int]:
    """Keep the tokens of every part with most information, by segments; in the parts' order."""
    kept: list[int] = []
    for numbers, budget in parts:
        length, before, taken = max(prompt.size(numbers), 1), 0, 0
        for own in _segments(prompt, numbers, segment):
            before += prompt.size(own)
            quota = round(budget * before / length) - taken  # no rounding adds up
            chosen = _highest(prompt, own, measure.of(prompt.tokens(own)), quota)
            taken += prompt.size(chosen)
            measure.keep(prompt.tokens(chosen))
            kept += chosen
    return kept


def _segments(prompt: Prompt, numbers: Sequence[int], tokens: int) -> list[list[int]]:
    """The pieces in segments of so many tokens, the last one shorter."""
    found: list[list[int]] = []
    size = tokens
    for number in numbers:
        if size >= tokens:
            found.append([])
            size = 0
        found[-1].append(number)
        size += prompt.size([number])
    return found


def _highest(
    prompt: Prompt, numbers: Sequence[int], nats: Float[np.ndarray, " t"], quota: int
) -> list[int]:
    """The pieces of a segment that carry most, up to `quota` tokens, in order."""
    sizes = [prompt.size([number]) for number in numbers]
    edges = np.cumsum([0, *sizes])
    scores = np.add.reduceat(nats, edges[:-1])
    chosen, total = [], 0
    for one in np.argsort(-scores, kind="stable").tolist():
        if total + sizes[one] <= quota:
            chosen.append(one)
            total += sizes[one]
    return [numbers[one] for one in sorted(chosen)]
