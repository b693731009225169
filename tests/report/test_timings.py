"""Times are compared only among arms of one machine, one number of threads and one session."""

import pytest
from synthetic import experiment, identity, run_records, tasks, with_declaration

from zoo.report.charts import styles
from zoo.report.figures import cost_figures
from zoo.report.headlines import tiles
from zoo.report.overview import overview
from zoo.report.page import render
from zoo.report.rows import gather
from zoo.report.tables import APART, costs, quantity_table
from zoo.report.text import as_text
from zoo.report.timings import incomparable
from zoo.report.wandb_report import report_blocks

OTHERS = [
    ({"session": "b"}, "timed in another session"),
    ({"time": "2026-02-03T00:00:00", "session": None}, "timed in another session"),
    ({"device": "gpu"}, "timed on another machine"),
    ({"threads": 7}, "timed with other threads"),
]


def with_mamba(**changed):
    """Four arms of one session, but for mamba, whose rows have other fields."""
    rows = [row | {"session": "a"} for row in experiment()]
    if "session" in changed and changed["session"] is None:  # of before the field
        rows = [row | {"session": None} for row in rows]
    rows = [row | changed if row["arm"] == "mamba" else row for row in rows]
    for row in rows:
        if row["task"] == "speed" and row["arm"] == "transformer-alibi":  # a bit slower
            row |= {"tokens_per_second": 0.9 * row["tokens_per_second"]}
            row |= {"milliseconds": 1.1 * row["milliseconds"]}
    return gather(rows, run_records(rows))


@pytest.mark.parametrize(("changed", "why"), OTHERS)
def test_an_arm_timed_otherwise_is_marked_and_ranked_nowhere(changed, why):
    results = with_mamba(**changed)
    label = next(label for label in results.arms if label.startswith("mamba"))
    for task, quantity in costs(results):
        table = quantity_table(results, task, quantity)
        assert table is not None
        line = next(row for row in table.rows if row[0].text == label)
        if not quantity.timed:
            assert line[0].kind == ""
            continue
        assert (line[0].kind, line[0].note) == (APART, why)
        assert not {"best", "tie"} & {cell.kind for cell in line}
        assert any(cell.kind == "best" for row in table.rows for cell in row)
    assert f"{label} ({why})" in as_text(results)
    assert why in render(results, styles(results, results.arms))
    for tile in tiles(results):
        assert "decoding" not in tile.title.lower() or label != tile.arm
    for figure in cost_figures(results):
        timed = "second" in figure.y.title
        assert (label in {point["arm"] for point in figure.points}) != timed
        assert (why in figure.about) == timed
    whole = overview(results)
    assert whole is not None
    speed = next(panel for panel in whole.panels if panel.name == "speed")
    assert label not in speed.values


def test_arms_of_one_session_are_all_compared():
    results = with_mamba()
    assert all(not incomparable(results, *shown) for shown in costs(results))
    assert any(tile.title.startswith("Fastest decoding") for tile in tiles(results))


def test_the_latest_of_two_equal_groups_is_ranked():
    rows = [row | {"session": row["arm"]} for row in experiment()]
    rows = [row | {"time": "2027"} if row["arm"] == "transformer-alibi" else row for row in rows]
    results = gather(rows, [])
    shown = next(shown for shown in costs(results) if shown[1].timed)
    assert set(incomparable(results, *shown)) == {*results.arms} - {"transformer-alibi"}
    assert not any(tile.title.startswith("Fastest") for tile in tiles(results))


def test_seeds_of_two_sessions_are_no_session():
    rows = [row | {"session": "a"} for row in experiment(seeds=2)]
    for row in rows:
        if row["arm"] == "mamba" and row["seed"] == 1:
            row["session"] = "b"
    results = gather(rows, [])
    shown = next(shown for shown in costs(results) if shown[1].timed)
    assert incomparable(results, *shown) == {"mamba": "timed in another session"}


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.__name__)
def test_whatever_is_counted_by_the_second_is_a_time(task):
    for quantity in task.declares.quantities:
        assert quantity.timed == ("per_second" in quantity.field or "seconds" in quantity.field)


@pytest.mark.parametrize(("changed", "why"), OTHERS)
def test_the_speed_of_reading_a_long_text_is_ranked_among_times_of_one_setting(changed, why):
    rows = []
    for arm, rate in (("mamba", 100.0), ("lstm", 90.0), ("far", 500.0)):
        for length in (512, 1024):
            row = identity(arm) | {"task": "stream", "length": length, "session": "a"}
            row |= {"bits_per_byte": 2.0, "tokens_per_second": rate, "late_tokens_per_second": rate}
            row |= {"session": None} if "time" in changed else {}
            rows.append(with_declaration(row | (changed if arm == "far" else {})))
    results = gather(rows, run_records(rows))
    for quantity in results.tasks["stream"].quantities:
        if "per_second" in quantity.field:
            table = quantity_table(results, "stream", quantity)
            assert table
            assert [row[0].note for row in table.rows] == ["", "", why]
            assert [row[1].kind for row in table.rows] == ["best", "", ""]


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.__name__)
@pytest.mark.parametrize("lengths", [(512,), (512, 1024)])
def test_times_of_two_machines_are_nowhere_side_by_side_without_a_word(task, lengths):
    """Of every task with times: on the page, in the terminal and in W&B's report."""
    timed = [one for one in task.declares.quantities if one.timed]
    name, rows = task.__module__.rpartition(".")[2], []
    for arm, device in (("a", "cpu"), ("b", "cpu"), ("c", "gpu")):
        for length in lengths:
            row = identity(arm) | {"task": name, "length": length, "device": device}
            for one in task.declares.quantities:
                row |= {**one.where, one.field: 1.0}
            rows.append(row | {"declares": task.declares.plain(row)})
    results = gather(rows, run_records(rows))
    blocks = report_blocks(results, entity="e", project="p", evaluation="i")
    plots = [p for b in blocks if b["block"] == "PanelGrid" for p in b["panels"] if "y" in p]
    drawn = [y for p in plots for y in p["y"] if y.split("/")[1] in {one.field for one in timed}]
    if any(one.of(rows[0]) for one in timed):
        assert "timed on another machine" in as_text(results)
        assert "timed on another machine" in render(results, styles(results))
        assert any("timed on another machine" in str(block.get("text")) for block in blocks)
        assert drawn
        assert not [y for y in drawn if y.endswith("/c")]
    else:
        assert "timed on" not in as_text(results)


def test_the_fastest_that_is_named_has_learned():
    rows = [row for row in experiment() if row["task"] != "stream"]
    for row in rows:
        if row["task"] == "perplexity" and row["arm"] == "mamba" and row["bits_per_byte"]:
            row["bits_per_byte"] = 8.0
    said = [tile.arm for tile in tiles(gather(rows, run_records(rows))) if "ecoding" in tile.title]
    assert said
    assert said != ["mamba"]
