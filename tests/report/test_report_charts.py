"""Drawing: every arm told from every other, round ticks, names that do not overlap."""

from itertools import pairwise

import altair as alt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import experiment, score_row

from zoo.report.charts import COLORS, Axis, _ends, styles, ticks
from zoo.report.figures import MANY, changes, pngs, positions, scores, state_cells, table
from zoo.report.rows import gather, interval


def test_no_two_arms_are_drawn_alike():
    models = [f"m{i % 9}" for i in range(35)]
    rows = [score_row(f"arm {i}", 512, 2.0, model=model) for i, model in enumerate(models)]
    look = styles(gather(rows, []))
    assert len({(style.color, style.dash) for style in look.values()}) == 35
    assert len({look[f"arm {i}"].symbol for i in (0, 9, 18, 27)}) == 1  # one model, one symbol


def test_more_arms_than_styles_still_draw():
    rows = [score_row(f"arm {i}", 512, 2.0) for i in range(50)]
    assert {style.color for style in styles(gather(rows, [])).values()} == set(COLORS)


@given(st.floats(1e-6, 1e12), st.floats(1.01, 1e9), st.sampled_from([2, 10]))
def test_ticks_are_few_and_within_the_range(low, ratio, base):
    high = low * ratio
    at = ticks(low, high, base, log=ratio > 1.6)
    assert len(at) <= 14
    assert all(low * 0.999 <= value <= high * 1.001 for value in at)
    assert at or ratio < 10
    assert at == sorted(at)


def test_constant_values_have_a_scale():
    scale, axis = Axis("memory", str, base=2).scale([1000.0, 1000.0])
    assert scale.domain[0] < 1000 < scale.domain[1]
    assert axis.values


def test_names_beside_the_lines_do_not_overlap():
    arms = [f"arm {i}" for i in range(20)]
    points = [{"arm": arm, "x": 1, "y": 2 + i / 1e4} for i, arm in enumerate(arms)]
    ends = _ends(points, arms, alt.Scale(type="linear", domain=[0, 4]), 400)
    at = sorted(end["y"] * 100 for end in ends)  # pixels
    assert min(b - a for a, b in pairwise(at)) > 16
    assert max(at) <= 400


def test_points_hold_the_scores_and_their_intervals():
    figure = scores(gather([score_row("mamba", 1024, 2.0, interval=[1.9, 2.2])], []), "half_tail")
    (point,) = figure.points
    assert (point["x"], point["y"], point["low"], point["high"]) == (1024, 2.0, 1.9, 2.2)
    assert figure.rules == (512,)


def test_the_curve_is_averaged_over_seeds_by_token_count():
    rows = [score_row("mamba", 1024, 2.0, seed=seed, protocol="blocks") for seed in (0, 1)]
    for row, bits, count in zip(rows, (1.0, 4.0), (30, 10), strict=True):
        row["curve"] = {"edges": [0, 4, 16], "bits_per_byte": [bits, bits], "count": [count, 0]}
    (point,) = positions(gather(rows, []), "perplexity").points
    assert point["y"] == 1.75
    assert point["x"] == 2.0  # the geometric middle of the first to the fourth token
    assert point["positions"] == "0 to 3"


def test_the_curve_is_that_of_the_longest_length():
    points = positions(gather(experiment(), []), "perplexity").points
    last = {point["arm"]: point["positions"] for point in points}
    assert last["mamba"] == "8,192 to 16,383"
    assert last["transformer-learned"] == "256 to 511"


def test_state_bytes_come_from_whichever_rows_have_them():
    rows = [score_row("mamba", 512, 2.0, state_bytes=None, protocol="blocks")]
    rows.append(rows[0] | {"task": "speed", "phase": "decode", "state_bytes": 7})
    rows[1] |= {"tokens_per_second": 1.0}
    assert state_cells(gather(rows, []))["mamba"][512].value == 7


def test_an_interval_below_zero_still_draws():
    """Two seeds far apart: Student's interval reaches below zero, where no logarithm is."""
    rows = [score_row("mamba", 512, bits, seed=bits) for bits in (2, 4)]
    rows += [score_row("rwkv", 512, 30.0)]
    results = gather(rows, [])
    spec = scores(results, "half_tail").draw(styles(results)).to_dict()
    area = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "area")
    assert area["encoding"]["y"]["scale"]["type"] == "log"
    assert min(point["low"] for point in area["data"]["values"]) > 0


@pytest.mark.parametrize("change", [-0.1, 3.0])
def test_a_change_is_drawn_around_zero_with_the_interval_of_the_pairs(change):
    rows = [score_row("mamba", n, bits) for n, bits in ((512, 2.0), (1024, 2.0 + change))]
    results = gather(rows, [])
    figure = changes(results, "half_tail")
    own = [b - a for a, b in zip(rows[0]["unit_bits"], rows[1]["unit_bits"], strict=True)]
    assert (figure.points[1]["low"], figure.points[1]["high"]) == interval(own)
    spec = figure.draw(styles(results)).to_dict()
    line = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "line")
    assert [point["y"] for point in line["data"]["values"]] == [0, pytest.approx(change)]
    scale = line["encoding"]["y"]["scale"]
    assert scale["type"] == "linear"
    assert scale["domain"][0] < min(0, interval(own)[0]) < max(0, interval(own)[1])
    assert max(0, interval(own)[1]) < scale["domain"][1]


def test_the_training_length_is_within_the_figure():
    results = gather([score_row("mamba", length, 2.0) for length in (1024, 2048)], [])
    spec = scores(results, "half_tail").draw(styles(results)).to_dict()
    low, high = spec["layer"][0]["encoding"]["x"]["scale"]["domain"]
    assert low < 512 < high


def test_many_arms_are_a_table_best_first_and_shaded_by_what_they_lost():
    rows = [score_row(f"a{i}", 512, 2.0) for i in range(MANY)]
    rows += [score_row(f"a{i}", 4096, 4.0 - 0.1 * i) for i in range(MANY)]
    rows.append(score_row("learned", 512, 2.0))
    results = gather(rows, [])
    drawn = table(results, "half_tail").to_dict()
    cells = {(cell["arm"], cell["x"]): cell for cell in drawn["data"]["values"]}
    order = drawn["layer"][0]["encoding"]["y"]["sort"]
    assert order == [f"a{i}" for i in reversed(range(MANY))] + ["learned"]
    assert cells["a13", 512]["shade"] == 0
    assert cells["a13", 4096] | {"shade": 0} == {
        "arm": "a13",
        "x": 4096,
        "text": "2.700",
        "shade": 0,
    }
    assert cells["a13", 4096]["shade"] == pytest.approx(0.7)
    assert cells["a0", 4096]["shade"] == 1  # two bits lost are as dark as one
    assert pngs(results, styles(results))["bits_per_byte.png"].startswith(b"\x89PNG")
