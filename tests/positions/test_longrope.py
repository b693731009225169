"""The search keeps its constraint and its best, depends on the seed alone, goes on as it was."""

import json
import math
from random import Random

import pytest

from zoo.positions.longrope import Rescale, Search

TARGET = [1.0, 1.3, 2.0, 2.0, 5.5, 8.0, 9.0, 9.9]
STARTS = [Rescale((8.0,) * 8), Rescale(tuple(8 ** (i / 7) for i in range(8)))]


def loss(genome: Rescale) -> float:
    """Least at TARGET and n_hat = 12."""
    pairs = zip(genome.factors, TARGET, strict=True)
    return sum(math.log(f / t) ** 2 for f, t in pairs) + 0.1 * (genome.n_hat != 12)


def searched(generations: int, seed: int = 0, state: str | None = None) -> tuple[Search, list]:
    search, best = Search(STARTS, most=10.0, seed=seed), []
    if state:
        search.restore(json.loads(state))
    for _ in search.run(loss, generations):
        best.append(search.scored[0][0])
    return search, best


def test_it_finds_what_no_start_was_and_never_loses_its_best():
    search, best = searched(40)
    assert best == sorted(best, reverse=True)
    assert best[-1] < 0.1 * min(map(loss, STARTS))
    assert search.scored[0][1].n_hat == 12
    assert len(search.scored) == search.parents


def test_it_depends_on_the_seed_alone_and_goes_on_as_the_unbroken_one():
    whole, best = searched(20)
    assert searched(20)[0].scored == whole.scored
    assert searched(20, seed=1)[0].scored != whole.scored
    half, first = searched(8)
    rest, second = searched(20, state=json.dumps(half.state()))
    assert (first + second, rest.scored) == (best, whole.scored)
    assert searched(20, state=json.dumps(rest.state()))[1] == []  # done


def test_every_genome_keeps_the_order_the_grid_and_the_bounds():
    measured: list[Rescale] = []
    for _ in Search(STARTS, most=10.0).run(lambda g: measured.append(g) or loss(g), 10):
        pass
    assert len(measured) == len(set(measured)) > 64 + 10 * 16  # none is measured twice
    for genome in measured:
        assert list(genome.factors) == sorted(genome.factors)
        assert genome.factors[0] >= 1
        assert genome.factors[-1] <= 10
        assert all(round(100 * f) == pytest.approx(100 * f, abs=1e-9) for f in genome.factors)


def test_genes_mutate_also_where_neighbours_are_equal_and_parents_that_cross_have_no_child():
    search, draw = Search(STARTS, most=10.0), Random(0)
    assert {search.mutated(STARTS[0], draw).factors[0] for _ in range(50)} > {8.0}
    assert search.mutated(Rescale((1.0, 1.0)), Random(1)) is not None
    low, high = Rescale((1.0,) * 40), Rescale((2.0,) * 40)
    assert search.crossed(low, high, draw) is None  # 41 of 2^40 are in order
    assert search.in_order([3.0, 2.0, 20.0, 0.1]) == (3.0, 3.0, 10.0, 10.0)


@pytest.mark.parametrize("given", [{"most": 1.0}, {"most": 2.0, "parents": 0}])
def test_a_search_without_room_is_refused(given):
    with pytest.raises(ValueError, match=r"most=1: must|parents=0: must"):
        Search(STARTS, **given)
