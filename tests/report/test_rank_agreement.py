"""Two measurements rank the arms alike, or it is said which arms change places."""

import random

import pytest
from synthetic import identity

from zoo.report.rank_agreement import agreements, compare, ranks, spearman
from zoo.report.rows import gather

QUANTITY = {"field": "accuracy", "name": "accuracy", "better": "higher", "form": "share"}
DECLARED = {"title": "Accuracy", "about": "", "quantities": [QUANTITY]}


def rows(means: dict[str, float], seeds: int = 3, part: int = 0, spread: float = 0.01) -> list:
    found = []
    for arm, mean in means.items():
        for seed in range(seeds):
            off = spread * random.Random(f"{arm} {seed}").uniform(-1, 1)
            about = {"task": "accuracy", "length": 64, "task.accuracy.seed": part}
            about |= {"accuracy": mean + off, "declares": DECLARED}
            found.append(identity(arm, seed) | about | {"question": ["length"]})
    return found


def agreement(one: list, other: list):
    (found,) = agreements(gather(one, []), gather(other, []), "accuracy")
    return found


ARMS = {"a": 0.1, "b": 0.3, "c": 0.5, "d": 0.7, "e": 0.9}


def test_ranks_of_equal_values_are_their_mean():
    assert ranks([3.0, 1.0, 3.0, 0.0]) == [3.5, 2.0, 3.5, 1.0]


@pytest.mark.parametrize("seed", range(20))
def test_the_correlation_is_that_of_squared_rank_differences(seed):
    """1 - 6 sum d^2 / (n (n^2 - 1)), which holds without ties."""
    draw = random.Random(seed)
    one, other = ([draw.random() for _ in range(7)] for _ in range(2))
    places = [[sorted(side).index(v) for v in side] for side in (one, other)]
    squares = sum((a - b) ** 2 for a, b in zip(*places, strict=True))
    assert spearman(one, other) == pytest.approx(1 - 6 * squares / (7 * 48))


def test_one_side_without_an_order_has_no_correlation():
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_arms_far_apart_are_ranked_alike_by_every_draw():
    found = agreement(rows(ARMS), rows({arm: x / 2 for arm, x in ARMS.items()}, part=1))
    assert (found.correlation, found.arms, found.length) == (pytest.approx(1.0), 5, 64)
    assert found.interval == pytest.approx((1.0, 1.0))
    assert not found.swapped


def test_arms_that_change_places_by_more_than_the_noise_are_named():
    other = ARMS | {"a": 0.9, "e": 0.1}
    found = agreement(rows(ARMS), rows(other, part=1))
    assert len(found.swapped) == 7  # each of the two with all others, and with each other
    assert found.beyond_noise == found.swapped
    said = compare([*rows(ARMS), *rows(other, part=1)], [], "accuracy", "task.accuracy.seed")
    assert "at 64: a and e change places" in said
    assert "7 of 10" in said


def test_a_swap_within_the_noise_is_counted_and_decides_nothing():
    near = ARMS | {"a": 0.3, "b": 0.301}
    found = agreement(
        rows(near, spread=0.05), rows(near | {"a": 0.302, "b": 0.3}, part=1, spread=0.0499)
    )
    assert found.beyond_noise == []
    assert found.interval is not None
    assert found.interval[0] <= found.correlation <= 1
    said = compare([*rows(ARMS), *rows(ARMS, part=1)], [], "accuracy", "task.accuracy.seed")
    assert "no two arms change places by more than the noise floor" in said


def test_one_training_each_has_no_interval():
    assert agreement(rows(ARMS, seeds=1), rows(ARMS, seeds=1, part=1)).interval is None


def test_trainings_that_one_side_lacks_are_left_out():
    one = rows(ARMS)
    found = agreement(one, [row for row in rows(ARMS, part=1) if row["arm"] != "e"])
    assert found.arms == 4


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (lambda row: row["task.accuracy.seed"] == 0, "have no two values of it"),
        (lambda row: row["arm"] in "ab", "no length has 3 arms"),
    ],
)
def test_what_cannot_be_compared_says_why(kept, said):
    every = [row for row in [*rows(ARMS), *rows(ARMS, part=1)] if kept(row)]
    with pytest.raises(ValueError, match=said):
        compare(every, [], "accuracy", "task.accuracy.seed")
