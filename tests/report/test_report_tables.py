"""Tables and caveats, on rows made by hand with known answers."""

from dataclasses import fields

import pytest
from synthetic import experiment, identity, run_records, score_row, tasks

import zoo.report.scores
from zoo.report import tables
from zoo.report.caveats import banners, failures, limits
from zoo.report.charts import styles
from zoo.report.headlines import tiles
from zoo.report.page import render
from zoo.report.protocols import PROTOCOLS
from zoo.report.rows import Cell, gather
from zoo.report.statistics import interval
from zoo.report.text import as_text
from zoo.report.words import DASH, TIMES, count, score, short, size
from zoo.tasks.documents import Documents
from zoo.tasks.generate import Generate


def cells_of(*values, start=512):
    """Cells at start, 2 start, 4 start, ...: a number, (low, value, high), or a reason."""
    made = {}
    for i, value in enumerate(values):
        if isinstance(value, str):
            made[start * 2**i] = Cell(reason=value)
        else:
            low, point, high = value if isinstance(value, tuple) else (value, value, value)
            made[start * 2**i] = Cell(point, low, high, 1, 1, "")
    return made


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((2.0, 2.0, 2.09), "≥ 2,048"),  # all within 5 %
        ((2.0, 2.09, 2.11), "1,024"),  # 2.11 is beyond 2.1
        ((2.0, 3.0, 2.0), "512"),  # a return to a good score does not count
        ((2.0, 1.5, "n/a: ends"), "1,024"),  # cannot be measured further
        ((2.0,), "≥ 512"),
    ],
)
def test_effective_context_is_the_last_length_before_the_score_leaves_its_share(scores, expected):
    rows = [
        score_row("mamba", 512 * 2**i, bits)
        if isinstance(bits, float)
        else score_row("mamba", 512 * 2**i, 0.0, status="not_applicable", reason="ends")
        for i, bits in enumerate(scores)
    ]
    assert str(zoo.report.scores.effective_contexts(gather(rows, []))["mamba"]) == expected


def test_effective_context_takes_its_interval_from_those_of_the_changes():
    excess = cells_of(-0.1, (-0.1, -0.02, 0.1), (-0.1, 0.1, 0.3), 0.9)
    own = zoo.report.scores.effective_context(excess, 512)
    assert own == zoo.report.scores.EffectiveContext(1024, 512, 2048, False)
    assert own.ends == f" (512{DASH}2,048)"


def test_effective_context_is_surer_than_the_scores_it_rests_on():
    rows = [score_row("mamba", length, bits) for length, bits in ((512, 2.0), (1024, 2.05))]
    apart = [b - 1.05 * a for a, b in zip(*(row["unit_bits"] for row in rows), strict=True)]
    low, high = interval(apart)
    assert low < high < 0
    assert rows[1]["interval"][1] > 1.05 * 2.0  # the score alone could be beyond
    assert zoo.report.scores.effective_contexts(gather(rows, []))[
        "mamba"
    ] == zoo.report.scores.EffectiveContext(1024, 1024, 1024, True)


def test_effective_context_is_unknown_without_a_score_at_the_training_length():
    assert zoo.report.scores.effective_context(cells_of("failed", -1.0), 512) is None
    assert zoo.report.scores.effective_context(cells_of(-1.0, start=1024), 512) is None


def test_effective_context_says_why_it_ends():
    assert (
        zoo.report.scores.effective_context(cells_of(-1.0, "n/a: ends at 512"), 512).then
        == "n/a: ends at 512"
    )
    assert (
        zoo.report.scores.effective_context(cells_of(-1.0, 1.0, "n/a: ends at 1024"), 512).then
        == ""
    )


def test_scores_shorter_than_the_training_length_do_not_matter():
    assert (
        str(zoo.report.scores.effective_context(cells_of(9.0, -1.0, -1.0, start=256), 512))
        == "≥ 1,024"
    )


def table_of(rows, **how):
    results = gather(rows, [])
    cells = results.cells("perplexity", "bits_per_byte", protocol="half_tail")
    tied = zoo.report.scores.ties(results, "half_tail")
    return tables.grid(results, cells, "scores", score, min, tied)


def test_the_best_is_marked_and_what_it_cannot_be_distinguished_from():
    text = [1.0, 2.0, 3.0]  # how hard the stretches are: no interval of a score is narrow
    units = {"transformer": [1.01, 1.99, 3.01], "mamba": text, "rwkv": [1.1, 2.09, 3.11]}
    rows = [
        score_row(arm, 512, sum(own) / 3, unit_bits=own, interval=[0.0, 4.0])
        for arm, own in units.items()
    ]
    rows.append(score_row("far", 512, 2.2, seed=1, interval=[1.0, 3.0]))  # overlaps, unpaired
    rows.append(score_row("farther", 512, 9.0, seed=1, interval=[8.0, 9.5]))
    tied = zoo.report.scores.ties(gather(rows, []), "half_tail")
    assert not tied("mamba", "farther", 512)
    assert not tied("rwkv", "mamba", 512)
    assert not tied("mamba", "rwkv", 512)
    marks = {row[0].text: row[1].kind for row in table_of(rows).rows}
    assert marks == {"transformer": "tie", "mamba": "best", "rwkv": "", "far": "tie", "farther": ""}


def test_an_arm_alone_is_not_the_best():
    assert table_of([score_row("mamba", 512, 2.0)]).rows[0][1].kind == ""


def test_lengths_are_shown_as_multiples_of_the_training_length():
    table = table_of([score_row("mamba", length, 2.0) for length in (128, 512, 16384)])
    assert table.head[1:] == [
        ("128", f"0.25{TIMES}"),
        ("512", f"1{TIMES}"),
        ("16,384", f"32{TIMES}"),
    ]


def test_cells_without_a_result_say_why_in_one_span():
    learned = table_of(experiment()).rows[3]
    assert (learned[0].text, learned[-1].text, learned[-1].span) == (
        *("transformer-learned", "n/a: learned positions end at 512"),
        5,
    )


def test_budgets_give_the_difference_in_parameters():
    rows = [score_row("transformer", 512, 2.0, parameters=1000)]
    rows.append(score_row("mamba", 512, 2.0, parameters=1005))
    table = tables.budgets(gather(rows, []))
    assert [row[1].note for row in table.rows] == ["reference", "+0.50%"]
    assert [row[1].text for row in table.rows] == ["1,000", "1,005"]


def test_the_text_table_numbers_its_reasons():
    text = as_text(gather(experiment(), []))
    learned = next(line for line in text.splitlines() if line.startswith("transformer-learned"))
    assert learned.split() == [
        "transformer-learned",
        *("2.170", "2.060", "1.950"),
        *["(1)"] * 5,
        "512",
        DASH,
    ]
    assert "(1) n/a: learned positions end at 512" in text
    assert "≥ 16,384" in text


def test_the_text_states_changes_and_differences_with_their_intervals():
    rows = [score_row(arm, 512, bits) for arm, bits in (("transformer", 2.0), ("mamba", 1.9))]
    rows.append(score_row("mamba", 1024, 1.8))
    rows += [score_row("transformer", 1024, 2.5, status="failed", reason="out of luck")]
    levels, changes, differences = as_text(gather(rows, [])).split("\n\n")[:3]
    own = [b - a for a, b in zip(rows[1]["unit_bits"], rows[2]["unit_bits"], strict=True)]
    apart = [b - a for a, b in zip(rows[0]["unit_bits"], rows[1]["unit_bits"], strict=True)]
    (half_own, half_apart) = ((high - low) / 2 for low, high in map(interval, (own, apart)))
    assert "95% intervals of these levels: up to ±0.400" in levels
    assert changes.splitlines()[-1].split() == ["mamba", "+0.000", "-0.100", f"±{half_own:.3f}"]
    assert changes.splitlines()[-2].split() == ["transformer", "+0.000", DASH]
    assert differences.splitlines()[0].startswith("difference to transformer")
    assert differences.splitlines()[-1].split() == ["mamba", "-0.100", f"±{half_apart:.3f}", DASH]


def test_a_new_task_that_yields_lengths_and_values_is_shown_in_the_terminal_and_on_the_page():
    rows = [
        identity(arm) | {"task": "needles", "length": n, "value": 1 / n, "depth": 3}
        for arm in ("mamba", "transformer")
        for n in (512, 1024)
    ]
    results = gather(rows, [])
    text = as_text(results)
    assert "no score measured yet" not in text
    assert text.splitlines()[0] == "Needles: value."
    assert text.splitlines()[2].split() == ["mamba", "0.00195", "0.000977"]
    assert "Needles: value." in render(results, styles(results))


def test_chance_is_shown_beside_an_accuracy():
    row = {"task": "accuracy", "length": 64, "accuracy": 0.5, "chance": 0.0625}
    text = as_text(gather([identity("mamba") | row], []))
    assert text.splitlines()[0] == "Accuracy. Chance: 0.0625."


def test_a_new_task_without_lengths_is_shown_by_its_numbers_and_its_failures():
    row = {"task": "recall", "found": 0.5, "own": [0.25, 0.75], "question": ["depth"]}
    found = {"field": "found", "name": "found", "better": "higher", "interval": "own"}
    row["declares"] = {"title": "Recall", "about": "", "quantities": [found]}
    rows = [identity("mamba") | row | {"depth": 3}]
    rows.append(identity("rwkv") | row | {"status": "failed", "reason": "too long"})
    text = as_text(gather(rows, []))
    assert text.splitlines()[:4] == [
        "Recall.",
        "arm            Found",
        "mamba  0.5 0.25\u20130.75",
        "rwkv             (1)",
    ]
    assert "(1) failed: too long" in text


def test_a_quantity_of_some_rows_is_the_mean_of_these_alone():
    quantities = [
        {"field": "value", "name": name, "better": "higher", "where": {"part": name}}
        for name in ("first", "second")
    ]
    about = {"task": "parts", "declares": {"title": "T", "about": "", "quantities": quantities}}
    rows = [
        identity("mamba") | about | {"part": part, "value": value, "question": ["part"]}
        for part, value in (("first", 1.0), ("second", 9.0))
    ]
    (table,) = tables.task_tables(gather(rows, []), "parts")
    assert [cell.text for cell in table.rows[0][1:]] == ["1", "9"]


def test_arms_of_several_seeds_are_distinguished_by_the_interval_over_them():
    quantity = {"field": "value", "name": "score", "better": "lower"}
    about = {"task": "scores", "declares": {"title": "T", "about": "", "quantities": [quantity]}}
    rows = [
        identity(arm, seed) | about | {"length": 64, "value": level + seed, "question": ["length"]}
        for arm, level in (("mamba", 10.0), ("rwkv", 10.1), ("far", 90.0))
        for seed in range(3)
    ]
    (table,) = tables.task_tables(gather(rows, []), "scores")
    assert {row[0].text: row[1].kind for row in table.rows} == {
        **{"mamba": "best", "rwkv": "tie", "far": "", "noise floor": ""}
    }


def test_speed_alone_is_shown_in_the_terminal():
    rows = [row for row in experiment() if row["task"] == "speed"]
    text = as_text(gather(rows, []))
    assert "no score measured yet" not in text
    assert "Forward, tokens per second" in text
    assert "(1) n/a: learned positions end at 512" in text


def test_each_arm_without_a_result_says_why_in_the_terminal():
    rows = [score_row("transformer", 512, 2.0)]
    why = {"young": "training is running at step 7", "gone": "no checkpoint can be read"}
    rows += [
        identity(arm) | {"task": "perplexity", "status": "failed", "reason": reason}
        for arm, reason in why.items()
    ]
    for some in (rows, rows[1:]):
        text = as_text(gather(some, []))
        for reason in why.values():
            assert text.count(f"failed: {reason}") == 1
    assert text.startswith("no score measured yet\n\nwithout a result:\n  young (young-0)")
    both = as_text(gather([*rows[1:], identity("a") | {"task": "passkey", "status": "failed"}], []))
    assert "a (a-0), passkey: failed" in both


def test_nothing_measured_is_said():
    assert as_text(gather([], [])) == "no score measured yet"


@pytest.mark.parametrize(
    ("call", "value", "words"),
    [
        *((short, value, words) for value, words in [(512, "512"), (2048, "2k")]),
        *((short, value, words) for value, words in [(2**20, "1M"), (1000, "1,000")]),
        *((size, value, words) for value, words in [(147456, "144 KiB"), (0, "0 B")]),
        *((count, value, words) for value, words in [(12345.6, "12,300"), (0.1234, "0.123")]),
    ],
)
def test_numbers_are_written_for_people(call, value, words):
    assert call(value) == words


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("fingerprint", "beef" * 16, "differ in data"),
        ("tokenizer", "bpe", "differ in tokenizer"),
        ("train_tokens", 5, "differ in train tokens"),
        ("train_length", 1024, "differ in train length"),
        ("parameters", 1_300_000, "mamba has 1,300,000 parameters, +5.3% against transformer"),
    ],
)
def test_unequal_arms_get_a_banner(field, value, words):
    equal = [score_row(arm, 512, 2.0) for arm in ("transformer", "mamba")]
    assert not any(words in line for line in banners(gather(equal, [])))
    equal[1][field] = value
    assert any(words in line for line in banners(gather(equal, [])))


def test_parameters_within_one_percent_are_equal():
    rows = [score_row("transformer", 512, 2.0, parameters=1000)]
    rows.append(score_row("mamba", 512, 2.0, parameters=1009))
    assert not any("parameters" in line for line in banners(gather(rows, [])))


def test_one_seed_and_untuned_rates_are_admitted():
    said = " ".join(limits(gather(experiment(), [])))
    assert "over text, not over seeds" in said
    assert "not tuned" in said
    many = [score_row("mamba", 512, 2.0, seed=seed, lr=lr) for seed in (0, 1) for lr in (1, 2)]
    said = " ".join(limits(gather(many, [])))
    assert "over text" not in said
    assert "not tuned" not in said


def test_every_failure_is_listed_once_with_its_reason():
    rows = experiment()
    runs = [*run_records(rows), {"run": "rwkv-0", "status": "failed", "reason": "loss is nan"}]
    runs[0] |= {"status": "running", "step": 40}
    table = failures(gather(rows, runs))
    assert [[cell.text for cell in row] for row in table.rows] == [
        [
            *("transformer-learned", f"perplexity, speed at 1,024{DASH}16,384"),
            *("n/a: learned positions end at 512", "transformer-learned-0"),
        ],
        ["rwkv-0", "training", "failed: loss is nan", "rwkv-0"],
        ["transformer", "training", "running at step 40", "transformer-0"],
    ]


def test_no_failure_is_no_table():
    rows = [score_row("mamba", 512, 2.0)]
    assert failures(gather(rows, run_records(rows))) is None


def test_a_stream_alone_is_reported_in_the_terminal_too():
    row = {"task": "stream", "status": "ok", "length": 2**20, "tokens_per_second": 20000.0}
    known = {**row, "arm": "mamba", "model": "mamba", "peak_bytes": None, "state_bytes": 131936}
    text = as_text(gather([known], []))
    assert "1,048,576" in text
    assert "mamba" in text
    assert "no score" not in text


def kinds_of(task) -> dict[str, list]:
    """What may differ between two rows of a task at one length: its settings, the fields that
    distinguish its quantities, the part of the corpus, and the prompt."""
    name = task.__module__.rpartition(".")[2]
    settings = [each.name for each in fields(task) if each.name not in task.unidentifying]
    kinds = {f"task.{name}.{setting}": ["one", "two"] for setting in settings}
    kinds |= {"split": ["valid", "test"], "subtask": ["one", "two"]}
    for quantity in task.declares.quantities:
        for field, value in quantity.where.items():
            kinds[field] = [*dict.fromkeys([*kinds.get(field, []), value])][:2]
    return kinds | ({task.declares.prompt: ["one", "two"]} if task.declares.prompt else {})


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.__name__)
def test_no_number_of_a_task_is_of_rows_of_two_kinds_without_a_word(task):
    """Of one arm with two values under two protocols, data sets or settings, no cell of any table
    has one value for both, unless it is said that it is a mean over prompts."""
    name = task.__module__.rpartition(".")[2]
    for kind, values in kinds_of(task).items():
        for length in (512, None):
            rows = []
            for arm, more in (("mamba", 0.0), ("transformer", 0.01)):
                for value, number in zip(values, (0.25 + more, 0.75 + more), strict=True):
                    row = identity(arm) | {"task": name, "length": length, kind: value}
                    for quantity in task.declares.quantities:
                        row |= {key: row.get(key, one) for key, one in quantity.where.items()}
                        row[quantity.field] = number * {"bytes": 2**20}.get(quantity.form, 1)
                    own = {"subtask": value, "measures": ["acc"], "higher_is_better": {"acc": True}}
                    row |= own | {"scores.acc": number} if name == "harness" else {}
                    row["question"] = ["length", kind]
                    rows.append(row | {"declares": task.declares.plain(row)})
            results, found = gather(rows, []), []
            assert results.tasks[name].quantities
            for quantity in results.tasks[name].quantities:
                found += [tables.quantity_table(results, name, quantity)] if length else []
            if tables.shown_quantities(results, name):
                found += tables.task_tables(results, name)
            for table in filter(None, found):
                texts = {cell.text for row in table.rows for cell in row[1:]}
                mean = texts & {"50%", "51%", "0.500", "0.510", "0.5", "0.51", "512 KiB", "522 KiB"}
                said = kind == task.declares.prompt and "Means over 2 prompts." in table.caption
                assert said if mean else texts, (kind, table)


def test_several_prompts_of_a_run_count_as_their_mean():
    rows = []
    for arm, tokens in (("mamba", (10, 40)), ("transformer", (20, 60, None))):
        for place, count_ in enumerate(tokens):
            row = identity(arm) | {"task": "generate", "prompt": f"p{place}", "tokens": count_}
            row |= {"tokens_per_second": None, "text": "x", "state_bytes": 8}
            rows.append(row | {"declares": Generate.declares.plain(row)})
    results = gather(rows, run_records(rows))
    quantity = results.tasks["generate"].quantities[0]
    assert quantity.name == "tokens written"
    (table,) = tables.task_tables(results, "generate")
    assert [row[1].text for row in table.rows] == ["25", "40"]


def test_a_value_that_is_no_difference_is_not_grey_below_the_noise_floor():
    rows = []
    for arm, seed in (("mamba", 0), ("mamba", 1), ("lstm", 0), ("lstm", 1)):
        for length in (512, 1024):
            row = identity(arm, seed) | {"task": "documents", "dataset": "qasper", "length": length}
            row |= {"score": 0.5, "cut": 0.1 + 0.8 * seed, "shots_read": 0.0, "state_bytes": 8}
            rows.append(row | {"declares": Documents.declares.plain(row)})
    found = tables.task_tables(gather(rows, run_records(rows)), "documents")
    assert "noise floor" in {row[0].text for table in found for row in table.rows}
    assert not {cell.kind for table in found for row in table.rows for cell in row} & {"noise"}


def test_rows_that_differ_in_what_is_ignored_of_a_checkpoint_are_two_arms_and_named():
    note = "sliding_window=262,144: does not act beside rope_scaling"
    rows = [
        score_row("phi3", 512, 2.0, run="a"),
        score_row("phi3", 512, 2.1, run="b", ignores=note),
    ]
    results = gather(rows, [])
    assert results.arms == ["phi3 · ignores nothing", "phi3 · ignores sliding_window=262,144"]
    said = f"Not as its checkpoint is configured: {results.arms[1]} ignores {note}."
    assert said in banners(results)
    assert gather(rows[1:], []).arms == ["phi3"]
    assert any(f"phi3 ignores {note}." in line for line in banners(gather(rows[1:], [])))


@pytest.mark.parametrize("status", ["failed", "out_of_memory", "unfinished", "not_applicable"])
@pytest.mark.parametrize("length", [1024, None])
def test_a_seed_without_a_result_is_named_also_where_another_arm_has_the_same_reason(
    status, length
):
    rows = [
        score_row(arm, n, 2.0 + seed / 10, seed=seed, run=f"{arm}-{seed}")
        for arm in ("mamba", "transformer")
        for seed in range(3)
        for n in (512, 1024)
    ]
    for row in rows:
        if row["length"] == 1024 and (row["seed"] == 2 or row["arm"] == "transformer"):
            row |= {"status": status, "reason": "why", "bits_per_byte": None}
            row["length"] = length if row["seed"] == 2 else row["length"]
    text = as_text(gather(rows, []))
    assert "mamba (mamba-2)" in text.partition("without a result:")[2]
    if length:
        assert "means of the seeds that have a score: mamba at 1,024 (2 of 3)" in text


@pytest.mark.parametrize("protocol", [*PROTOCOLS])
def test_every_protocol_of_an_arm_alone_is_in_the_terminal(protocol):
    """An encoder's beside causal models, and those of an earlier evaluation."""
    rows = [score_row("transformer", 512, 2.0), score_row("other", 512, 1.25, protocol=protocol)]
    assert "1.250" in as_text(gather(rows, []))


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.__name__)
def test_settings_that_differ_along_a_line_are_said(task):
    """A line whose points have other settings, as after two evaluations, is no trend."""
    name, quantity = task.__module__.rpartition(".")[2], task.declares.quantities[0]
    for field in (one.name for one in fields(task) if one.name not in task.unidentifying):
        rows, option = [], f"task.{name}.{field}"
        for length, value in ((512, "this"), (1024, "that")):
            row = identity("mamba") | {"task": name, "length": length, option: value}
            row |= {**quantity.where, quantity.field: 0.5, "question": ["length", option]}
            rows.append(row | {"declares": task.declares.plain(row)})
        said = f"The {name} rows of one line differ in {option}: this at 512; that at 1,024."
        assert said in banners(gather(rows, []))
        for row in rows:
            row[option] = "this"
        assert not [line for line in banners(gather(rows, [])) if "of one line" in line]


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.__name__)
def test_guessing_is_said_of_every_kind_of_answer(task):
    name = task.__module__.rpartition(".")[2]
    for quantity in (one for one in task.declares.quantities if one.chance):
        good = next(one for one in task.declares.quantities if one.chance)
        rows = []
        for where, value in ((good.where, 0.9), (quantity.where, 0.1)):
            row = identity("mamba") | {"task": name, "length": 512, **where, "chance": 0.1}
            row |= {one.field: value for one in task.declares.quantities if one.chance}
            row |= {one.chance: 0.1 for one in task.declares.quantities if one.chance}
            rows.append(row | {"declares": task.declares.plain(row)})
        if good.where != quantity.where:
            said = [line for line in banners(gather(rows, [])) if "No better than" in line]
            assert any(quantity.name in line for line in said), quantity


def test_the_best_is_not_distinguished_from_what_the_seed_alone_makes():
    """The stretches of text say of two trainings, not of two architectures, that one is better."""
    rows = [
        score_row(arm, 512, 2.0 + gap + seed * spread, seed=seed, run=f"{arm}-{seed}")
        for arm, gap, spread in (("mamba", 0.0, 0.1), ("lstm", 0.05, 0.1), ("rwkv", 3.0, 0.1))
        for seed in range(2)
    ]
    for row in rows:
        row["unit_bits"] = [row["bits_per_byte"] + text for text in (-0.5, 0.0, 0.5)]
    results = gather(rows, [])
    cells = results.cells("perplexity", "bits_per_byte", protocol="half_tail")
    table = tables.grid(
        results, cells, "", score, min, zoo.report.scores.ties(results, "half_tail")
    )
    assert {row[0].text: row[1].kind for row in table.rows} == {
        "mamba": "best",
        "lstm": "tie",
        "rwkv": "",
    }
    assert "not distinguished from lstm" in tiles(results)[0].detail


def test_a_cell_of_fewer_seeds_than_others_says_how_many():
    rows = [
        score_row("mamba", n, 2.0 + seed / 10, seed=seed, run=f"m{seed}")
        for seed in range(3)
        for n in (512, 1024)
        if seed == 0 or n == 512
    ]
    results = gather(rows, [])
    cells = results.cells("perplexity", "bits_per_byte", protocol="half_tail")
    table = tables.grid(results, cells, "", score)
    assert table
    (row,) = table.rows
    assert "seed" not in row[1].note
    assert row[2].note.endswith("1 seed")


def test_an_effective_context_of_the_seeds_that_are_left_says_so():
    rows = [
        score_row("mamba", n, 2.0 + seed / 100, seed=seed, run=f"m{seed}")
        for seed in range(3)
        for n in (512, 1024)
    ]
    rows[-1] |= {"status": "failed", "reason": "no finite number", "bits_per_byte": None}
    results = gather(rows, [])
    found = zoo.report.scores.effective_contexts(results)["mamba"]
    assert found
    assert found.fewer == "2 of 3 seeds"
    assert "mamba: 2 of 3 seeds" in tiles(results)[-1].detail
    table = zoo.report.scores.contexts(results)
    assert table
    assert table.rows[0][1].note == "2 of 3 seeds"
    whole = zoo.report.scores.effective_contexts(gather(rows[:4], []))["mamba"]
    assert whole
    assert not whole.fewer
