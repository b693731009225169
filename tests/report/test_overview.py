"""The picture above the fold: which arms it draws, at what, and what it says of the others."""

import json

import pytest
from synthetic import experiment, identity, run_records, score_row, with_declaration

from zoo.report.charts import styles, themed
from zoo.report.figures import drawn
from zoo.report.overview import MAX_ARMS, Overview, draw, overview
from zoo.report.page import render
from zoo.report.pictures import pictures
from zoo.report.rows import gather


def passkeys(arm: str, length: int, found: float) -> dict:
    row = identity(arm) | {"task": "passkey", "length": length, "accuracy": found, "chance": 0.1}
    return with_declaration(row | {"interval": [max(0, found - 0.1), min(1, found + 0.1)]})


def overview_of(rows: list[dict]) -> Overview:
    whole = overview(gather(rows, run_records(rows)))
    assert whole
    return whole


def test_quality_recall_state_and_speed_are_side_by_side():
    rows = experiment()
    rows += [passkeys("mamba", length, 0.9) for length in (512, 16384)]
    panels = {panel.name: panel for panel in overview_of(rows).panels}
    assert [*panels] == ["quality", "recall", "state", "speed"]
    home, far = panels["quality"].values["transformer"]
    bits = {
        row["length"]: row["bits_per_byte"]
        for row in rows
        if row["arm"] == "transformer" and row.get("protocol") == "half_tail"
    }
    assert home
    assert far
    assert (home.value, far.value) == (bits[512], bits[16384])
    assert panels["recall"].level == 0.1
    state = panels["state"].values["mamba"][1]
    assert state
    assert state.value == 147_456


def test_only_audited_arms_that_learned_have_marks_and_a_word_says_why_others_have_none():
    rows = [
        score_row("transformer", 512, 2.0, bigram_bits=3.0),
        score_row("dull", 512, 3.1, bigram_bits=3.0),
        score_row("leaky", 512, 0.1, audit="it reads the next token"),
        score_row("unknown", 512, 1.0, bigram_bits=3.0),
    ]
    rows[-1]["audited"] = None
    whole = overview_of(rows)
    words = {"dull": "has not learned", "leaky": "leaks", "unknown": "not audited"}
    assert whole.without == words
    assert whole.arms[0] == "transformer"
    results = gather(rows, run_records(rows))
    spec = json.dumps(themed(draw(whole.panels[0], whole, styles(results), named=True)))
    assert all(word in spec for word in words.values())
    for arm, value in (("dull", 3.1), ("leaky", 0.1), ("unknown", 1.0)):
        assert f'"arm": "{arm}", "x": {value}' not in spec
    assert '"arm": "transformer", "x": 2.0' in spec


def test_an_arm_at_chance_on_every_task_has_not_learned():
    rows = [passkeys("mamba", 512, 0.1), passkeys("transformer", 512, 0.8)]
    assert overview_of(rows).without == {"mamba": "has not learned"}


def test_an_arm_that_was_never_measured_has_no_result_and_is_not_said_to_have_not_learned():
    rows = [score_row("transformer", 512, 2.0, bigram_bits=3.0), passkeys("transformer", 512, 0.8)]
    broken = {"run": "mamba-0", "arm": "mamba", "model": "mamba", "status": "diverged"}
    whole = overview(gather(rows, [*run_records(rows), broken]))
    assert whole
    assert whole.without == {"mamba": "no result"}


@pytest.mark.parametrize("ends", [(0.0, 0.0), (0.0, 0.3), (-0.1, 0.2), (0.9, 1.2), (1.0, 1.0)])
def test_the_interval_of_a_share_is_drawn_as_it_is_within_the_bounds_of_shares(ends):
    rows = [passkeys("mamba", length, 0.5) for length in (512, 1024)]
    rows[1] |= {"interval": [*ends]}
    whole = overview_of(rows)
    spec = draw(whole.panels[0], whole, styles(gather(rows, [])), named=True)
    (far,) = (point for point in spec.layer[0].data.values if not point["hollow"])
    assert (far["low"], far["high"]) == (max(0.0, ends[0]), min(1.0, ends[1]))


def test_an_arm_without_a_score_at_the_longest_length_keeps_its_hollow_mark():
    whole = overview_of(experiment())
    home, far = whole.panels[0].values["transformer-learned"]
    assert home
    assert far is None
    assert whole.arms[-1] == "transformer-learned"


@pytest.mark.parametrize("count", [1, 3, 30, 90])
def test_any_number_of_arms_fits_and_the_best_are_drawn(count):
    arms = {f"arm{i}": (1.5 + 0.01 * ((7 * i) % count), 0.01, None) for i in range(count)}
    rows = experiment(arms)
    whole = overview_of(rows)
    best = sorted(arms, key=lambda arm: arms[arm][0])
    assert whole.arms == best[:MAX_ARMS]
    assert ("of 90 arms are drawn" in whole.about) == (count == 90)
    results = gather(rows, run_records(rows))
    assert all(arm in styles(results, drawn(results)) for arm in whole.arms)


def test_a_cost_that_no_drawn_arm_has_is_no_panel():
    rows = [score_row("transformer", 512, 2.0, bigram_bits=3.0)]
    rows += [score_row("dull", 512, 3.1, bigram_bits=3.0)]
    del rows[0]["state_bytes"]
    assert [panel.name for panel in overview_of(rows).panels] == ["quality"]


def test_the_page_has_the_panels_in_the_inks_of_its_theme_before_any_table_and_a_picture():
    rows = experiment()
    results = gather(rows, run_records(rows))
    page = render(results, styles(results))
    assert page.index('data-figure="overview-quality"') < page.index("<table>")
    assert "currentColor" in page.split('id="spec-overview-quality">')[1].split("</script>")[0]
    assert pictures(results, styles(results))["overview.png"].startswith(b"\x89PNG")


def test_without_a_score_or_a_share_there_is_no_picture():
    assert overview(gather([identity("mamba") | {"task": None, "status": "failed"}], [])) is None
