"""How likely a model finds continuations of texts, and what it writes on from many of them.

Texts are causal models' own: outputs do not depend on what follows, so that rows of one batch may
have different lengths.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from zoo.model.arithmetic import arithmetic
from zoo.model.backbone import Backbone, BackboneState
from zoo.model.generation import Sampling
from zoo.model.shared_prefixes import (
    Read,
    Rest,
    Tokens,
    padded,
    plan,
    repeated,
    walk,
)
from zoo.ops.dtypes import wide_dtype


class Likelihood(NamedTuple):
    """Of a continuation: its log-likelihood in nats, and whether each token is the likeliest."""

    nats: float
    greedy: bool


class _Sums:
    """Log-likelihoods of continuations, added up as their tokens are read."""

    def __init__(self, model: Backbone, pairs: Sequence[tuple[Tokens, Tokens]]) -> None:
        self.model = model
        self.whole = [[*context, *rest] for context, rest in pairs]
        self.first = [len(context) - 1 for context, _ in pairs]  # place that predicts a target
        self.nats, self.greedy = [0.0] * len(pairs), [True] * len(pairs)

    def add(self, read: Read) -> None:
        """Score what was read of some sequences."""
        for row, member in enumerate(read.members):
            whole, x = self.whole[member], read.x[0 if read.common else row]
            low = max(self.first[member], read.start)
            high = min(len(whole) - 1, read.start + len(x))
            if low >= high:
                continue
            logits = self.model.head(x[low - read.start : high - read.start])
            targets = torch.tensor(whole[low + 1 : high + 1], device=x.device)[:, None]
            chances = logits.to(wide_dtype(logits)).log_softmax(-1)
            self.nats[member] += float(chances.gather(1, targets).double().sum())
            self.greedy[member] &= bool((chances.argmax(1) == targets[:, 0]).all())


def likelihoods(
    model: Backbone,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    rows: int,
    precision: str = "32-true",
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    Args:
        pairs: (context, continuation), of at least one token each.
        rows: sequences that are read at a time.
        precision: of the arithmetic, by Lightning's name.
    """
    if not pairs:
        return []
    sums, device = _Sums(model, pairs), next(model.parameters()).device
    inputs = [whole[:-1] for whole in sums.whole]
    with arithmetic(model, precision, device):
        for found in walk(model, inputs, plan(inputs)):
            if isinstance(found, Read):
                sums.add(found)
                continue
            for members in _batches(found, inputs, rows):
                texts = [inputs[i][found.start :] for i in members]
                before = repeated(found.state, len(members)) if found.start else None
                x, _ = model.hidden(padded(texts, device), before)
                sums.add(Read(members, found.start, x, False))
    return [Likelihood(*one) for one in zip(sums.nats, sums.greedy, strict=True)]


def _batches(rest: Rest, sequences: Sequence[Tokens], rows: int) -> Iterator[list[int]]:
    """Members with something left to read, those of like lengths together."""
    left = [i for i in rest.members if len(sequences[i]) > rest.start]
    left.sort(key=lambda i: len(sequences[i]))
    return (left[at : at + rows] for at in range(0, len(left), rows))


def write_many(
    model: Backbone,
    prompts: Sequence[Tokens],
    *,
    tokens: int,
    sampling: Sampling,
    stops: Callable[[Tokens, Tokens], bool],
    rows: int,
    precision: str = "32-true",
) -> list[list[int]]:
    """The tokens that a model writes after each prompt, at most `tokens` of each.

    Args:
        prompts: of at least one token each; those of equal length are written on together.
        sampling: how a token is chosen; every prompt begins with its seed.
        stops: (prompt, written) -> whether the text has ended; called after each token.
        rows, precision: as for `likelihoods`.
    """
    if not prompts:
        return []
    written: dict[int, list[int]] = {}
    device = next(model.parameters()).device
    with arithmetic(model, precision, device):
        for rest in _ends(walk(model, heads := [p[:-1] for p in prompts], plan(heads))):
            for members in _alike(rest, prompts, rows):
                texts = [prompts[i][rest.start :] for i in members]
                state = repeated(rest.state, len(members))
                found = _write(model, texts, state, tokens, sampling, stops, device)
                written |= dict(zip(members, found, strict=True))
    return [written[i] for i in range(len(prompts))]


def _ends(found: Iterable[Read | Rest]) -> Iterator[Rest]:
    return (one for one in found if isinstance(one, Rest))


def _alike(rest: Rest, prompts: Sequence[Tokens], rows: int) -> Iterator[list[int]]:
    """Members of one length, at most `rows` at a time."""
    by_length: dict[int, list[int]] = {}
    for i in rest.members:
        by_length.setdefault(len(prompts[i]), []).append(i)
    for same in by_length.values():
        yield from (same[at : at + rows] for at in range(0, len(same), rows))


def _write(
    model: Backbone,
    texts: Sequence[Tokens],
    state: BackboneState,
    tokens: int,
    sampling: Sampling,
    stops: Callable[[Tokens, Tokens], bool],
    device: torch.device,
) -> list[list[int]]:
    """Write on from texts of equal length, each with random numbers of its own."""
    draws = [sampling.start() for _ in texts]
    written: list[list[int]] = [[] for _ in texts]
    going, batch = set(range(len(texts))), padded(texts, device)
    for _ in range(tokens):
        x, after = model.hidden(batch, state)
        assert after is not None
        state = after
        logits = model.head(x[:, -1])
        wide = logits.to(wide_dtype(logits))
        if not torch.isfinite(wide).all():
            raise ArithmeticError("the model's outputs are not finite numbers")
        batch = torch.zeros_like(batch[:, :1])
        for row in sorted(going):
            token = draws[row](wide[row])
            written[row].append(token)
            batch[row] = token
            if stops(texts[row], written[row]):
                going.remove(row)
        if not going:
            break
    return written
