"""LongRoPE's search for the rescale factors of a model (Ding 2024, section 3.2, algorithm 1).

    lambda_i    pair i rotates at theta_i / lambda_i; between 1 and `most`, never falling with i
    n_hat       the first positions, whose angles stay as trained
    population  at first PI, NTK and YaRN, with mutations of these to its full number
    generation  mutations and crossovers of the best, the `parents`; the best of all are kept

A gene mutates with a probability of 0.3, to any value between its neighbours', so that the order
of the lambda holds without trying. A crossover takes each gene of the other parent with the same
probability, and is tried again where it breaks the order, at most 20 times. Every generation draws
from a generator of (seed, its number): a search continued from what it left is the unbroken one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from zoo.errors import refuse

CHANCE = 0.3  # of a gene to mutate, or to cross over
TRIES = 20  # crossovers that break the order before there is no child
STEPS = 100  # the lambda lie on a grid of 1 / STEPS
N_HATS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)


@dataclass(frozen=True)
class Rescale:
    """A genome: a lambda for each pair, and n_hat."""

    factors: tuple[float, ...]
    n_hat: int = 0


@dataclass
class Search:
    """A search so far: `scored` are the parents, best first, with their losses."""

    starts: Sequence[Rescale]
    most: float
    n_hats: Sequence[int] = N_HATS
    seed: int = 0
    population: int = 64
    mutations: int = 16
    crossovers: int = 16
    parents: int = 32
    generation: int = 0  # the next one
    scored: list[tuple[float, Rescale]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("population", "mutations", "crossovers", "parents"):
            if getattr(self, name) < 1:
                refuse(name, getattr(self, name), "must be >= 1")
        if not self.most > 1:
            refuse("most", self.most, "must be > 1, the largest lambda of the search")

    def run(self, loss: Callable[[Rescale], float], generations: int) -> Iterator[None]:
        """Search up to so many generations beside the first; yields after each."""
        while self.generation <= generations:
            draw = Random(f"{self.seed}-{self.generation}")
            known = {genome for _, genome in self.scored}
            fresh = dict.fromkeys(self._children(draw) if self.generation else self._first(draw))
            found = [(loss(genome), genome) for genome in fresh if genome not in known]
            self.scored = sorted([*self.scored, *found], key=lambda pair: pair[0])[: self.parents]
            self.generation += 1
            yield

    def _first(self, draw: Random) -> Iterator[Rescale]:
        starts = [Rescale(self.in_order(s.factors), s.n_hat) for s in self.starts]
        yield from starts
        for number in range(self.population - len(starts)):
            yield self.mutated(starts[number % len(starts)], draw)

    def _children(self, draw: Random) -> Iterator[Rescale]:
        parents = [genome for _, genome in self.scored]
        for _ in range(self.mutations):
            yield self.mutated(draw.choice(parents), draw)
        for _ in range(self.crossovers):
            child = self.crossed(draw.choice(parents), draw.choice(parents), draw)
            if child:
                yield child

    def mutated(self, genome: Rescale, draw: Random) -> Rescale:
        """Some genes anew, each between its neighbours."""
        genes = [round(factor * STEPS) for factor in genome.factors]
        ends = [STEPS, *genes, round(self.most * STEPS)]
        for i in range(len(genes)):
            if draw.random() < CHANCE:
                ends[i + 1] = draw.randint(ends[i], ends[i + 2])
        n_hat = draw.choice(self.n_hats) if draw.random() < CHANCE else genome.n_hat
        return Rescale(tuple(gene / STEPS for gene in ends[1:-1]), n_hat)

    def crossed(self, one: Rescale, other: Rescale, draw: Random) -> Rescale | None:
        """A child of two, or none where the order does not come out."""
        for _ in range(TRIES):
            pairs = zip(one.factors, other.factors, strict=True)
            factors = tuple(b if draw.random() < CHANCE else a for a, b in pairs)
            if list(factors) == sorted(factors):
                return Rescale(factors, other.n_hat if draw.random() < CHANCE else one.n_hat)
        return None

    def in_order(self, factors: Sequence[float]) -> tuple[float, ...]:
        """The nearest genes of the grid that lie between 1 and `most` and do not fall."""
        genes, least = [], 1.0
        for factor in factors:
            least = max(least, min(round(factor * STEPS) / STEPS, self.most))
            genes.append(least)
        return tuple(genes)

    def state(self) -> dict[str, Any]:
        """What to keep of it, as JSON would."""
        scored = [[loss, list(g.factors), g.n_hat] for loss, g in self.scored]
        return {"generation": self.generation, "scored": scored}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.generation = state["generation"]
        self.scored = [(loss, Rescale(tuple(f), n_hat)) for loss, f, n_hat in state["scored"]]
