"""The noise floor: what the seed alone changes, and what is printed as no more than that."""

import random
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import experiment, identity, run_records, score_row, tasks

from zoo.config.groups import CONFIGS
from zoo.report import published
from zoo.report.charts import styles
from zoo.report.figures import quantity_figure
from zoo.report.learned import dead, never_learned
from zoo.report.noise import Floor, floors_of, is_noise, noise_floors
from zoo.report.page import render
from zoo.report.protocols import SAME_TOKENS
from zoo.report.published import FOLDER, unpack
from zoo.report.rows import Cell, gather, summary
from zoo.report.scores import score_noise
from zoo.report.tables import quantity_table
from zoo.report.text import as_text


def cells(*arms: list[float]) -> dict[str, dict[int, Cell]]:
    rows = ([{"status": "ok", "value": value} for value in arm] for arm in arms)
    return {f"arm {i}": {64: summary(own, "value")} for i, own in enumerate(rows)}


def test_two_means_of_one_arm_differ_by_more_than_the_floor_once_in_twenty():
    draw, beyond, rounds = random.Random(0), 0, 4000
    for _ in range(rounds):
        arms = [[draw.gauss(0, 0.3) for _ in range(3)] for _ in range(4)]
        floor = noise_floors(cells(*arms))[64]
        apart = statistics.mean(arms[0]) - statistics.mean(arms[1])
        beyond += not is_noise(Cell(apart, seeds=3), floor)
    assert 0.035 < beyond / rounds < 0.065


@pytest.mark.parametrize("arms", [[], [[1.0], [2.0]], [[1.0, 1.0], [2.0, 2.0]]])
def test_no_floor_is_known_where_no_seeds_differ(arms):
    assert not noise_floors(cells(*arms))


def test_an_arm_of_one_seed_leaves_the_floor_of_the_others_and_has_a_higher_one():
    alike = noise_floors(cells([1.0, 1.2, 1.1], [2.0, 2.1, 2.3]))[64]
    with_one = noise_floors(cells([1.0, 1.2, 1.1], [2.0, 2.1, 2.3], [5.0]))[64]
    assert with_one.value == alike.value
    assert (alike.source, alike.seeds) == ("3 seeds each, from 2 arms", 3)
    assert with_one.source == "3 seeds each, from 2 arms; 1.7 times it for one seed"
    between = 1.5 * alike.value
    assert is_noise(Cell(between, seeds=1), with_one)
    assert not is_noise(Cell(between, seeds=3), with_one)
    assert not is_noise(Cell(between, seeds=9), with_one)


STEADY = [[1.0, 1.02, 1.01], [2.0, 2.01, 2.03], [1.5, 1.52, 1.49]]
TRAIN, BEYOND = 512, 4096


def read(
    *arms: tuple[list[float], list[float]], lengths: tuple[int, ...] = (TRAIN, BEYOND)
) -> list[dict]:
    """Rows of arms, each of the bits per byte of its seeds at each length."""
    return [
        score_row(f"arm {i}", length, bits, seed=seed, run=f"arm {i}-{seed}")
        for i, arm in enumerate(arms)
        for length, own in zip(lengths, arm, strict=True)
        for seed, bits in enumerate(own)
    ]


def level(*arms: list[float]) -> list[tuple[list[float], list[float]]]:
    return [(arm, arm) for arm in arms]


def floor_at(length: int, rows: list[dict]) -> Floor:
    return score_noise(gather(rows, []), "half_tail")[length]


@pytest.mark.parametrize("broken", [[[3.0, 9.0, 6.0]], [[3.0, 9.0, 6.0], [4.0, 2.2, 8.0]]])
def test_arms_that_break_leave_the_floor_of_the_others(broken):
    arms = [*level(*STEADY), *(([2.0, 2.2, 2.1], own) for own in broken)]
    alone = floor_at(BEYOND, read(*level(*STEADY)))
    beside = floor_at(BEYOND, read(*arms))
    assert beside.value == pytest.approx(alone.value, rel=1e-12)
    assert beside.outlying == {f"arm {3 + i}" for i in range(len(broken))}
    together = [statistics.variance(arm) for arm in STEADY + broken]
    t = {8: 2.306, 10: 2.228}[2 * len(together)]  # Student's, two-sided 5 %
    assert beside.whole == pytest.approx(t * (statistics.fmean(together) * 2 / 3) ** 0.5, rel=1e-9)
    apart = Cell(10 * alone.value, seeds=3)
    assert not is_noise(apart, beside, "arm 0", "arm 1")
    assert is_noise(apart, beside, "arm 0", "arm 3")
    assert is_noise(apart, beside, "arm 3", "arm 0")
    assert "times it against arm 3" in beside.source


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_arm_that_holds_sets_the_floor_however_much_its_seeds_differ(seeds):
    """At every length as at the training length, whatever breaks beside it."""
    draw = random.Random(seeds)
    for _ in range(20):
        own = [[2 + draw.gauss(0, 10 ** draw.uniform(-4, -1)) for _ in range(seeds)]]
        own += [[2 + draw.gauss(0, 10 ** draw.uniform(-4, -1)) for _ in range(seeds)]]
        breaks = [draw.uniform(2, 3) for _ in range(seeds)]
        rows = read(*level(*own), (breaks, [bits * draw.uniform(1.1, 4) for bits in breaks]))
        home, far = floor_at(TRAIN, rows), floor_at(BEYOND, rows)
        assert (home.outlying, home.arms) == (frozenset(), 3)
        assert (far.outlying, far.arms) == ({"arm 2"}, 2)
        held = rows[: 4 * seeds]
        assert far.value == floor_at(BEYOND, held).value == floor_at(TRAIN, held).value


def test_one_seed_that_breaks_is_enough_and_one_of_a_single_seed_is_apart_too():
    rows = read(*level(*STEADY), ([2.0, 2.0, 2.0], [2.0, 2.02, 2.2]), ([2.0], [5.0]))
    assert floor_at(BEYOND, rows).outlying == {"arm 3", "arm 4"}
    within = read(*level(*STEADY), ([2.0, 2.0, 2.0], [2.0, 2.02, 2.09]))
    assert not floor_at(BEYOND, within).outlying


def test_below_the_training_length_no_arm_breaks_nor_where_it_was_not_measured():
    arms = [*level(*STEADY), ([3.0, 3.5, 3.2], [2.0, 2.1, 2.2])]
    assert not floor_at(64, read(*arms, lengths=(64, TRAIN))).outlying
    apart = [*level(*STEADY), ([2.0, 2.1, 2.2], [3.0, 3.5, 3.2])]
    assert floor_at(BEYOND, read(*apart)).outlying == {"arm 3"}
    assert not floor_at(BEYOND, read(*apart, lengths=(1024, BEYOND))).outlying


def test_where_every_arm_breaks_or_only_those_differ_they_set_the_floor():
    every = read(([2.0, 2.1], [3.0, 3.5]), ([2.0, 2.2], [4.0, 4.6]))
    assert floor_at(BEYOND, every).arms == 2
    alike = read(([2.0, 2.0], [2.0, 2.0]), ([2.0, 2.2], [4.0, 4.6]))
    assert floor_at(BEYOND, alike).value > 0.5


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.json"))])
def test_no_published_floor_leaves_out_an_arm_that_holds(name):
    results = gather(*unpack(published.read(name)))
    never = never_learned(results)
    for protocol in SAME_TOKENS:
        cells = results.cells("perplexity", "bits_per_byte", protocol=protocol)
        for length, floor in score_noise(results, protocol).items():
            for label in floor.outlying - never:
                own = cells[label][results.train_length(label)]
                assert length > results.train_length(label)
                worst = max(bits / own.values[k] for k, bits in cells[label][length].values.items())
                assert worst > 1.05


def test_the_floors_in_the_readme_are_those_of_the_published_rows():
    said = (Path(CONFIGS) / "experiment" / "README.md").read_text()
    pattern = r"up to ([\d.]+) bits of\s+difference at 512, ([\d.]+) at 1k and ([\d.]+) beyond"
    ((*given,),) = re.findall(pattern, said)
    at = dict(zip((512, 1024, 2048), given, strict=True))
    floors = score_noise(gather(*unpack(published.read("zoo"))), "half_tail")
    assert {n: at[min(n, 2048)] for n in floors} == {n: f"{f.value:.3f}" for n, f in floors.items()}


@pytest.mark.parametrize("form", ["share", "count", "bytes"])
def test_of_shares_and_speeds_every_arm_counts(form):
    rows = read(*level(*STEADY), ([0.29, 0.31, 0.96], [0.29, 0.91, 0.96]))
    results = gather(rows, [])
    found = results.cells("perplexity", "bits_per_byte", protocol="half_tail")
    floor = floors_of(results, found, form)[BEYOND]
    together = statistics.fmean(statistics.variance(arm) for arm in [*STEADY, [0.29, 0.91, 0.96]])
    assert floor.value == pytest.approx(2.306 * (together * 2 / 3) ** 0.5, rel=1e-9)
    assert (floor.outlying, floor.arms) == (frozenset(), 4)


def noisy(gap: float) -> list[dict]:
    """Two arms of two seeds that differ by 0.1 in each, and between the arms by `gap`."""
    return [
        score_row(arm, 512, 2.0 + more + 0.1 * seed, seed=seed, run=f"{arm}-{seed}")
        for arm, more in (("transformer", 0.0), ("mamba", gap))
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(("gap", "grey"), [(0.05, True), (2.0, False)])
def test_a_difference_is_grey_and_marked_exactly_where_the_seed_alone_makes_it(gap, grey):
    rows = noisy(gap)
    results = gather(rows, run_records(rows))
    page, text = render(results, styles(results)), as_text(results)
    assert ('<td class="noise"' in page) == grey
    assert (" ~" in text) == grey
    assert "noise floor" in text
    floors = re.findall(r"noise floor</span>(?:<small[^>]*>([^<]*)</small>)?", page)
    assert floors
    assert {*floors} == {"2 seeds each, from 2 arms"}


def test_every_report_of_several_seeds_has_the_floor_as_a_row_and_in_its_figures():
    rows = experiment(seeds=3)
    results = gather(rows, run_records(rows))
    page, text = render(results, styles(results)), as_text(results)
    assert text.count("\nnoise floor ") >= 1
    assert page.count("noise floor</span>") >= 2
    assert ", noise floor 0.0" in page  # a figure's title


def test_seeds_that_agree_to_the_last_digit_have_the_interval_of_their_questions():
    rows = [{"status": "ok", "accuracy": 1.0, "interval": [0.97, 1.0]} for _ in range(3)]
    cell = summary(rows, "accuracy", "interval")
    assert (cell.low, cell.high, cell.seeds) == (0.97, 1.0, 3)


def test_a_mean_of_two_seeds_says_so():
    rows = noisy(2.0)
    results = gather(rows, run_records(rows))
    page = render(results, styles(results))
    assert "Two seeds each." in page  # once, where it holds for all
    assert " 2 seeds</small>" not in page
    third = score_row("mamba", 512, 4.05, seed=2, run="mamba-2")
    results = gather([*rows, third], run_records([*rows, third]))
    assert " 2 seeds</small>" in render(results, styles(results))


@pytest.mark.parametrize("seeds", [2, 3])
def test_one_training_read_in_many_ways_is_no_more_trainings(seeds):
    draw, beyond, rounds = random.Random(0), 0, 1000
    for _ in range(rounds):
        made: dict[str, dict[int, Cell]] = {}
        for model, readings in (("a", 9), ("b", 1), ("c", 1)):
            own = [draw.gauss(0, 0.3) for _ in range(seeds)]
            for i in range(readings):
                rows = [
                    {"status": "ok", "value": i + value, "run": f"{model}{seed}"}
                    for seed, value in enumerate(own)
                ]
                made[f"{model} read in way {i}"] = {64: summary(rows, "value")}
        floor = noise_floors(made)[64]
        one, other = (made[f"{model} read in way 0"][64].value for model in "bc")
        beyond += not is_noise(Cell(one - other, seeds=seeds), floor)
    assert 0.03 < beyond / rounds < 0.07


def test_an_arm_read_in_many_ways_counts_once():
    def floor(readings: int) -> float:
        made = {}
        for model, values in {"a": (1.0, 1.001), "b": (1.0, 1.02), "c": (1.0, 1.025)}.items():
            rows = [
                {"status": "ok", "value": value, "run": f"{model}{seed}"}
                for seed, value in enumerate(values)
            ]
            for i in range(readings if model == "a" else 1):
                made[f"{model} {i}"] = {64: summary(rows, "value")}
        return noise_floors(made)[64].value

    assert floor(4) == pytest.approx(floor(1))


def test_one_training_read_in_several_ways_has_no_floor_between_them():
    rows = [
        score_row(f"transformer + {way}", 512, 2.0 + more + seed / 10, seed=seed, run=f"t-{seed}")
        for way, more in (("dca", 0.0), ("window", 0.1))
        for seed in (0, 1)
    ]
    assert not score_noise(gather(rows, []), "half_tail")
    other = [
        score_row("mamba", 512, 2.1 + seed / 10, seed=seed, run=f"m-{seed}") for seed in (0, 1)
    ]
    assert score_noise(gather([*rows, *other], []), "half_tail")


def test_one_seed_of_many_that_has_not_learned_leaves_its_arm_a_floor():
    rows = [
        score_row("transformer", 512, value, seed=seed, run=f"t-{seed}") | {"bigram_bits": 3.5}
        for seed, value in enumerate((2.0, 2.05, 2.1, 2.15, 3.6))
    ]
    assert score_noise(gather(rows, []), "half_tail")[512].value > 0.1


def test_an_arm_that_has_not_learned_says_nothing_of_how_sure_the_others_are():
    rows = [
        score_row(arm, 512, 2.0 + more + steps * seed, seed=seed, run=f"{arm}-{seed}")
        | {"bigram_bits": 3.5}
        for arm, more, steps in (
            ("transformer", 0.0, 0.05),
            ("mamba", 0.04, 0.05),
            *((f"dull {n}", 1.6, 0.0005) for n in range(3)),
        )
        for seed in range(3)
    ]
    learned = [row for row in rows if "dull" not in row["arm"]]
    alone, beside = (score_noise(gather(own, []), "half_tail")[512] for own in (learned, rows))
    assert beside.value == alone.value > 0.05
    assert beside.of(3, "dull 0") >= alone.value
    assert re.search(r"\nmamba +\+0.040 .*~", as_text(gather(rows, [])))


def test_no_noise_floor_of_scores_rests_on_what_has_not_learned():
    """Of every quantity of every task, in its table and in its figure."""
    arms = {"a": (2.0, 0.05), "b": (2.2, 0.05)}
    dull = {f"dull {n}": (3.6, 0.0005) for n in range(3)}
    walked = set()
    for task in tasks():
        for quantity in task.declares.quantities:
            said, rows = replace(task.declares, quantities=(quantity,)), []
            for arm, (value, step) in (arms | dull).items():
                for seed in range(2):
                    score = value + step * seed
                    row = score_row(arm, 512, score, seed=seed, run=f"{arm}-{seed}")
                    rows.append(row | {"bigram_bits": 3.5})
                    name = task.__module__.rpartition(".")[2]
                    row = identity(arm, seed) | {"task": name, quantity.field: score}
                    row |= {**quantity.where, "bigram_bits": 3.5}
                    rows.append(row | {"length": 1024, "declares": said.plain(row)})
            learned = [row for row in rows if row["arm"] in arms]
            floors, titles = [], []
            for part in (learned, rows):
                results = gather(part, [])
                table = quantity_table(results, name, quantity)
                floors.append([cell.text for cell in table.rows[-1]])
                titles.append(quantity_figure(results, name, quantity).y.title)
            assert floors[0][0] == "noise floor"
            assert (floors[0] == floors[1]) == (quantity.form == "score"), quantity
            same = quantity.form == "score" or quantity.cost
            assert (titles[0] == titles[1]) == same, quantity
            walked.add((quantity.form, name))
    assert {name for form, name in walked if form == "score"} >= {
        "perplexity",
        "stream",
        "longrope",
    }
    assert len(walked) > 10


def test_a_stream_alone_says_who_has_not_learned():
    rows = [
        identity(arm, seed)
        | {"task": "stream", "length": 2**20, "bits_per_byte": value + seed / 99}
        for arm, value in (("mamba", 2.0), ("rwkv4", 8.0))
        for seed in range(2)
    ]
    results = gather(rows, [])
    assert never_learned(results) == {"rwkv4"}
    assert "has not learned" in str(dead(results)["rwkv4"])
