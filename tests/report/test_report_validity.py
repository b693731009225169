"""What may be ranked: nothing that leaks, no context of a model that has not learned."""

import html

import pytest
from synthetic import LENGTHS, experiment, identity, run_records, score_row

from zoo.report import scores
from zoo.report.caveats import banners, failures, limits
from zoo.report.charts import styles
from zoo.report.headlines import tiles
from zoo.report.learned import dead
from zoo.report.overview import _recall, excluded
from zoo.report.page import render
from zoo.report.protocols import PROTOCOLS
from zoo.report.rows import gather
from zoo.report.tables import budgets
from zoo.report.text import as_text
from zoo.report.validity import NOT_LEARNED, blind_guess
from zoo.report.wandb import by_length

WHY = "output 40 changes with input 41"
LEAKY = {"audit": WHY}, {"status": "leaks", "reason": WHY}


def leaky(**how) -> list[dict]:
    """A model that scores 0.05 because it reads the future, beside an honest one."""
    rows = [score_row("transformer", n, 2.0) for n in LENGTHS]
    rows += [score_row("mamba", n, 0.05) | how for n in LENGTHS]
    speed = {"task": "speed", "phase": "decode", "length": 512, "tokens_per_second": 1.0}
    rows.append(identity("transformer") | speed | {"milliseconds": 9.0})
    rows.append(identity("mamba") | speed | {"milliseconds": 1.0} | how)
    return rows


def audited(rows: list[dict]) -> list[dict]:
    records = run_records(rows)
    records[1]["audit"] = {"ok": False, "reason": WHY}
    return records


@pytest.mark.parametrize("place", [*LEAKY, "run.json"], ids=["in audit", "in status", "in run"])
def test_a_leaky_arm_is_shown_with_its_reason_and_never_ranked(place):
    rows = leaky(**({} if place == "run.json" else place))
    results = gather(rows, audited(rows) if place == "run.json" else run_records(rows))
    assert {tile.arm for tile in tiles(results)} == {"transformer"}
    assert not any("mamba" in tile.detail for tile in tiles(results))
    assert scores.effective_contexts(results)["mamba"] is None
    page = render(results, styles(results))
    assert f'<td class="leaks" colspan="8"><span>leaks: {WHY}' in page
    assert "0.050" not in page
    assert "td.leaks { text-align: left; color: var(--bad)" in page
    assert banners(results)[0] == (
        f"Leak: mamba sees the tokens it is to predict, and is not ranked: {WHY}."
    )
    table = failures(results)
    assert table is not None
    assert [row[2].text for row in table.rows] == [f"leaks: {WHY}"]
    assert f"(1) leaks: {WHY}" in as_text(results)


def test_another_seed_of_the_same_leaky_code_is_withdrawn_too():
    rows = [
        score_row("mamba", 512, 0.05, seed=seed, run=f"m{seed}", sources="a") for seed in (0, 1)
    ]
    rows.append(score_row("mamba", 512, 2.0, seed=2, run="m2", sources="b"))
    rows[0]["audit"] = WHY
    results = gather(rows, [])
    assert [row["status"] for row in results.rows] == ["leaks", "leaks", "ok"]
    cell = results.cells("perplexity", "bits_per_byte")["mamba"][512]
    assert (cell.value, cell.seeds, cell.tried) == (2.0, 1, 3)
    assert any("Mixed code: the runs of mamba" in line for line in banners(results))


@pytest.mark.parametrize("audited", [{"float64": 1024, "float32": 4096}, {}], ids=str)
@pytest.mark.parametrize(
    "trained", [{"ok": True, "reason": None}, {"ok": None, "reason": "x"}, None]
)
def test_a_row_whose_audit_passed_is_ranked_whatever_the_training_could_compare(audited, trained):
    rows = [score_row("mamba", 512, 2.0, audited=audited)]
    runs = [{"run": "mamba-0", "status": "done", "audit": trained}]
    assert gather(rows, runs).rows[0]["status"] == "ok"


NOWHERE = "no comparison is recorded; eval.py run=<this run> audits it"
WITHOUT = {
    "no field": ({}, {"ok": True, "reason": None}, NOWHERE),
    "null": ({"audited": None}, None, NOWHERE),
    "no run": ({"audited": None}, ..., NOWHERE),
    "could not be compared": (
        {"audited": None},
        {"ok": None, "reason": "out of memory"},
        "nothing could be compared (out of memory); eval.py run=<this run> audits it",
    ),
}


@pytest.mark.parametrize(("fields", "trained", "why"), WITHOUT.values(), ids=WITHOUT)
def test_a_score_without_an_audit_is_shown_as_not_audited_and_never_ranked(fields, trained, why):
    rows = [score_row("transformer", n, 2.0) for n in LENGTHS]
    bare = [score_row("mamba", n, 0.05) for n in LENGTHS]
    for row in bare:
        row.pop("audit"), row.pop("audited")
        rows.append(row | fields)
    records = run_records(rows)
    records = records[:1] if trained is ... else [records[0], records[1] | {"audit": trained}]
    results = gather(rows, records)
    assert {tile.arm for tile in tiles(results)} == {"transformer"}
    assert scores.effective_contexts(results)["mamba"] is None
    page, said = render(results, styles(results)), as_text(results)
    assert f"<span>not audited: {html.escape(why)}" in page
    assert "0.050" not in page + said
    assert f"(1) not audited: {why}" in said
    assert banners(results)[0].startswith("Not audited for leaks, and not ranked, as")
    assert banners(results)[0].endswith(": mamba.")
    table = failures(results)
    assert table is not None
    assert [row[2].text for row in table.rows] == [f"not audited: {why}"]
    assert not any("mamba" in name for name in by_length(rows, records)[512])


def test_how_far_the_audit_read_is_reported_of_every_arm():
    short = {"audited": {"float32": 80}}
    rows = [score_row("big", n, 2.0, **short) for n in LENGTHS]
    rows += [score_row("mamba", n, 2.1) for n in LENGTHS]
    results = gather(rows, run_records(rows))
    unseen = "A leak that shows only beyond would not be seen."
    assert banners(results)[0] == f"Audited for leaks to 80 of 16,384 tokens only: big. {unseen}"
    message = (
        f"The audit for leaks reads 4,096 of the 16,384 tokens that are measured (mamba). {unseen}"
    )
    assert message in limits(results)
    table = budgets(results)
    column = [head[0] for head in table.head].index("audited for leaks to")
    assert [row[column].text for row in table.rows] == ["80", "4,096"]
    within = [score_row("small", n, 2.0) for n in LENGTHS if n <= 4096]
    assert not any("audit" in line.lower() for line in banners(gather(within, [])))
    assert not any("audit" in line.lower() for line in limits(gather(within, [])))


@pytest.mark.parametrize(
    ("bits", "other", "has_learned"),
    [
        (7.8, {}, False),
        (8.0, {}, False),
        (7.5, {}, True),
        (4.6, {"unigram_bits": 4.7}, False),
        (2.0, {"unigram_bits": 4.7}, True),
        (3.9, {"unigram_bits": 4.7, "bigram_bits": 3.9}, False),
        (3.85, {"unigram_bits": 4.7, "bigram_bits": 3.9}, True),
        (3.4, {"tokenizer": "bpe@1", "uniform_bits": 3.5}, False),
        (5.2, {"tokenizer": "bpe@1", "uniform_bits": 5.275, "bigram_bits": 7.496}, False),
        (5.0, {"tokenizer": "bpe@1", "uniform_bits": 5.275, "bigram_bits": 7.496}, True),
        (4.6, {"unigram_bits": 4.7, "bigram_bits": 9.0}, False),
        (7.8, {"bigram_bits": 9.0}, False),
        (7.8, {"tokenizer": "bpe@1"}, True),  # nothing to compare with
    ],
)
def test_a_model_that_has_not_learned_has_no_effective_context(bits, other, has_learned):
    rows = [score_row("dead", n, bits, **other) for n in (512, 1024, 2048)]
    rows += [score_row("mamba", n, 2.0 * n / 512) for n in (512, 1024, 2048)]
    results = gather(rows, [])
    assert (scores.effective_contexts(results)["dead"] is not None) == has_learned
    tile = next(tile for tile in tiles(results) if "ffective context" in tile.title)
    assert (tile.arm == "dead") == has_learned
    assert any(line.startswith("Not learned: dead") for line in banners(results)) != has_learned
    assert ("not learned" in as_text(results)) != has_learned


def test_what_an_extension_breaks_has_learned_without_it_and_has_no_effective_context():
    about = {"run": "m", "bigram_bits": 3.4}
    under = {"run": "m", "bigram_bits": 3.4, "extension": "pi", "extension_settings": "pi"}
    rows = [score_row("m", n, 2.0, **about) for n in (512, 1024)]
    rows += [score_row("m", n, 5.4, **under) | {"arm": "m + pi"} for n in (512, 1024)]
    rows += [score_row("other", n, 5.4, run="other", bigram_bits=3.4) for n in (512, 1024)]
    results = gather(rows, [])
    found = {label: why.words for label, why in dead(results).items()}
    assert found == {"m + pi": "is broken by its extension", "other": "has not learned"}
    assert scores.effective_contexts(results)["m + pi"] is None
    assert "Broken by its extension: m + pi scores 5.400" in "\n".join(banners(results))
    lines = as_text(results).splitlines()
    assert any(line.startswith("m + pi") and "broken" in line for line in lines)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_arm_of_which_one_seed_never_learned_is_not_called_broken(order):
    alone = {0: 2.0, 1: 5.4}
    about = [{"run": f"s{seed}", "seed": seed, "bigram_bits": 3.4} for seed in order]
    rows = [score_row("m", 512, alone[one["seed"]], **one) for one in about]
    rows += [
        score_row("m", 512, 5.4, **one) | {"arm": "m + pi", "extension": "pi"} for one in about
    ]
    found = {label: why.broken for label, why in dead(gather(rows, [])).items()}
    assert found == {"m": False, "m + pi": False}


def test_one_seed_that_has_not_learned_is_not_hidden_in_the_mean():
    rows = [score_row("m", n, bits, seed=bits) for n in (512, 1024) for bits in (2, 2.1, 8)]
    assert scores.effective_contexts(gather(rows, []))["m"] is None


def test_a_blind_guess_is_eight_bits_of_bytes_alone():
    assert blind_guess([{"tokenizer": "bytes"}]) == "8 is a blind guess"
    other = {"tokenizer": "bpe@1", "uniform_bits": 3.456}
    assert blind_guess([other]) == "a blind guess is 3.46 for bpe@1"
    both = blind_guess([other, {"tokenizer": "bytes"}, {"tokenizer": "x"}])
    assert both.endswith("8 for bytes, log2(vocabulary) / bytes per token for x")


def test_an_arm_that_diverged_is_not_another_budget():
    rows = [score_row("mamba", 512, 2.0, seed=0), score_row("rwkv", 512, 2.1)]
    broken = identity("mamba", 1, train_tokens=0, train_steps=3)
    broken |= {"task": "perplexity", "status": "failed", "reason": "the loss is nan at step 3"}
    runs = [*run_records(rows), {"run": "mamba-1", "status": "failed", "step": 3}]
    results = gather([*rows, broken], runs)
    assert results.arms == ["mamba", "rwkv"]
    assert not any("train tokens" in line for line in banners(results))
    alone = gather([broken | {"run": "x", "arm": "x", "model": "x"}, *rows], [*runs, {"run": "x"}])
    assert not any("train tokens" in line for line in banners(alone))


def test_headlines_are_about_architectures():
    rows = experiment()
    for lr in (0.003, 0.01):
        again = [row | {"lr": lr, "run": f"{row['run']}-{lr}"} for row in experiment()]
        rows += [row for row in again if row["model"] == "mamba"]
    tile_of = {tile.title.split(" ")[0]: tile for tile in tiles(gather(rows, run_records(rows)))}
    assert tile_of["Fastest"].arm.startswith("mamba · lr")
    assert "mamba" not in tile_of["Fastest"].detail.replace("of 3 arms of mamba", "")
    assert tile_of["Fastest"].detail.startswith("then transformer, ")
    assert "the best of 3 arms of mamba" in tile_of["Fastest"].detail
    assert "mamba" not in tile_of["Best"].detail.replace("of 3 arms of mamba", "")
    assert tile_of["Longest"].arm.count("mamba") == 1


def test_one_architecture_is_best_and_fastest_of_nothing():
    rows = [row for row in experiment() if row["arm"] == "mamba"]
    titles = [tile.title for tile in tiles(gather(rows, run_records(rows)))]
    assert titles
    assert not any(word in title for title in titles for word in ("Best", "Fastest", "Longest"))


def test_arms_scored_on_different_texts_are_not_ranked():
    rows = [score_row("transformer", 512, 2.0), score_row("mamba", 512, 1.9, fingerprint="b" * 64)]
    results = gather(rows, run_records(rows))
    assert not any(tile.title.startswith("Best") for tile in tiles(results))
    assert 'class="best"' not in render(results, styles(results))


def test_untuned_rates_and_one_seed_are_at_the_top():
    said = banners(gather(experiment(), []))
    assert any(line.startswith("Untuned learning rates: one was tried for") for line in said)
    assert any(line.startswith("One seed only") for line in said)
    many = [score_row("mamba", 512, 2.0, seed=seed, lr=lr) for seed in (0, 1) for lr in (1, 2)]
    assert banners(gather(many, [])) == []


def test_a_checkpoint_as_it_came_is_not_called_untuned_or_of_one_seed():
    rows = [score_row("llama", 512, 2.0, lr=0.001, train_steps=0, train_tokens=0)]
    assert banners(gather(rows, [])) == []
    assert not any("seed" in line for line in limits(gather(rows, [])))


def test_banners_stay_readable_with_ninety_arms():
    rows = [score_row(f"arm{i}", 512, 2.0, parameters=1000 + 90 * i) for i in range(90)]
    rows[0]["model"] = "transformer"
    said = banners(gather(rows, []))
    assert len(said) < 6
    assert all(len(line) < 400 for line in said)


def answers(arm: str, shares: dict[int, float], **other) -> list[dict]:
    """Rows of a task whose answers guessing gets right one time in eight, of 400 questions."""
    accuracy = {"field": "accuracy", "name": "accuracy", "better": "higher", "form": "share"}
    accuracy |= {"interval": "interval", "chance": "chance"}
    task = {"title": "Recall", "about": "Of a key its value.", "quantities": [accuracy]}
    row = identity(arm) | {"task": "accuracy", "chance": 0.125, "declares": task, **other}
    return [
        row | {"length": n, "accuracy": x, "interval": [x - 0.03, x + 0.03]}
        for n, x in shares.items()
    ]


def test_answers_that_are_no_better_than_guesses_are_said_to_be():
    rows = answers("lstm", {64: 0.14, 512: 0.11}) + answers("mamba", {64: 0.99, 512: 0.12})
    line = "No better than guessing at accuracy: lstm (14% at best, chance is 12%)."
    results = gather(rows, run_records(rows))
    assert line in banners(results)
    assert line in as_text(results) + "\n".join(banners(results))
    one_seed = [row for s in range(3) for row in answers("lstm", {64: 0.14 if s else 0.9}, seed=s)]
    line = "No better than guessing at accuracy: lstm (2 of its 3 seeds) (14% at best, "
    assert any(said.startswith(line) for said in banners(gather(one_seed, run_records(one_seed))))
    rows = answers("lstm", {64: 0.17}) + answers("mamba", {64: 0.99})
    assert not any("guessing" in line for line in banners(gather(rows, run_records(rows))))


@pytest.mark.parametrize("older_first", [False, True])
def test_rows_of_a_version_without_guesses_leave_those_of_others_what_they_are(older_first):
    rows = answers("lstm", {64: 0.3}, guess=0.3, run="r")
    rows[0]["declares"]["quantities"][0]["guess"] = "guess"
    older = answers("mamba", {64: 0.99}, run="o")
    results = gather(older + rows if older_first else rows + older, [])
    assert results.tasks["accuracy"].quantities[0].guess == "guess"
    assert any("No better than guessing at accuracy: lstm" in line for line in banners(results))


def test_answers_that_a_rule_without_association_gives_are_guesses():
    """By the caveat, and by the picture of what holds up."""
    about = {"guess": 0.3, "run": "r"}
    rows = answers("lstm", {64: 0.3, 512: 0.29}, **about)
    rows += answers("mamba", {64: 0.99, 512: 0.9}, **about)
    for row in rows:
        row["declares"]["quantities"][0]["guess"] = "guess"
    results = gather(rows, run_records(rows))
    line = "No better than guessing at accuracy: lstm (30% at best, chance is 12%, a guess without "
    assert line + "association has 30%)." in banners(results)
    assert excluded(results, [_recall(results)]) == {"lstm": NOT_LEARNED}
    assert not any("held to chance" in line for line in limits(results))
    better = [row | {"guess": 0.2} for row in rows]
    assert not any("guessing" in line for line in banners(gather(better, run_records(rows))))


def test_rows_of_before_are_held_to_chance_and_the_report_says_so():
    rows = answers("lstm", {64: 0.3}) + answers("mamba", {64: 0.99})
    results = gather(rows, run_records(rows))
    assert not any("guessing" in line for line in banners(results))
    assert any("Accuracies of lstm, mamba were measured before" in s for s in limits(results))


def test_other_settings_of_a_task_at_one_length_are_reported():
    question = {"question": ["count", "length"]}
    rows = answers("lstm", {64: 0.9}, count=100, **question)
    rows += answers("mamba", {64: 0.9}, count=400, **question)
    lines = [line for line in banners(gather(rows, run_records(rows))) if "rows differ" in line]
    assert lines == ["The accuracy rows differ in count: 100, 400."]
    rows = [
        row | {"count": row["length"]} for row in answers("lstm", {64: 0.9, 512: 0.9}, **question)
    ]
    assert not any("rows differ" in line for line in banners(gather(rows, run_records(rows))))


@pytest.mark.parametrize(
    ("field", "one", "other"),
    [
        ("train_tokens", 10**10, 10**13),
        ("train_tokens", 10**12, 10**12 + 1),
        ("tokenizer", "tokenizer.json@0123456789ab", "tokenizer.json@ba9876543210"),
        ("fingerprint", "f" * 64, "f" * 12 + "e" * 52),
    ],
)
def test_whatever_two_arms_differ_in_makes_them_unequal(field, one, other):
    rows = [score_row("mamba", 512, 2.0) | {field: one}]
    rows.append(score_row("lstm", 512, 2.0) | {field: other})
    (line,) = (line for line in banners(gather(rows, [])) if "fair comparison" in line)
    assert "(mamba); " in line


@pytest.mark.parametrize("protocol", [*PROTOCOLS])
def test_no_protocol_hides_that_an_arm_has_not_learned(protocol):
    rows = [score_row("transformer", 512, 2.0, bigram_bits=3.0)]
    rows.append(score_row("dull", 512, 7.9, unigram_bits=4.0, protocol=protocol))
    rows.append(score_row("fine", 512, 2.0, unigram_bits=4.0, protocol=protocol))
    rows.append(score_row("fine", 1024, 7.9, unigram_bits=4.0, protocol="masked"))
    results = gather(rows, run_records(rows))
    assert [*dead(results)] == ["dull"]
    assert any(line.startswith("Not learned: dull") for line in banners(results))
