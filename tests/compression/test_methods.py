"""Every method against its paper's definition in float64, and the rates that it meets."""

import numpy as np
import pytest
from texts import information, scorer, text

from zoo.compression import llmlingua, longllmlingua, selective_context, truncation
from zoo.compression.prompt import Prompt, compressed, prompt_of
from zoo.compression.units import units
from zoo.data.tokenizers import BYTE_TOKENIZER
from zoo.errors import FORM, UserError

METHODS = {
    "selective_context": selective_context.compress,
    "llmlingua": llmlingua.compress,
    "longllmlingua": longllmlingua.compress,
    "truncation": truncation.compress,
}
INSTRUCTION, QUESTION = "Answer from the documents.\n", "Where was the house?"


def prompt(seed: int, paragraphs: int = 5, words: int = 12) -> Prompt:
    """ASCII alone, so that a piece is a token."""
    whole = text(seed, paragraphs, words).rpartition("\n\n")[0]
    return prompt_of(whole, BYTE_TOKENIZER, INSTRUCTION, QUESTION)


@pytest.mark.parametrize("name", METHODS)
def test_a_rate_is_met_within_two_per_cent_on_ten_texts(name):
    scored, most = scorer(), 0.0
    for seed in range(10):
        whole = prompt_of(text(seed, 6), BYTE_TOKENIZER, INSTRUCTION, QUESTION)
        for rate in (0.25, 0.6):
            kept = compressed(METHODS[name], scored, whole, rate=rate)
            assert len({*kept}) == len(kept)
            most = max(most, abs(whole.size(kept) / whole.size() - rate))
    assert most <= 0.02


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("given", [{"rate": 0.25}, {"rate": None, "tokens": 3}])
def test_something_is_left_of_every_prompt_or_the_budget_is_refused(name, given):
    scored, texts = scorer(), ["\U0001f33b" * 3, "終", "a" * 3, "ab" * 8, "a b. c"]
    ((option, value),) = [(key, one) for key, one in given.items() if one is not None]
    for number, whole in enumerate(texts):
        question = "?" if name == "longllmlingua" else ""
        prompt = prompt_of(whole, BYTE_TOKENIZER, question=question)
        try:
            kept, said = compressed(METHODS[name], scored, prompt, **given), None
        except UserError as error:
            kept, said = [], str(error)
        if said is None:
            assert number or question, "no emoji is within three bytes"
            assert prompt.size(kept) > 0
        else:
            assert said.startswith(f"{option}={value}: leaves nothing of a prompt of ")
            assert FORM.fullmatch(said)


@pytest.mark.parametrize("form", ["sum", "mean"])
@pytest.mark.parametrize("unit", ["token", "word", "phrase", "sentence"])
def test_selective_context_drops_the_units_below_a_percentile_of_their_information(unit, form):
    scored, whole = scorer(), prompt(3)
    tokens = [piece.tokens[0] for piece in whole.pieces]
    nats = information(scored, [], tokens)
    first, last = whole.demonstrations[0].start, whole.demonstrations[-1].stop
    ranges = [range(first + u.start, first + u.stop) for u in units(whole.pieces[first:last], unit)]
    scores = [sum(nats[i] for i in u) / (1 if form == "sum" else len(u)) for u in ranges]
    kept = selective_context.compress(scored, whole, len(tokens) // 2, unit=unit, form=form)
    inside = [n for n in kept if first <= n < last]
    assert [n for n in kept if not first <= n < last] == [*whole.instruction, *whole.question]
    left = [number for number, u in enumerate(ranges) if u.start in inside]
    assert inside == [n for number in left for n in ranges[number]]  # whole units
    dropped = [number for number in range(len(ranges)) if number not in left]
    p = 100 * len(dropped) / (len(ranges) - 1)  # of equation 6: as many lie strictly below
    threshold = np.percentile(scores, p, method="higher" if p < 100 else "lower")
    assert min(scores[n] for n in left) > max(scores[n] for n in dropped)
    assert min(scores[n] for n in left) <= threshold or len(left) == 1


def naive_llmlingua(scored, whole, budget, tau_ins=0.85, tau_que=0.9, k=2.0, segment=20):
    """Algorithms 1 and 2 of the paper, every probability from one reading of all before it."""
    tokens = [piece.tokens[0] for piece in whole.pieces]

    def of(numbers):
        return [tokens[n] for n in numbers]

    L_ins, L_que = len(whole.instruction), len(whole.question)
    L_dems = sum(map(len, whole.demonstrations))
    tau_dems = (budget - tau_ins * L_ins - tau_que * L_que) / L_dems  # equation 2
    ppl = [np.exp(information(scored, [], of(d)).mean()) for d in whole.demonstrations]
    room, chosen, L_D = k * tau_dems * L_dems, [], 0
    for d in sorted(range(len(ppl)), key=lambda d: -ppl[d]):
        size = len(whole.demonstrations[d])
        if chosen and L_D + size > room and tau_dems * L_dems <= L_D:
            break
        chosen.append(d)
        L_D += size
    dtau = max(room - L_D, 0) / (L_ins + L_que)  # equation 3
    ins, que = min(tau_ins + dtau, 1) * L_ins, min(tau_que + dtau, 1) * L_que
    if ins + que > budget:
        ins, que = (x * budget / (ins + que) for x in (ins, que))
    dems = min(budget - ins - que, L_D)
    inside = [n for d in sorted(chosen) for n in whole.demonstrations[d]]
    kept = []
    for numbers, target in ((whole.instruction, ins), (inside, dems), (whole.question, que)):
        done = 0
        for at in range(0, len(numbers), segment):
            own = [*numbers[at : at + segment]]
            nats = information(scored, of(kept), of(own))
            upto = round(target * (at + len(own)) / len(numbers))
            best = sorted(range(len(own)), key=lambda i: (-nats[i], i))[: upto - done]
            done += len(best)
            kept += [own[i] for i in sorted(best)]
    return kept


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.75])
def test_llmlingua_is_the_papers_two_algorithms(seed, rate):
    scored, whole = scorer(seed=seed), prompt(seed)
    budget = round(rate * len(whole.pieces))
    kept = llmlingua.compress(scored, whole, budget, segment=20)
    assert kept == naive_llmlingua(scored, whole, budget)


@pytest.mark.parametrize("seed", [0, 1])
def test_longllmlingua_ranks_by_the_question_and_keeps_what_it_makes_likelier(seed):
    scored, whole = scorer(seed=seed), prompt(seed)
    tokens = [piece.tokens[0] for piece in whole.pieces]

    def of(numbers):
        return [tokens[n] for n in numbers]

    question = of(whole.question)
    restriction = [*b" We can get the answer to this question in the given documents."]
    relevance = [
        -information(scored, of(d), [*question, *restriction]).mean() for d in whole.demonstrations
    ]
    kept = longllmlingua.compress(scored, whole, len(tokens) // 2, segment=20)
    places = [next(k for k, d in enumerate(whole.demonstrations) if n in d) for n in kept
              if any(n in d for d in whole.demonstrations)]  # fmt: skip
    order = [*dict.fromkeys(places)]
    assert order == sorted(order, key=lambda k: -relevance[k])  # reordered, the best first
    assert {*order} == {*sorted(range(5), key=lambda k: -relevance[k])[: len(order)]}

    # The first segment of the best document, by equation 3.
    own = [*whole.demonstrations[order[0]]][:20]
    before = of([n for n in kept if n in whole.instruction])
    contrast = information(scored, before, of(own)) - information(
        scored, [*question, *before], of(own)
    )
    left = [n in kept for n in own]
    assert min(contrast[i] for i in range(20) if left[i]) > max(
        (contrast[i] for i in range(20) if not left[i]), default=-np.inf
    )


def test_documents_keep_more_the_better_they_are_and_as_many_tokens_as_there_are_to_keep():
    sizes = [40, 10, 25, 60]
    for budget in (10, 60, 120):
        rates = longllmlingua.document_rates(sizes, budget, 0.3)
        assert np.dot(rates, sizes) == pytest.approx(budget)
        assert rates == sorted(rates, reverse=True)
        free = [r for r in rates if 0 < r < 1]
        steps = np.diff(free)  # equation 5: 2 dtau / K' from one to the next
        np.testing.assert_allclose(steps, -2 * 0.3 / 4, atol=1e-9)


def test_truncation_keeps_the_end_or_both_ends_beside_the_question():
    whole = prompt_of("abcdefghij" * 5, BYTE_TOKENIZER, question="?")
    kept = truncation.compress(None, whole, 11)
    assert whole.text(kept) == "abcdefghij?"
    kept = truncation.compress(None, whole, 11, side="middle")
    assert whole.text(kept) == "abcdefghij?"
    assert kept[:5] == [0, 1, 2, 3, 4]
