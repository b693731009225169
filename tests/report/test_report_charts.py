"""Drawing: every arm distinct from every other, round ticks, names that do not overlap."""

import json
import math
from itertools import pairwise

import altair as alt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import experiment, score_row, with_declaration

from zoo.report.axes import Axis, ticks
from zoo.report.charts import COLORS, DISTINCT, Style, _ends, lines, styles
from zoo.report.figures import MANY, changes, cost_figures, drawn, drawn_words, scores, table
from zoo.report.pictures import pictures
from zoo.report.positions import MIN_TOKENS, position_table, positions
from zoo.report.rows import gather
from zoo.report.statistics import interval


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
        row["curve"] = {"edges": [1, 5, 17], "bits_per_byte": [bits, bits], "count": [count, 0]}
    (point,) = positions(gather(rows, []), "perplexity").points
    assert point["y"] == 1.75
    assert point["x"] == 2.0  # the geometric middle of the first to the fourth token
    assert point["positions"] == "1 to 4"


def test_bits_of_positions_are_those_of_all_their_bytes():
    """Tokens of a vocabulary have bytes of their own number: a mean over tokens is another."""
    row = score_row("mamba", 1024, 2.0, protocol="blocks") | {"tokenizer": "a0b1 257 ends"}
    row["curve"] = {"edges": [1, 3, 8, 1025], "bits_per_byte": [6.0, 3.0, 1.0]}
    row["curve"] |= {"count": [100, 100, 256], "bytes": [100, 500, 800]}
    points = positions(gather([row], []), "perplexity").points
    total = (6.0 * 100 + 3.0 * 500 + 1.0 * 800) / 1400
    assert [point["y"] for point in points] == [pytest.approx(total)]
    del row["curve"]["bytes"]
    assert positions(gather([row], []), "perplexity").points == []  # of before: not known


def test_the_table_by_position_has_octaves_and_the_last_one_in_halves():
    edges = [1, 64, 128, 256, 512, 609, 724, 861, 1025]
    bits = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 8.0, 9.0]
    rows = [score_row("mamba", 1024, 2.0, seed=seed, protocol="blocks") for seed in (0, 1)]
    for n, row in enumerate(rows):
        own = {"bits_per_byte": [one + n for one in bits], "count": [256 * (n + 1)] * 8}
        row["curve"] = {"edges": edges, **own}
    table = position_table(gather(rows, []))
    assert table
    where = ["1 to 127", "128 to 255", "256 to 511", "512 to 723", "724 to 1,024"]
    assert [head for head, _ in table.head] == ["arm", *where]
    means = [one + 2 / 3 for one in (5.5, 4.0, 3.0, 1.5, 8.5)]  # the second seed counts twice
    assert [cell.text for cell in table.rows[0]] == ["mamba", *(f"{one:.3f}" for one in means)]


def test_blocks_of_several_lengths_have_no_table_by_position():
    rows = [
        score_row(arm, n, 2.0, protocol="blocks") for arm, n in (("mamba", 512), ("alibi", 1024))
    ]
    for row in rows:
        row["curve"] = {"edges": [1, 256, 513], "bits_per_byte": [2.0, 1.0], "count": [999, 999]}
    assert position_table(gather(rows, [])) is None


def curve(counts, bits) -> list[dict]:
    edges = [2**i for i in range(len(counts) + 1)]
    row = score_row("mamba", 1024, 2.0, protocol="blocks")
    row["curve"] = {"edges": edges, "bits_per_byte": bits, "count": counts}
    return positions(gather([row], []), "perplexity").points


def test_the_last_bucket_of_a_few_tokens_does_not_bend_the_line():
    """Eight tokens are a bit or more off by chance: they weigh as eight tokens do."""
    points = curve([512, 1024, 8], [3.0, 2.0, 3.5])
    assert [point["y"] for point in points] == pytest.approx([3.0, (1024 * 2 + 8 * 3.5) / 1032])
    assert [point["positions"] for point in points] == ["1 to 1", "2 to 7"]
    assert [point["scored tokens"] for point in points] == ["512", "1,032"]


def test_every_point_by_position_rests_on_enough_tokens():
    points = curve([8] * 5 + [300, 8, 8], [6.0, 5.0, 4.0, 4.0, 4.0, 2.0, 9.0, 9.0])
    assert [point["scored tokens"] for point in points] == ["356"]
    points = curve([8] * 10 + [300, 8], list(range(12)))
    assert min(int(point["scored tokens"]) for point in points) >= MIN_TOKENS
    few = curve([8, 8], [6.0, 5.0])  # all there is
    assert [(point["y"], point["scored tokens"]) for point in few] == [(5.5, "16")]


@pytest.mark.parametrize(("values", "named"), [([1.0, 4.0], True), ([1.0, 1.1], False)])
def test_a_logarithmic_scale_is_named_on_its_axis(values, named):
    points = [
        {"arm": "a", "x": 10 * value, "y": value, "low": None, "high": None} for value in values
    ]
    look = {"a": Style("#000000", (1, 0), "")}
    spec = lines(points, look, Axis("length", str), Axis("bits", str)).to_dict()  # type: ignore
    scales = spec["layer"][-1]["encoding"]
    for axis, words in (("x", scales["x"]["axis"]["title"]), ("y", json.dumps(spec["title"]))):
        assert (scales[axis]["scale"]["type"] == "log") == named
        assert ("log scale" in words) == named


@pytest.mark.parametrize("arms", [1, 3, 30, 35])
def test_names_beside_the_lines_have_room_for_a_line_of_text_each(arms):
    rows = [score_row(f"a{i}", n, 2.0 + i / 99 * n / 512) for i in range(arms) for n in (512, 1024)]
    results = gather(rows, [])
    for figure in (changes(results, "half_tail"), scores(results, "half_tail")):
        drawn = figure.draw(styles(results), named=True, height=240)
        spec = drawn.to_dict()
        ends = next(layer for layer in spec["layer"] if layer.get("name") == "ends")
        scale = ends["encoding"]["y"]["scale"]
        log = math.log if scale["type"] == "log" else float
        low, high = map(log, scale["domain"])
        ys = [log(end["y"]) for end in ends["data"]["values"]]
        at = sorted((y - low) / (high - low) * spec["height"] for y in ys)
        assert len(at) == arms
        assert all(b - a > 16 for a, b in pairwise(at))
        assert max(at) <= spec["height"] + 1e-6


def test_figures_draw_no_more_arms_than_can_be_distinguished_and_say_so(tmp_path):
    rows = [score_row(f"a{i}", n, 4.0 - i / 99) for i in range(90) for n in (512, 1024)]
    results = gather(rows, [])
    best = [f"a{i}" for i in range(90 - DISTINCT, 90)]
    assert drawn(results) == best
    look = styles(results, drawn(results))
    assert len({(style.color, style.dash) for style in look.values()}) == DISTINCT
    spec = scores(results, "half_tail").draw(look).to_dict()
    line = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "line")
    assert {point["arm"] for point in line["data"]["values"]} == set(best)
    assert drawn_words(results).startswith("35 of 90 arms are drawn")
    few = gather(rows[:4], [])
    assert (drawn(few), drawn_words(few)) == (few.arms, "")


def test_a_legend_names_every_arm():
    rows = [score_row(f"a{i}", n, 2.0) for i in range(35) for n in (512, 1024)]
    results = gather(rows, [])
    text = json.dumps(scores(results, "half_tail").draw(styles(results), legend=4).to_dict())
    assert '"symbolLimit": 0' in text


def test_the_curve_is_that_of_the_longest_length():
    points = positions(gather(experiment(), []), "perplexity").points
    last = {point["arm"]: point["positions"] for point in points}
    assert last["mamba"] == "8,192 to 16,383"
    assert last["transformer-learned"] == "256 to 511"


def test_state_bytes_come_from_whichever_rows_have_them():
    rows = [score_row("mamba", 512, 2.0, state_bytes=None, protocol="blocks")]
    rows.append(rows[0] | {"task": "speed", "phase": "decode", "state_bytes": 7})
    rows[1] = with_declaration(rows[1] | {"milliseconds": 1.0})
    state = next(f for f in cost_figures(gather(rows, [])) if "state_bytes" in f.name)
    assert [point["y"] for point in state.points] == [7]


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
    assert pictures(results, styles(results))["bits_per_byte.png"].startswith(b"\x89PNG")


def test_a_bigram_model_of_the_training_text_is_a_line_in_every_picture_of_scores():
    curve = {"edges": [1, 257, 513], "bits_per_byte": [2.0, 1.9], "count": [256, 256]}
    blocks = {"protocol": "blocks", "curve": curve}
    rows = [score_row("mamba", n, 2.0, bigram_bits=3.96, **blocks) for n in (512, 1024)]
    results = gather([*rows, score_row("mamba", 512, 2.0, bigram_bits=3.97)], [])
    figures = scores(results, "half_tail"), scores(results, "blocks")
    for figure in (*figures, positions(results, "perplexity")):
        spec = figure.draw(styles(results)).to_dict()
        data = {json.dumps(layer["data"]["values"]): layer for layer in spec["layer"]}
        (level,) = [layer for values, layer in data.items() if values.startswith('[{"y": ')]
        assert level["mark"]["type"] == "rule"
        assert 3.95 < level["data"]["values"][0]["y"] < 3.98
        assert "by a bigram model" in json.dumps(spec["title"])
        low, high = level["encoding"]["y"]["scale"]["domain"]
        assert low < 3.96 < high
    other = gather([*rows, score_row("rwkv", 512, 2.0, bigram_bits=1.0, **blocks)], [])
    assert scores(other, "blocks").level is None


@pytest.mark.parametrize(("first", "end"), [(1, 2), (2, 3), (4, 9), (512, 609)])
def test_a_bucket_of_positions_is_drawn_within_it(first, end):
    row = score_row("mamba", 1024, 2.0, protocol="blocks")
    row["curve"] = {"edges": [first, end], "bits_per_byte": [2.0], "count": [999], "bytes": [999]}
    (point,) = positions(gather([row], []), "perplexity").points
    assert first <= point["x"] <= end - 1
