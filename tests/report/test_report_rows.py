"""Which rows make an arm, and how sure its numbers are."""

import math
import operator
import random

import pytest
from synthetic import experiment, identity, run_records, score_row

from zoo.report.charts import styles
from zoo.report.page import render
from zoo.report.rows import contrast, gather
from zoo.report.statistics import interval
from zoo.report.tables import budgets
from zoo.report.text import as_text


def cell(rows, label="mamba", length=512):
    cells = gather(rows, []).cells("perplexity", "bits_per_byte", protocol="half_tail")
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
    mine = cell([score_row("mamba", 512, 2.0, interval=broken)])
    assert (mine.value, mine.low, mine.high) == (2.0, None, None)


@pytest.mark.parametrize("count", [4, 6, 24])
def test_the_interval_covers_the_truth_as_often_as_it_says(count):
    generator = random.Random(1)
    inside = 0
    for _ in range(2000):
        low, high = interval([generator.gauss(2.0, 0.3) for _ in range(count)])  # type: ignore
        inside += low <= 2.0 <= high
    assert 0.935 <= inside / 2000 <= 0.965


@pytest.mark.parametrize("count", [8, 24])
def test_the_interval_of_a_ratio_is_around_it_and_covers_the_truth_as_often_as_it_says(count):
    """Stretches of equal tokens whose bits rise with their bytes less than in proportion."""
    generator, inside, plain = random.Random(1), 0, 0
    for _ in range(2000):
        sizes = [generator.choice((1000, 2000)) for _ in range(count)]
        bits = [1000 + size + generator.gauss(0, 50) for size in sizes]  # of 2500 per 1500 bytes
        each = [own / size for own, size in zip(bits, sizes, strict=True)]
        low, high = interval(each, sizes)  # type: ignore
        assert (low + high) / 2 == pytest.approx(sum(bits) / sum(sizes), rel=1e-12)
        inside += low <= 5 / 3 <= high
        low, high = interval(each)  # type: ignore
        plain += low <= 5 / 3 <= high
        assert interval(each, [7] * count) == interval(each)
    assert 0.925 <= inside / 2000 <= 0.965
    assert plain < inside


@pytest.mark.parametrize("known", [{0}, {1}, {0, 1}])
@pytest.mark.parametrize("times", [1.0, 1.05])
def test_an_interval_of_differences_is_around_the_difference_where_bytes_are_unequal(known, times):
    sizes, rows = [100, 250, 600], []
    for i, units in enumerate(([1.0, 2.0, 3.0], [1.5, 2.1, 2.9])):
        bits = sum(map(operator.mul, units, sizes)) / sum(sizes)
        own = {"unit_bits": units, "units": 3} | ({"unit_bytes": sizes} if i in known else {})
        rows.append(score_row(("mamba", "transformer")[i], 512, bits, **own))
    cell = contrast(*([row] for row in rows), times)
    assert (cell.low + cell.high) / 2 == pytest.approx(cell.value, rel=1e-12)


def test_a_single_value_has_no_interval():
    assert interval([2.0]) is None


def pair(**other):
    """Two arms on three stretches of very different difficulty, almost equally good on each."""
    common = {"units": 3, "interval": [0.0, 5.0]}
    return [
        score_row("transformer", 512, 2.0, unit_bits=[1.0, 2.0, 3.0], **common),
        score_row("mamba", 512, 2.1, **common | {"unit_bits": [1.09, 2.1, 3.11]} | other),
    ]


def test_arms_are_compared_on_the_same_stretches():
    mine = gather(pair(), []).differences("half_tail")
    half = 4.303 * 0.01 / math.sqrt(3)  # the differences are 0.09, 0.10, 0.11
    (only,) = mine.values()
    assert only[512].value == pytest.approx(0.1)
    assert (only[512].low, only[512].high) == pytest.approx((0.1 - half, 0.1 + half))


@pytest.mark.parametrize("name", ["units", "unit", "documents", "split", "count", "seed"])
def test_what_was_not_scored_on_the_same_text_is_not_compared(name):
    mine = gather(pair(**{name: 7}), []).differences("half_tail")["mamba"][512]
    assert mine.value is None
    assert mine.reason == "nothing to compare with: no seed scored the same text"


@pytest.mark.parametrize(("protocol", "compared"), [("window_mean", False), ("half_tail", True)])
def test_windows_that_start_elsewhere_are_other_text(protocol, compared):
    rows = pair(protocol=protocol, stride=64)
    rows[0] |= {"protocol": protocol, "stride": 256}
    mine = gather(rows, []).differences(protocol)["mamba"][512]
    assert (mine.value is not None) == compared


def test_a_stretch_without_a_score_is_in_no_interval_of_differences():
    rows = pair(unit_bits=[1.0, None, 3.2])
    mine = gather(rows, []).differences("half_tail")["mamba"][512]
    half = 12.71 * 0.1  # the differences are 0.0 and 0.2
    assert (mine.low, mine.high) == pytest.approx((0.1 - half, 0.1 + half))


def test_rows_without_scores_by_stretch_compare_without_an_interval():
    mine = gather(pair(unit_bits=None), []).differences("half_tail")["mamba"][512]
    assert (mine.value, mine.low) == (pytest.approx(0.1), None)


def test_several_seeds_are_compared_seed_by_seed():
    bits = {"transformer": (1, 2, 3), "mamba": (1.2, 2.1, 3.0, 9.0)}
    rows = [score_row(a, 512, b, seed=i) for a, own in bits.items() for i, b in enumerate(own)]
    mine = gather(rows, []).differences("half_tail")["mamba"][512]
    half = 4.303 * 0.1 / math.sqrt(3)  # the differences are 0.2, 0.1, 0.0; the fourth has no pair
    assert (mine.value, mine.seeds, mine.tried) == (pytest.approx(0.1), 3, 4)
    assert (mine.low, mine.high) == pytest.approx((0.1 - half, 0.1 + half))


def test_a_change_is_against_the_arms_own_training_length():
    rows = [
        score_row("mamba", 512, 2.0, unit_bits=[1.0, 2.0, 3.0], units=3),
        score_row("mamba", 1024, 2.5, unit_bits=[1.4, 2.5, 3.6], units=3),
    ]
    mine = gather(rows, []).changes("half_tail")["mamba"]
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (mine[512].value, mine[512].low, mine[512].high) == (0, 0, 0)
    assert (mine[1024].low, mine[1024].high) == pytest.approx((0.5 - half, 0.5 + half))
    mine = gather(rows, []).changes("half_tail", 1.1)["mamba"][1024]
    apart = [1.4 - 1.1, 2.5 - 2.2, 3.6 - 3.3]
    assert mine.value == pytest.approx(sum(apart) / 3)
    assert mine.high == pytest.approx(mine.low)


def test_a_change_without_a_score_at_the_training_length_says_so():
    rows = [score_row("mamba", 1024, 2.5), score_row("transformer", 512, 2.0)]
    mine = gather(rows, []).changes("half_tail")
    assert mine["mamba"][1024].reason == "nothing to compare with: it has no score"
    assert mine["mamba"][512].reason == "not measured"


def test_a_failed_seed_is_counted_but_not_averaged():
    rows = [score_row("mamba", 512, 2.0, seed=0), score_row("mamba", 512, 2.0, seed=1)]
    rows[1] |= {"status": "failed", "reason": "loss is nan", "bits_per_byte": None}
    mine = cell(rows)
    assert (mine.value, mine.seeds, mine.tried) == (2.0, 1, 2)
    rows[1] |= {"reason": "it could not be audited for leaks", "bits_per_byte": 1.0}
    assert cell(rows).value == 2.0


@pytest.mark.parametrize("status", ["failed", "diverged", "running", "done"])
def test_a_seed_whose_training_left_no_row_is_counted_at_every_length(status):
    rows = [score_row("mamba", n, 2.0, seed=s, run=f"m{s}") for n in (512, 1024) for s in (0, 1)]
    runs = [{"run": f"m{s}", "arm": "mamba", "model": "mamba", "status": "done"} for s in (0, 1)]
    runs.append({"run": "m2", "arm": "mamba", "model": "mamba", "seed": 2, "status": status})
    results = gather(rows, runs)
    for length, mine in results.cells("perplexity", "bits_per_byte")["mamba"].items():
        assert (mine.value, mine.seeds, mine.tried) == (2.0, 2, 3), length
    assert "2 of 3 seeds" in render(results, styles(results))


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_score_that_is_no_number_is_a_failure(value):
    mine = cell([score_row("mamba", 512, 2.0) | {"bits_per_byte": value}])
    assert mine.value is None
    assert mine.reason == f"failed: the result is {value}, not a number"


def test_different_trainings_are_never_averaged():
    rows = [score_row("mamba", 512, 1.0, lr=1e-3), score_row("mamba", 512, 3.0, lr=3e-3, seed=1)]
    assert gather(rows, []).arms == ["mamba · lr 0.001", "mamba · lr 0.003"]


def test_a_name_is_lengthened_only_by_what_is_needed():
    """Tokens go with the length here, so the length alone distinguishes the two."""
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


YARN = {"arm": "transformer + yarn x8", "extension": "yarn", "extension_factor": 8.0}


def read_with(name: str, seed: int = 0, **options):
    """A row of a transformer read under an extension of those settings."""
    row = score_row("transformer", 512, 2.0, seed=seed)
    return row | YARN | {"extension_settings": name, "extension_options": options}


def test_two_settings_of_one_extension_are_two_arms_and_say_what_differs():
    rows = [
        read_with("yarn-1", **{"factor": 8.0, "scaling.beta_fast": 32.0, "attention.window": None}),
        read_with("yarn-2", **{"factor": 8.0, "scaling.beta_fast": 16.0, "attention.window": 64}),
    ]
    first, second = (f"{YARN['arm']} · beta_fast {b} · window {w}" for b, w in PAIRS)
    assert gather(rows, []).arms == [first, second]
    mixed = [rows[0], rows[1] | {"seed": 1}]
    assert gather(mixed, []).arms == [first, second]


PAIRS = (("32", "default"), ("16", "64"))


def test_settings_known_by_their_hash_alone_are_still_two_arms():
    rows = [read_with("yarn-1", seed=0), read_with("yarn-2", seed=1)]
    assert gather(rows, []).arms == [f"{YARN['arm']} · settings yarn-{i}" for i in (1, 2)]


def test_one_setting_measured_with_two_seeds_is_one_arm():
    rows = [read_with("yarn-1", seed=seed, factor=8.0) for seed in (0, 1)]
    assert gather(rows, []).arms == [YARN["arm"]]


def trained_with(seed: int, **settings):
    run = f"mamba-{seed}-{settings}"
    return score_row("mamba", 512, 2.0, seed=seed, run=run), {"run": run, "settings": settings}


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("optim.weight_decay", "weight_decay"),
        ("model.blocks.0.mixer.state_size", "state_size"),
        ("base.optim.betas", "betas"),
        ("batch_size", "batch_size"),
    ],
)
def test_any_other_option_of_training_makes_another_arm(name, word):
    pairs = [trained_with(0, **{name: 1}), trained_with(1, **{name: 2})]
    rows, runs = zip(*pairs, strict=True)
    assert gather(rows, runs).arms == [f"mamba · {word} 1", f"mamba · {word} 2"]
    rows, runs = zip(trained_with(0, **{name: 1}), trained_with(1, **{name: 1}), strict=True)
    assert gather(rows, runs).arms == ["mamba"]


def test_many_differences_are_reported_by_a_hash():
    pairs = [trained_with(i, **{f"optim.o{k}": i for k in range(9)}) for i in (0, 1)]
    one, two = gather(*zip(*pairs, strict=True)).arms
    assert one != two
    assert one.startswith("mamba · 9 options ")


def test_settings_of_one_last_name_are_distinguished_by_the_whole():
    pairs = [trained_with(i, **{"a.x": i, "b.x": i}) for i in (0, 1)]
    assert gather(*zip(*pairs, strict=True)).arms[0] == "mamba · a.x 0 · b.x 0"


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("passkey", "candidates"),
        ("passkey", "depths"),
        ("passkey", "key_seed"),
        ("perplexity", "stride"),
        ("perplexity", "unit"),
        ("perplexity", "documents"),
        ("stream", "chunk"),
        ("newest", "difficulty"),
    ],
)
def test_answers_to_different_questions_are_never_averaged(task, name):
    def measured(value, seed):
        row = score_row("mamba", 512, 2.0, seed=seed, task=task, accuracy=0.5) | {name: value}
        return row | ({"question": ["length", name]} if task == "newest" else {})

    one, two = gather([measured(3, 0), measured(5, 1)], []).arms
    assert (one, two) == (f"mamba · {name} 3", f"mamba · {name} 5")
    assert gather([measured(3, 0), measured(3, 1)], []).arms == ["mamba"]


def test_a_shorter_length_of_another_question_does_not_split_an_arm():
    rows = [score_row("mamba", n, 2.0, windows=1024 // n) for n in (512, 1024)]
    assert gather(rows, []).arms == ["mamba"]


def test_a_row_without_any_one_field_costs_the_terminals_tables_nothing():
    rows = experiment()[:20]
    for name in dict.fromkeys(name for row in rows for name in row):
        short = [{k: v for k, v in rows[0].items() if k != name}, *rows[1:]]
        assert as_text(gather([dict(row) for row in short], [])), name


def test_what_was_requested_is_distinguished_from_what_is_beside_it():
    rows = [score_row("mamba", 512, 2.0), score_row("transformer", 512, 2.0, requested=False)]
    results = gather(rows, [])
    assert [results.requested(label) for label in results.arms] == [True, False]
    assert "mamba *" in as_text(results)
    assert "transformer *" not in as_text(results)
    assert "* requested now" in as_text(results)
    page = render(results, styles(results))
    assert "<span>mamba</span><small>requested now</small>" in page
    assert "<span>transformer</span><small>" not in page
    alone = gather(rows[:1], [])
    assert not alone.requested("mamba")
    assert "*" not in as_text(alone)


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


def test_a_run_without_a_measurement_is_listed_by_the_name_of_its_data():
    rows = [score_row("lstm", 512, 2.0)]
    record = {"run": "b", "model": "nope", "status": "done", "data": {"symbols": 32, "answers": 16}}
    record |= {"settings": {"data.name": "recall"}, "audit": {"float64": 64}}
    results = gather(rows, [*run_records(rows), record])
    row = next(row for row in budgets(results).rows if row[0].text == "nope")
    assert "recall" in [cell.text for cell in row]
    assert "trained, not measured yet" in as_text(results)


@pytest.mark.parametrize("name", ["longrope", "yarn"])
def test_what_a_search_found_for_each_run_is_no_other_setting(name):
    def read(seed: int, n_hat: int) -> dict:
        own = {"run": f"s{seed}", "seed": seed, "extension": name}
        options = {"name": name, "factor": 8.0, "scaling.n_hat": n_hat, "scaling.magnitude": "su"}
        own |= {"extension_options": options, "extension_settings": f"{name}-{n_hat}"}
        return score_row("m", 512, 2.0) | own

    searched = gather([read(0, 12), read(1, 32)], []).arms
    assert len(searched) == (1 if name == "longrope" else 2)
    assert len(gather([read(0, 12), read(0, 32), read(1, 32)], []).arms) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"arm": "transformer tuned with yarn", "train_length": 4096},
        {"arm": "transformer, rank 8"},
        {"dtype": "int8"},
        {"dtype": "float32, int8 KV cache"},
    ],
)
def test_the_reference_is_the_plain_transformer_whichever_row_comes_first(other):
    rows = [
        score_row("transformer", 512, 2.0, run="other") | {"run": "other"} | other,
        score_row("transformer", 512, 2.1),
        score_row("mamba", 512, 1.9),
    ]
    for ordered in (rows, rows[::-1]):
        results = gather(ordered, [])
        (label,) = {row["label"] for row in results.rows if row["bits_per_byte"] == 2.1}
        assert results.reference == label
        assert results.train_length() == 512
    assert gather(rows[:1], []).reference  # the only one


def test_arms_of_one_name_are_distinguished_by_their_setting_before_their_best_rate():
    runs, rows = [], []
    for conv, lr, parameters in ((None, 4e-3, 100), (4, 8e-3, 104)):
        name = f"conv-{conv}"
        settings = {"optim.lr": lr, "model.short_conv": conv}
        runs.append({"run": name, "arm": "mamba", "lr": lr, "settings": settings})
        about = {"run": name, "lr": lr, "parameters": parameters}
        rows.append(score_row("mamba", 512, 2.0, **about))
    assert gather(rows, runs).arms == ["mamba · short_conv default", "mamba · short_conv 4"]
    assert gather(rows, []).arms == ["mamba · lr 0.004", "mamba · lr 0.008"]
