"""Passkey retrieval by length and depth: does the model find what it read that far back?

A prompt states a key of `DIGITS` digits at some depth of the corpus's own text and asks for it at
its end (zoo.data.passkey; Mohtashami & Jaggi 2023). Two answers are counted:

    accuracy    forced choice: the key has a higher likelihood than each of `candidates` - 1 other
                random keys; chance is 1 / candidates
    exact       greedy decoding writes the key; chance is 10^-DIGITS

Prompt i has the same key, the same other candidates and the same relative depth at every length,
and a longer one begins earlier in the same text: all models and lengths are asked the same. A model
answers from the state that the prompt left. Intervals are Wilson's, over prompts.

What is low at every length was not learned: train with `data.passkey=`.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Int

from zoo.data.loader import evaluation_text
from zoo.data.passkey import DIGITS, passkey_prompt, random_key, tokens
from zoo.errors import UserError
from zoo.report.rows import wilson
from zoo.tasks.context import (
    MAX_COUNT,
    EvalContext,
    Row,
    check_counts,
    check_length,
    check_lengths,
    check_state,
    chunk_tokens,
    nats,
    run_guarded,
)
from zoo.tasks.perplexity import BATCH_TOKENS, TIMES

PAD = -1  # after the end of a key that has fewer tokens than another


def measure(
    context: EvalContext,
    *,
    lengths: Sequence[int] | None = None,
    depths: int = 5,
    repeats: int = 10,
    candidates: int = 10,
    seed: int = 0,
    chunk: int = 4096,
) -> Iterator[Row]:
    """One row per length, with the counts of each depth: `depths` of them from 0 to 1.

    `lengths` (tokens, prompt and answer) are 1, 2 .. 32 times the training length unless given.
    Each of them reads depths * repeats prompts, `chunk` tokens at a time.
    """
    lengths = [*(lengths or (times * context.train_length for times in TIMES))]
    lengths = check_lengths("passkey", lengths, least=DIGITS + 1)
    check_counts("passkey", depths=depths, chunk=chunk)
    check_counts("passkey", repeats=repeats, most=MAX_COUNT // depths)
    check_counts("passkey", candidates=candidates, least=2, most=10**DIGITS)
    check_counts("passkey", seed=seed, least=0, most=2**63)
    documents, count = context.corpus.eval_documents, depths * repeats
    questions = [_keys(seed, index, candidates) for index in range(count)]
    asked = {"split": context.split, "documents": documents, "unit": lengths[-1], "count": count}
    asked |= {"depths": np.linspace(0, 1, depths).tolist(), "candidates": candidates}
    asked |= {"digits": DIGITS, "key_seed": seed}
    found = run_guarded(lambda: evaluation_text(context.store, lengths[-1], count, documents))
    for length in lengths:
        named = asked | {"length": length}
        if not found.ok:  # no stretch is long enough
            yield named | found.row
        elif not context.measured(named):
            outcome = run_guarded(partial(_ask, context, found.value, named, questions, chunk))
            yield named | outcome.row | (outcome.value or {})


def _keys(seed: int, index: int, count: int) -> list[str]:
    """The key of a prompt, then other ones."""
    generator = np.random.default_rng([seed, index])
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[random_key(generator)] = None
    return list(keys)


def _ask(
    context: EvalContext,
    text: Int[np.ndarray, "units t"],
    asked: Row,
    questions: Sequence[Sequence[str]],
    chunk: int,
) -> Row:
    """How often the model finds the key at the length asked, over all prompts and by depth."""
    encode, depths, length = context.corpus.encode, asked["depths"], asked["length"]
    check_length(context.model, length)
    prompts = [
        passkey_prompt(
            text[i // len(depths) % len(text)][-(length - DIGITS) :],
            keys[0],
            depths[i % len(depths)],
            encode,
        )
        for i, keys in enumerate(questions)
    ]
    rows = max(1, chunk_tokens(context, BATCH_TOKENS) // length)
    context.progress.begin(f"passkey at {length}", len(prompts) * length)
    right = []
    with context.arithmetic():
        for first in range(0, len(prompts), rows):
            batch = slice(first, first + rows)
            answers = [[tokens(name, encode) for name in keys] for keys in questions[batch]]
            right.append(_answer(context, np.stack(prompts[batch]), answers, chunk))
        state_bytes = context.model.state_bytes(length)
    chosen, written = np.concatenate(right).reshape(-1, len(depths), 2).sum(0).T  # by depth
    count = len(questions)
    return {
        "accuracy": chosen.sum() / count,
        "interval": wilson(chosen.sum(), count),
        "chance": 1 / asked["candidates"],
        "correct": int(chosen.sum()),
        "correct_by_depth": chosen.tolist(),
        "exact": written.sum() / count,
        "exact_interval": wilson(written.sum(), count),
        "exact_chance": 10.0**-DIGITS,
        "exact_correct": int(written.sum()),
        "exact_by_depth": written.tolist(),
        "state_bytes": state_bytes,
    }


def _answer(
    context: EvalContext,
    prompts: Int[np.ndarray, "b t"],
    answers: Sequence[Sequence[Int[np.ndarray, " k"]]],
    chunk: int,
) -> Bool[np.ndarray, "b 2"]:
    """Whether each prompt's first answer is the likeliest, and is what greedy decoding writes."""
    model, text = context.model, torch.from_numpy(prompts)
    state = model.empty_state(len(text))
    for piece in text.split(chunk_tokens(context, chunk), 1):
        logits, state = model(piece.to(context.device), state)
        context.progress.advance(piece.numel())
    check_state(model, state, len(text))
    last = logits[:, -1:]
    longest = max(len(answer) for several in answers for answer in several)
    padded = np.full((len(answers), len(answers[0]), longest), PAD)
    for row, several in enumerate(answers):
        if len({tuple(answer) for answer in several}) < len(several):
            raise UserError("passkey: this tokeniser writes different keys alike")
        for column, answer in enumerate(several):
            padded[row, column, : len(answer)] = answer
    wanted = torch.from_numpy(padded).to(context.device)  # a key's end is not asked for
    costs = []
    for answer in wanted.unbind(1):
        logits = last
        if longest > 1:
            logits = torch.cat([last, model(answer[:, :-1].clamp(min=0), state)[0]], 1)
        costs.append(nats(logits, answer.clamp(min=0)).masked_fill(answer == PAD, 0).sum(1))
    first, *others = costs
    if not torch.isfinite(torch.stack(costs)).all():
        raise ArithmeticError("the model's outputs are not finite numbers")
    written = [last.argmax(-1)]
    for _ in range(longest - 1):
        logits, state = model(written[-1], state)
        written.append(logits[:, -1:].argmax(-1))
    same = (torch.cat(written, 1) == wanted[:, 0]) | (wanted[:, 0] == PAD)
    return torch.stack([first < torch.stack(others).amin(0), same.all(1)], 1).cpu().numpy()
