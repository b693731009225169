"""Gain from context: what a score that stays level hides."""

import itertools

import pytest
from synthetic import experiment, run_records, score_row

from zoo.report.charts import styles
from zoo.report.figures import quantization
from zoo.report.page import render
from zoo.report.rows import gather
from zoo.report.scores import context_gains, quantization_costs
from zoo.report.text import as_text


def learning(*, bigram: float = 4.0) -> list[dict]:
    """Two arms of three seeds: one gains 0.2 bits from 1k to 16k, the other is level."""
    return [
        score_row(arm, n, bits + 0.1 * seed, seed=seed, run=f"{arm}-{seed}", bigram_bits=bigram)
        for arm, at in (
            ("transformer", {512: 2.2, 1024: 2.0, 16384: 1.8}),
            ("mamba", {1024: 2.0, 16384: 2.0}),
        )
        for n, bits in at.items()
        for seed in range(3)
    ]


def test_the_gain_is_what_the_same_tokens_cost_less_with_a_longer_past():
    rows = learning()
    gains = context_gains(gather(rows, run_records(rows)), "half_tail")
    assert gains["transformer"][16384].value == pytest.approx(0.2)
    assert gains["mamba"][16384].value == pytest.approx(0, abs=1e-12)
    assert gains["mamba"].keys() == {16384}
    assert gains["mamba"][16384].seeds == 3


def test_an_arm_that_has_not_learned_has_no_gain():
    rows = learning(bigram=1.5)
    cell = context_gains(gather(rows, run_records(rows)), "half_tail")["mamba"][16384]
    assert cell.value is None
    assert cell.reason.startswith("has not learned")


def test_no_gain_where_lengths_score_other_tokens_or_none_is_long_enough():
    rows = [row | {"protocol": "blocks"} for row in learning()]
    assert not context_gains(gather(rows, run_records(rows)), "blocks")
    short = [row for row in learning() if row["length"] <= 1024]
    assert not context_gains(gather(short, run_records(short)), "half_tail")
    assert "gain from" not in as_text(gather(short, run_records(short)))


def test_the_gain_is_a_column_of_the_terminal_and_a_figure_with_a_table_on_the_page():
    rows = experiment(seeds=2)
    results = gather(rows, run_records(rows))
    text, page = as_text(results), render(results, styles(results))
    assert "1k to 16k" in text.splitlines()[2]
    assert 'data-figure="gains-half_tail"' in page
    assert "Gain from context: bits per byte saved against reading 1,024 tokens." in page


def test_what_fewer_bits_cost_is_the_difference_to_the_same_run_in_plain_numbers():
    rows = []
    for arm, seed in itertools.product(("mamba", "transformer"), range(3)):
        own = ("float32", 0.0), ("int4", 0.02), ("float32, int4 KV cache", 0.5), ("bfloat16", 0.3)
        for dtype, cost in own:
            if arm == "mamba" and "KV" in dtype:
                continue
            for length in (512, 1024):
                row = score_row(arm, length, 2.0 + 0.1 * seed + cost * length / 512)
                rows.append(row | {"run": f"{arm}{seed}", "seed": seed, "dtype": dtype})
    results = gather(rows, [])
    found = quantization_costs(results, "half_tail")
    assert [*found] == [
        *("mamba \u00b7 in int4", "transformer \u00b7 in int4"),
        "transformer \u00b7 in float32, int4 KV cache",
    ]
    for label, cost in zip(found, (0.02, 0.02, 0.5), strict=True):
        for length, cell in found[label].items():
            assert cell.value == pytest.approx(cost * length / 512)
            assert cell.seeds == 3  # paired: what the seeds differ by is not in it
            assert cell.half < 1e-9
    assert "cost of fewer bits" in as_text(results)
    assert "cost of fewer bits" not in as_text(gather([rows[0]], []))
    alone = [row for row in rows if row["dtype"] == "int4"]  # nothing to hold them against
    assert "cost of fewer bits" not in as_text(gather(alone, []))
    assert gather(alone, []).arms == ["mamba \u00b7 in int4", "transformer \u00b7 in int4"]
    assert len(quantization(results, "half_tail").points) == 6


@pytest.mark.parametrize("field", ["device", "threads", "ranks"])
def test_a_run_that_several_machines_read_counts_once_in_what_fewer_bits_cost(field):
    rows = []
    for dtype, other, bits in (("float32", 1, 2.0), ("float32", 2, 2.5), ("int8", 2, 2.6)):
        rows.append(score_row("mamba", 512, bits, dtype=dtype) | {field: other})
    ((label, found),) = quantization_costs(gather(rows, []), "half_tail").items()
    assert label.endswith("in int8")
    assert (found[512].seeds, found[512].value) == (1, pytest.approx(0.1))
