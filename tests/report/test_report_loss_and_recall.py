"""What perplexity hides: level scores with lost recall, keys by length and depth, and by state."""

import re

import pytest
from synthetic import identity, run_records, score_row, with_declaration

from zoo.report.charts import styles
from zoo.report.page import render
from zoo.report.pictures import pictures
from zoo.report.retrieval import (
    FORGETS,
    both_figure,
    both_table,
    changes_of_both,
    depth_cells,
    depth_map,
    forgetting,
    state_figure,
)
from zoo.report.rows import Results, gather
from zoo.report.statistics import wilson
from zoo.report.text import as_text

FAR = 4096
# arm -> bits per byte at 512 and 4096, keys found of 50 there, bytes of the state at 4096
ARMS = {
    "window": (2.0, 2.0, 50, 8, 2**16),
    "rotary": (2.0, 4.0, 50, 5, 2**24),
    "attention": (2.0, 2.02, 50, 49, 2**24),
    "never": (2.0, 2.0, 5, 5, 2**10),
}


def found(arm: str, length: int, right: int, state: int, seed: int = 0) -> dict:
    row = identity(arm, seed) | {"task": "passkey", "length": length, "count": 50, "split": "test"}
    row |= {"interval": wilson(right, 50), "chance": 0.1, "state_bytes": state, "exact": 0.0}
    by_depth = [10 * (right > 10 * depth) for depth in range(5)]
    return with_declaration(row | {"accuracy": right / 50, "correct_by_depth": by_depth})


def measured() -> Results:
    rows = []
    for arm, (near, far, right, later, state) in ARMS.items():
        rows += [score_row(arm, 512, near), score_row(arm, FAR, far)]
        rows += [found(arm, 512, right, state // 8), found(arm, FAR, later, state)]
    return gather(rows, run_records(rows))


def test_level_perplexity_with_lost_recall_is_named_and_nothing_else():
    changes = changes_of_both(measured())
    assert forgetting(changes) == ["window"]
    assert changes["window"].found.value == pytest.approx(-0.84)
    assert changes["rotary"].bits.value == pytest.approx(2.0)
    assert {change.length for change in changes.values()} == {FAR}


def test_it_is_said_in_the_terminal_on_the_page_and_in_a_picture():
    results = measured()
    text, page = as_text(results), render(results, styles(results))
    line = next(line for line in text.splitlines() if line.endswith(FORGETS))
    assert line.startswith("window")
    assert text.count(FORGETS) == 1
    assert "What perplexity does not show" in page
    assert page.count(FORGETS) == 2  # explained, and in the row of the arm
    assert {"hidden.png", "depths.png"} <= pictures(results, styles(results)).keys()


def test_a_change_within_its_intervals_is_no_loss():
    rows = [score_row("mamba", n, 2.0) for n in (512, FAR)]
    rows += [found("mamba", 512, 30, 1), found("mamba", FAR, 26, 1)]
    assert not forgetting(changes_of_both(gather(rows, run_records(rows))))


def test_nothing_is_compared_where_only_one_of_both_was_measured():
    scores = [score_row("mamba", n, 2.0) for n in (512, FAR)]
    keys = [found("mamba", n, 30, 1) for n in (512, FAR)]
    for rows in (scores, keys, [*scores, keys[0]]):
        results = gather(rows, run_records(rows))
        assert both_table(results) is None
        assert not both_figure(results).points
        assert "What perplexity does not show" not in render(results, styles(results))


def test_what_is_found_is_drawn_against_the_bytes_of_the_state():
    points = {point["arm"]: point for point in state_figure(measured()).points}
    assert {arm: point["x"] for arm, point in points.items()} == {a: v[4] for a, v in ARMS.items()}
    assert points["attention"]["y"] == pytest.approx(0.98)


def test_recall_by_state_is_drawn_where_most_arms_were_measured():
    rows = [*measured().rows, found("window", 2 * FAR, 8, 2**16)]
    points = state_figure(gather(rows, run_records(rows))).points
    assert len(points) == len(ARMS)
    assert all(0 <= point["low"] <= point["high"] <= 1 for point in points)


def test_keys_are_counted_by_length_and_depth_over_all_seeds():
    rows = [found("mamba", 512, right, 1, seed) for seed, right in enumerate((50, 20))]
    cells = depth_cells(gather(rows, run_records(rows)))["mamba"]
    assert [cell["share"] for cell in cells] == [1, 1, 0.5, 0.5, 0.5]
    assert cells[0]["keys"] == "20 of 20"


def test_a_depth_is_where_the_key_was_however_many_depths_a_length_has():
    rows = [found("mamba", 512, 50, 1), found("mamba", 1024, 50, 1)]
    rows[1] |= {"correct_by_depth": [5, 4, 3, 2, 1, 0, 1, 2, 3, 4], "count": 50}
    rows.append(found("mamba", 2048, 50, 1) | {"correct_by_depth": [50]})
    cells = depth_cells(gather(rows, run_records(rows)))["mamba"]
    values = depth_map("mamba", cells).data.values
    at = {(value["at"], value["depth"]): value["keys"] for value in values}
    assert at["512", "100%"] == "10 of 10"
    assert at["1k", "100%"] == "4 of 5"
    assert [depth for length, depth in at if length == "512"] == ["0%", "25%", "50%", "75%", "100%"]
    assert at["2k", "0%"] == "50 of 50"
    assert len(at) == len(cells) == 16


def test_every_arm_has_a_map_of_its_own_with_words_for_it():
    results = measured()
    page = render(results, styles(results))
    assert re.findall(r'data-figure="(depths-\d)"', page) == [f"depths-{i}" for i in range(4)]
    assert "Share of passkeys that window finds, by length and depth of the key." in page
