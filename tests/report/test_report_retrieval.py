"""Passkeys in the report: accuracy against length, on the axis of the scores, chance in sight."""

import pytest
from synthetic import identity, score_row, with_declaration

from zoo.report.caveats import limits
from zoo.report.charts import COLORS, styles
from zoo.report.figures import length_extension, quantity_figure, scores, task_figures
from zoo.report.page import render
from zoo.report.pictures import pictures
from zoo.report.rows import gather
from zoo.report.statistics import wilson
from zoo.report.tables import task_tables
from zoo.report.text import as_text
from zoo.report.words import DASH, share


def passkey_row(arm: str, length: int, right: int, **other) -> dict:
    row = identity(arm) | {"task": "passkey", "length": length, "count": 50, "split": "test"}
    for name, chance in (("", 0.1), ("exact_", 1e-4)):
        row |= {f"{name}interval": wilson(right, 50), f"{name}chance": chance}
    return with_declaration(row | {"accuracy": right / 50, "exact": right / 100} | other)


ROWS = [score_row(arm, n, 2.0) for arm in ("transformer", "mamba") for n in (512, 1024, 4096)]
ROWS += [passkey_row("transformer", n, right) for n, right in ((512, 50), (1024, 20), (2048, 0))]
ROWS.append(passkey_row("mamba", 512, 49))


def test_the_table_has_the_share_found_its_interval_and_chance():
    results = gather(ROWS, [])
    table, exact = task_tables(results, "passkey")
    assert "Chance: 10%" in table.caption
    cells = {
        row[0].text: [(cell.text, cell.note, cell.kind) for cell in row[1:]] for row in table.rows
    }
    assert cells["transformer"] == [
        ("100%", f"93%{DASH}100%", "best"),
        ("40%", f"28%{DASH}54%", ""),
        ("0%", f"0%{DASH}7%", ""),
    ]
    assert cells["mamba"] == [("98%", f"90%{DASH}100%", "tie"), ("not measured", "", "reason")]
    assert "Chance: 0.01%" in exact.caption
    assert "passkey" not in gather(ROWS[:6], []).tasks


def test_accuracy_is_drawn_on_the_axis_of_the_scores_and_zero_is_seen():
    results = gather(ROWS, [])
    figures = scores(results, "half_tail"), task_figures(results, "passkey")[0]
    specs = [figure.draw(styles(results)).to_dict() for figure in figures]
    axes = [spec["layer"][3]["encoding"]["x"] for spec in specs]
    assert axes[0]["scale"] == axes[1]["scale"]
    assert axes[0]["axis"]["values"] == axes[1]["axis"]["values"] == [512, 1024, 2048, 4096]
    line = specs[1]["layer"][3]
    assert [point["y"] for point in line["data"]["values"]] == [1, 0.4, 0, 0.98]
    assert line["encoding"]["y"]["scale"]["type"] == "linear"
    chance = next(layer for layer in specs[1]["layer"] if layer["data"]["values"] == [{"y": 0.1}])
    assert chance["mark"]["type"] == "rule"


def test_page_terminal_and_limits_say_what_was_found():
    results = gather(ROWS, [])
    page, text = render(results, styles(results)), as_text(results)
    assert "Passkeys found against test length" in page
    assert 'id="spec-passkey-accuracy"' in page
    assert "Passkeys found, exact match" in text
    assert "40%" in text
    hidden = "Bits per byte is not retrieval"
    assert not any(hidden in line for line in limits(results))
    assert any(hidden in line for line in limits(gather(ROWS[:6], [])))


def test_one_model_under_many_methods_is_distinguished_alike_in_both_panels():
    ways = [f"transformer + {i}" for i in range(2 * len(COLORS))]
    rows = [
        row(way, length, number, model="transformer")
        for way in ways
        for length in (512, 1024)
        for row, number in ((score_row, 2.0), (passkey_row, 10))
    ]
    results = gather(rows, [])
    look = styles(results)
    assert len({(style.color, style.symbol) for style in look.values()}) == len(ways)
    left, right = (figure.draw(look).to_dict()["layer"] for figure in length_extension(results))
    for channel in ("color", "shape", "x"):
        assert left[4]["encoding"][channel]["scale"] == right[4]["encoding"][channel]["scale"]
    assert left[2]["data"]["values"] == []  # so many bands would cover one another
    names = {
        "bits_per_byte.png",
        "hidden.png",
        "overview.png",
        "length_extension.png",
        "passkey.png",
        "speed.png",
    }
    assert set(pictures(results, look)) == names
    assert length_extension(gather(rows[::2], [])) == length_extension(gather(rows[1::2], [])) == []
    assert 'id="spec-length_extension-passkey-accuracy"' in render(results, look)


def test_several_seeds_have_an_interval_within_what_shares_can_be():
    rows = [passkey_row("mamba", 512, right, seed=seed) for seed, right in ((0, 50), (1, 40))]
    results = gather(rows, [])
    (quantity, *_) = results.tasks["passkey"].quantities
    (point,) = quantity_figure(results, "passkey", quantity).points
    assert (point["y"], point["low"], point["high"]) == (0.9, 0.0, 1.0)
    assert task_tables(results, "passkey")[0].rows[0][1].note == f"0%{DASH}100%"


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0%"), (1, "100%"), (0.28, "28%"), (0.0001, "0.01%")]
)
def test_a_share_in_words(number, words):
    assert share(number) == words
