"""Claims in a report: those of which it has an arm, and in one line how many it does not judge."""

from dataclasses import replace

import pytest
from test_report_claims import L, rotary, row

from zoo.report.claims import published
from zoo.report.rows import gather
from zoo.report.text import as_text
from zoo.report.verdicts import claims_table, partly_measured, waits_for


def shown(results) -> dict[str, str]:
    """Claim -> its verdict in the table."""
    table = claims_table(results)
    assert table is not None
    return {line[0].text.partition(".")[0]: line[1].text for line in table.rows}


def test_a_claim_without_an_arm_in_the_report_is_counted_and_not_listed():
    results = rotary(3.0, 2.3)
    verdicts = shown(results)
    arms = {arm: claim for claim in published() for arm in arms_of(claim)}
    assert {number for number, verdict in verdicts.items() if verdict != "not judged"} == {"1"}
    assert set(verdicts) == {
        str(claim.number) for claim in published() if "transformer" in bits_arms(claim)
    }
    assert "mamba" in arms
    partly = len(verdicts) - 1
    line = (
        "1 hold, 0 do not hold, 0 not shown at this scale, 20 not judged "
        f"({partly} lack an arm, a length or a measure that they compare; "
        f"of {20 - partly} no arm was measured here)"
    )
    table = claims_table(results)
    assert table is not None
    assert line in table.caption
    assert f"claims: {line}" in as_text(results)
    assert as_text(results).count("\nclaim ") == 1


def arms_of(claim) -> set[str]:
    return {one.arm for each in claim.comparisons for one in (each.score, each.other)}


def bits_arms(claim) -> set[str]:
    """Those of which it compares bits per byte."""
    scores = (one for each in claim.comparisons for one in (each.score, each.other))
    return {one.arm for one in scores if one.what == "bits per byte"} if not claim.where else set()


def test_a_report_of_private_models_has_no_claims():
    rows = [row("mine", times, 2.0, seed) for times in (1, 4) for seed in (0, 1)]
    results = gather(rows, [])
    assert claims_table(results) is None
    assert "claim" not in as_text(results)
    assert not partly_measured(results, [])


def test_claims_of_too_few_seeds_are_one_line_in_the_terminal():
    text = as_text(rotary(3.0))
    line = "claim 1 not shown at this scale: 1 seed, at least 2 are needed"
    assert text.count("claim 1 ") == 1
    assert line in text
    assert "transformer at 4 L above" not in text
    (said,) = [line for line in shown(rotary(3.0)).values() if line != "not judged"]
    assert said == "not shown at this scale: 1 seed, at least 2 are needed"


def test_a_claim_that_waits_says_for_what():
    claim = next(claim for claim in published() if claim.number == 15)
    waits = waits_for(claim)
    assert waits.startswith("waits for rows of experiment=selective_copying; ")
    assert "still to be written" not in waits
    waits = waits_for(replace(published()[0], rows="nowhere", comparisons=(), rule="it falls"))
    assert "experiment=nowhere (an experiment that is still to be written); its rule, " in waits
    assert waits.endswith("does not carry out yet: it falls")


def test_what_would_change_our_mind_is_beside_each_verdict():
    table = claims_table(rotary(3.0, 2.3))
    assert table is not None
    assert table.rows[0][2].note.startswith("what would change our mind: ")


@pytest.mark.parametrize("times", [1, 2])
def test_an_arm_measured_at_other_lengths_leaves_a_claim_unjudged(times):
    results = gather([row("transformer", times, 2.0, seed) for seed in (0, 1)], [])
    assert 1 in {claim.number for claim in partly_measured(results, [])}
    assert results.train_length() == L
