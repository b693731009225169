"""Which rows make an arm, and how sure its numbers are."""

import math

import pytest
from synthetic import experiment, identity, score_row

from zoo.report.rows import gather, interval


def cell(rows, label="mamba", length=512):
    cells = gather(rows, []).cells(
        "perplexity", "bits_per_byte", spread=True, protocol="stride_tail"
    )
    return cells[label][length]


def test_several_seeds_give_their_mean_and_students_interval():
    mine = cell([score_row("mamba", 512, bits, seed=bits) for bits in (1, 2, 3)])
    half = 4.303 / math.sqrt(3)  # the standard deviation of 1, 2, 3 is 1
    assert (mine.value, mine.seeds) == (2, 3)
    assert (mine.low, mine.high) == pytest.approx((2 - half, 2 + half))


def test_one_seed_keeps_the_interval_of_its_row():
    mine = cell([score_row("mamba", 512, 2.0, interval=[1.7, 2.4])])
    assert (mine.low, mine.high) == (1.7, 2.4)


@pytest.mark.parametrize("broken", [None, [1.0], [math.nan, 2.0], "1.0 2.0"])
def test_a_broken_interval_is_none(broken):
    assert interval([2.0], broken) == (None, None)


def test_a_failed_seed_is_counted_but_not_averaged():
    rows = [score_row("mamba", 512, 2.0, seed=0), score_row("mamba", 512, 2.0, seed=1)]
    rows[1] |= {"status": "failed", "reason": "loss is nan", "bits_per_byte": None}
    mine = cell(rows)
    assert (mine.value, mine.seeds, mine.tried) == (2.0, 1, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_score_that_is_no_number_is_a_failure(value):
    mine = cell([score_row("mamba", 512, 2.0) | {"bits_per_byte": value}])
    assert mine.value is None
    assert mine.reason == f"failed: the result is {value}, not a number"


def test_different_trainings_are_never_averaged():
    rows = [score_row("mamba", 512, 1.0, lr=1e-3), score_row("mamba", 512, 3.0, lr=3e-3, seed=1)]
    assert gather(rows, []).arms == ["mamba · lr 0.001", "mamba · lr 0.003"]


def test_a_name_is_lengthened_only_by_what_is_needed():
    """Tokens go with the length here, so the length alone tells the two apart."""
    rows = [
        score_row("mamba", 512, 1.0, train_length=512, train_tokens=1000),
        score_row("mamba", 512, 1.0, train_length=1024, train_tokens=2000),
        score_row("transformer", 512, 1.0, lr=0.5),
    ]
    arms = gather(rows, []).arms
    assert arms == ["mamba · trained at 512", "mamba · trained at 1,024", "transformer"]


def test_two_runs_of_one_seed_are_not_two_seeds():
    rows = [score_row("mamba", 512, 1.0, run="a"), score_row("mamba", 512, 2.0, run="b")]
    assert gather(rows, []).arms == ["mamba · run a", "mamba · run b"]


def test_a_run_without_rows_keeps_its_place_with_the_reason():
    broken = identity("rwkv") | {"status": "failed", "reason": "loss is nan at step 7"}
    results = gather([score_row("mamba", 512, 2.0)], [broken])
    cells = results.cells("perplexity", "bits_per_byte")
    assert results.arms == ["mamba", "rwkv"]
    assert cells["rwkv"][512].reason == "failed: loss is nan at step 7"


def test_a_stopped_run_says_how_far_it_came():
    run = {"run": "rwkv-0", "model": "rwkv", "status": "stopped", "step": 1200, "reason": None}
    results = gather([score_row("mamba", 512, 2.0)], [run])
    reason = results.cells("perplexity", "bits_per_byte")["rwkv"][512].reason
    assert reason == "unfinished: stopped at step 1,200"


def test_the_reference_is_the_plain_transformer():
    rows = [score_row("mamba", 512, 2.0), score_row("transformer+yarn", 512, 2.0)]
    rows[1] |= {"model": "transformer", "extension": "yarn"}
    assert gather(rows, []).reference == "mamba"
    assert gather(rows + experiment(), []).reference == "transformer"
