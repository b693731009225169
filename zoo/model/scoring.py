"""How likely a model finds continuations of texts, and what it writes on from many of them.

Texts are causal models' own: outputs do not depend on what follows, so that rows of one batch may
have different lengths.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.data.tokenizers import Tokenizer
from zoo.mixers.paged_cache import paged
from zoo.model.arithmetic import arithmetic
from zoo.model.backbone import Backbone, BackboneState
from zoo.model.generation import Sampling, until
from zoo.model.row_batch import RowBatch
from zoo.model.shared_prefixes import (
    CHUNK,
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

    Up to `rows` texts of any lengths are written on together, a token each at a time; where one has
    ended the next prompt takes its place (Yu 2022, Orca, OSDI, section 3.1). What prompts begin
    with alike is read once, and its keys and values are kept once (zoo.mixers.paged_cache).

    Args:
        prompts: of at least one token each.
        sampling: how a token is chosen; every prompt begins with its seed.
        stops: (prompt, written) -> whether the text has ended; called after each token.
        rows, precision: as for `likelihoods`.
    """
    if not prompts:
        return []
    written: list[list[int]] = [[] for _ in prompts]
    draws = [sampling.start() for _ in prompts]

    def goes_on(text: int, logits: Tensor) -> bool:
        """Choose a token of a text; whether there is one more."""
        wide = logits.to(wide_dtype(logits))
        if not torch.isfinite(wide).all():
            raise ArithmeticError("the model's outputs are not finite numbers")
        written[text].append(draws[text](wide))
        return len(written[text]) < tokens and not stops(prompts[text], written[text])

    device, members = next(model.parameters()).device, []
    with arithmetic(model, precision, device), paged(model):
        waiting, batch = _read_prompts(model, prompts, device), RowBatch(model, [])
        while True:
            joining: list[tuple[int, BackboneState]] = []
            while len(members) + len(joining) < rows and (found := next(waiting, None)):
                text, logits, state = found
                if goes_on(text, logits):
                    joining.append((text, state))
            if joining:
                batch = RowBatch(model, [*batch.split(), *(state for _, state in joining)])
                members += [text for text, _ in joining]
            if not members:
                return written
            last = torch.tensor([written[text][-1:] for text in members], device=device)
            logits = model.head(batch.hidden(last)[:, -1])
            left = [row for row, text in enumerate(members) if goes_on(text, logits[row])]
            if len(left) < len(members):
                states = batch.split()
                batch = RowBatch(model, [states[row] for row in left])
                members = [members[row] for row in left]


def _read_prompts(
    model: Backbone, prompts: Sequence[Tokens], device: torch.device
) -> Iterator[tuple[int, Tensor, BackboneState]]:
    """Each prompt's place, the logits of the token after it, and its state."""
    heads = [prompt[:-1] for prompt in prompts]
    ends = (found for found in walk(model, heads, plan(heads)) if isinstance(found, Rest))
    for rest in ends:
        for text in rest.members:
            state, x = rest.state, None
            left = torch.tensor([[*prompts[text][rest.start :]]], device=device)
            for piece in left.split(CHUNK, 1):
                x, state = model.hidden(piece, state)
            assert x is not None, "a prompt has tokens"
            assert state is not None
            yield text, model.head(x[0, -1]), state


def finished_text(tokenizer: Tokenizer, before: Tokens, written: Tokens) -> str:
    """The text so far without a character at its end that the next tokens may finish."""
    read_all = []

    def source() -> Iterator[int]:
        yield from written
        read_all.append(True)

    # What comes after the end of the source is the unfinished character's stand-in.
    return "".join(piece for piece in tokenizer.decode(source(), before) if not read_all)


class WrittenText(NamedTuple):
    """A text that was written after a prompt.

    Attributes:
        tokens: that were drawn, without the one that ends a document.
        read: of those drawn, as many as the model has read: all but the last.
    """

    text: str
    tokens: int
    read: int


def write_texts(
    model: Backbone,
    tokenizer: Tokenizer,
    prompts: Sequence[Tokens],
    *,
    tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    rows: int,
    precision: str = "32-true",
) -> list[WrittenText]:
    """As `write_many`, the texts: up to one of the tokenizer's `ends`, or the first of the `stop`
    texts."""

    def ends(before: Tokens, written: Tokens) -> bool:
        if written[-1] in tokenizer.ends:
            return True
        text = finished_text(tokenizer, before, written) if stop else ""
        return any(word in text for word in stop)

    how = {"tokens": tokens, "sampling": sampling, "rows": rows, "precision": precision}
    said = []
    for before, one in zip(prompts, write_many(model, prompts, stops=ends, **how), strict=True):
        mine = one[:-1] if one and one[-1] in tokenizer.ends else one
        text = "".join(until(tokenizer.decode(mine, before), stop))
        said.append(WrittenText(text, len(mine), len(one) - 1))
    return said
