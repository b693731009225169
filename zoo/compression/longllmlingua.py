"""LongLLMLingua: LLMLingua that knows the question (Jiang 2023, section 4, arXiv 2310.06839).

    r_k      log p(x_que, x_restrict | x_doc_k) per token: how likely document k makes the question
             (equation 2); the documents are ranked by it and reordered, the best first
    tau_k    max(min((1 - 2 I(r_k) / K') dtau + tau_dems, 1), 0), I(r_k) the rank from 0 on, K' the
             documents that are left: better ones keep more (equation 5)
    s_i      log p(x_i | x_que, x_<i) - log p(x_i | x_<i), contrastive perplexity: the tokens that
             the question makes likelier are kept (equation 3)

The budgets of the documents are moved by one number until they meet the whole's. The paper's
recovery of subsequences, which mends an answer afterwards, is not part of a compression.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from jaxtyping import Float

from zoo.compression.llmlingua import SEGMENT, PromptPart, TokenInformation, budgets, by_token
from zoo.compression.prompt import Prompt
from zoo.compression.scorer import Scorer
from zoo.config.domains import Positive, Range
from zoo.errors import refuse

RESTRICTION = " We can get the answer to this question in the given documents."


def compress(
    scorer: Scorer,
    prompt: Prompt,
    budget: int,
    *,
    segment: Positive = SEGMENT,
    instruction_rate: Annotated[float, Range(0, 1)] = 0.85,
    question_rate: Annotated[float, Range(0, 1)] = 1.0,
    granularity: Annotated[float, Range(1)] = 2.0,
    spread: Annotated[float, Range(0, 1)] = 0.3,
) -> list[int]:
    """Keep `budget` tokens of a prompt, the documents that its question is about first.

    Args:
        segment, instruction_rate, question_rate, granularity: as of LLMLingua.
        spread: dtau, by which the best document's share exceeds the mean.

    Raises:
        UserError: the prompt has no question.
    """
    if not prompt.question:
        rule = "must have a question, by which its documents are ranked"
        refuse("question", "", rule, "Give one, or use the method llmlingua")
    relevance = [relevance_of(scorer, prompt, one) for one in prompt.demonstrations]
    rates = instruction_rate, question_rate
    chosen, ins, dems, que = budgets(prompt, budget, relevance, rates, granularity)
    ranked = sorted(chosen, key=lambda one: (-relevance[one], one))
    sizes = {one: prompt.size(prompt.demonstrations[one]) for one in ranked}
    shares = document_rates([*sizes.values()], dems, spread)
    documents = [
        PromptPart(prompt.demonstrations[one], share * sizes[one])
        for one, share in zip(ranked, shares, strict=True)
    ]
    parts = [PromptPart(prompt.instruction, ins), *documents, PromptPart(prompt.question, que)]
    return by_token(prompt, parts, segment, Contrast(scorer, prompt.tokens(prompt.question)))


def relevance_of(scorer: Scorer, prompt: Prompt, document: Sequence[int]) -> float:
    """r_k: the mean log p of the question and the restriction after a document."""
    conditioned = [*prompt.tokens(prompt.question), *scorer.tokenizer.further(RESTRICTION)]
    prefix = scorer.read(scorer.start(), prompt.tokens(document))
    return -float(scorer.information(prefix, conditioned).mean())


def document_rates(sizes: Sequence[int], budget: float, spread: float) -> list[float]:
    """tau_k of documents, best first, moved by one number so that they keep `budget` tokens."""
    count, total = len(sizes), sum(sizes)
    if not total:
        return []
    rank = np.arange(count)
    bent = (1 - 2 * rank / count) * spread + budget / total
    low, high = -2.0 - spread, 2.0 + spread
    for _ in range(60):  # the sum grows with the shift
        shift = (low + high) / 2
        rates = np.clip(bent + shift, 0, 1)
        low, high = (shift, high) if rates @ np.asarray(sizes) < budget else (low, shift)
    return np.clip(bent + high, 0, 1).tolist()


class Contrast(TokenInformation):
    """How much likelier the question makes each token."""

    def __init__(self, scorer: Scorer, question: Sequence[int]) -> None:
        super().__init__(scorer)
        self.conditioned = TokenInformation(scorer)
        self.conditioned.keep(question)

    def of(self, tokens: Sequence[int]) -> Float[np.ndarray, " t"]:
        return super().of(tokens) - self.conditioned.of(tokens)

    def keep(self, tokens: Sequence[int]) -> None:
        super().keep(tokens)
        self.conditioned.keep(tokens)
