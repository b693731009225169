"""Reads many token sequences, what several of them begin with once, and the rest in batches.

Sequences are laid out as a tree: a node is a stretch of tokens that all sequences below it share.
Its state, read once, goes on into each of them, so that twenty answers to a question read it once
and a thousand questions read their common examples once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map_only

from zoo.model.backbone import Backbone, BackboneState

LEAST = 8  # tokens that sequences must share to be read together
CHUNK = 4096  # tokens that are read at a time

Tokens = Sequence[int]


@dataclass
class Node:
    """Tokens `start` .. `stop` of all `members`; `rest` are those that share no more with others.

    Sequences are named by their places in the list that `plan` was given.
    """

    start: int
    stop: int
    members: list[int]
    children: list["Node"] = field(default_factory=list)
    rest: list[int] = field(default_factory=list)


class Read(NamedTuple):
    """Tokens that were read of some sequences, and what the head reads of them.

    `x` (1, t, width) is the same for all members where `common`; (members, t, width) otherwise,
    where rows of shorter sequences end in padding. `state` is that after them, of shared ones.
    """

    members: list[int]
    start: int
    x: Float[Tensor, "b t width"]
    common: bool


class Rest(NamedTuple):
    """Sequences of which `start` tokens were read, which left `state`, of one row."""

    members: list[int]
    start: int
    state: BackboneState


def plan(sequences: Sequence[Tokens], least: int = LEAST) -> Node:
    """The tree of the sequences. Only stretches of `least` tokens and more are shared."""
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    common = {
        later: _common_length(sequences[one], sequences[later]) for one, later in pairwise(order)
    }
    return _node(sequences, order, 0, common, least)


def _node(
    sequences: Sequence[Tokens],
    members: list[int],
    start: int,
    common: dict[int, int],
    least: int,
) -> Node:
    """Of `members` in order; `common`: the tokens that each has in common with the one before."""
    stop = min((common[i] for i in members[1:]), default=start)
    node = Node(start, stop, members)
    for _, same in groupby(members, key=lambda i: tuple(sequences[i][stop : stop + 1])):
        group = [*same]
        if any(common[i] - stop >= least for i in group[1:]):
            node.children.append(_node(sequences, group, stop, common, least))
        else:
            node.rest += group
    return node


def _common_length(one: Tokens, other: Tokens) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def walk(
    model: Backbone, sequences: Sequence[Tokens], node: Node, state: BackboneState | None = None
) -> Iterator[Read | Rest]:
    """Read the shared stretches of a tree: what was read of them, and what is left of each state.

    The caller reads what is left, and has `zoo.model.arithmetic` on.
    """
    device = next(model.parameters()).device
    state = model.empty_state(1) if state is None else state
    tokens = sequences[node.members[0]][node.start : node.stop]
    for at in range(0, len(tokens), CHUNK):
        piece = torch.tensor([tokens[at : at + CHUNK]], device=device)
        x, after = model.hidden(piece, state)
        assert after is not None
        state = after
        yield Read(node.members, node.start + at, x, True)
    if node.rest:
        yield Rest(node.rest, node.stop, state)
    for child in node.children:
        yield from walk(model, sequences, child, state)


def repeated(state: BackboneState, rows: int) -> BackboneState:
    """A state of one row as that of `rows` equal ones."""
    return tree_map_only(Tensor, lambda x: x.repeat_interleave(rows, 0), state)


def padded(sequences: Sequence[Tokens], device: torch.device) -> Tensor:
    """Sequences as the rows of one tensor; shorter ones end in zeros, which nothing before sees."""
    longest = max(map(len, sequences))
    rows = [[*one, *[0] * (longest - len(one))] for one in sequences]
    return torch.tensor(rows, device=device)
