"""Positions of a longer text for a short training window; strictly increasing, from 0 to L' - 1.

A model trained on `tokens` tokens at such positions has met the distances of a text of
`max_length` = L' tokens, at the cost of its own. Every function is one of its generator alone.
`scattered` and `skipped` place the windows of a training step: what `positions:` of an extension
names, (rows, tokens, L', generator) and its own options -> (rows, tokens).
"""

from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Generator, Tensor


def randomised(tokens: int, max_length: int, generator: Generator) -> Int[Tensor, " t"]:
    """A sorted sample without replacement (Ruoss 2023, section 3)."""
    _check(tokens, max_length)
    return torch.randperm(max_length, generator=generator)[:tokens].sort().values


def chunk_lengths(tokens: int, chunks: int, generator: Generator) -> list[int]:
    """`tokens` in so many runs at random (Zhu 2024, PoSE, section 3.2).

    Of two, the first is not the longer, as in the authors' program; more are cut uniformly.
    """
    if not 1 <= chunks <= tokens:
        raise ValueError(f"chunks={chunks}: must be from 1 to the number of tokens ({tokens}).")
    places = (tokens + 1) // 2 if chunks == 2 else tokens - 1
    cuts = torch.randperm(places, generator=generator)[: chunks - 1].sort().values + 1
    return [end - start for start, end in pairwise([0, *cuts.tolist(), tokens])]


def skip(lengths: list[int], max_length: int, generator: Generator) -> Int[Tensor, " t"]:
    """Runs of consecutive positions with random gaps between them (PoSE, section 3.2).

    Run i is moved by u_i, u_0 = 0, u_i uniform in u_(i-1) .. L' - tokens. The text is drawn by
    the same law: `skip(lengths, document_tokens, generator)` says which of its tokens to read.
    The label at a run's last token then lies across a jump in the text; the authors train on it.
    """
    tokens = sum(lengths)
    _check(tokens, max_length)
    moves = [0]
    for _ in lengths[1:]:
        end = max_length - tokens + 1
        moves.append(int(torch.randint(moves[-1], end, (), generator=generator)))
    return torch.arange(tokens) + torch.tensor(moves).repeat_interleave(torch.tensor(lengths))


def pose(
    tokens: int, max_length: int, generator: Generator, *, chunks: int = 2
) -> Int[Tensor, " t"]:
    """PoSE's positions for one example; see `skip` for its text."""
    return skip(chunk_lengths(tokens, chunks, generator), max_length, generator)


def scattered(rows: int, tokens: int, max_length: int, generator: Generator, /) -> Tensor:
    """Randomised positions, every row its own (Ruoss 2023, section 3).

    The paper draws positions in tests too; here, as in PoSE's comparison, tests read 0, 1, 2 ..
    """
    return torch.stack([randomised(tokens, max_length, generator) for _ in range(rows)])


def skipped(
    rows: int, tokens: int, max_length: int, generator: Generator, /, *, chunks: int = 2
) -> Tensor:
    """PoSE's positions, every row its own, over text without gaps (section 3.2, v_i = 0).

    The paper finds little between that and text with gaps, whose labels lie across the jumps.
    """
    found = [pose(tokens, max_length, generator, chunks=chunks) for _ in range(rows)]
    return torch.stack(found)


def _check(tokens: int, max_length: int) -> None:
    if not 0 < tokens <= max_length:
        raise ValueError(
            f"max_length={max_length}: must be at least the number of tokens ({tokens}), which "
            "must be positive."
        )
