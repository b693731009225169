"""Claims: judged where all they compare was measured, decided where an interval is on one side."""

import itertools

import pytest

from zoo.report.claims import (
    Comparison,
    Score,
    comparison,
    judge,
    published,
)
from zoo.report.rows import Results, gather
from zoo.report.text import as_text
from zoo.report.verdicts import claims_table

L = 512


def row(arm: str, times: int, bits: float, seed: int = 0, protocol: str = "half_tail") -> dict:
    about = {"arm": arm, "model": arm.split()[0], "run": f"{arm}-{seed}", "seed": seed}
    about |= {"task": "perplexity", "protocol": protocol, "train_length": L, "extension": "none"}
    about["extension"] = arm.partition(" + ")[2].split(" ")[0] or "none"
    about |= {"unit_bits": [bits + shift for shift in (-0.01, 0.02, -0.01, times / 1e4)]}
    return about | {
        "length": times * L,
        "status": "ok",
        "audited": {},
        "bits_per_byte": bits,
        "count": 7,
    }


def rotary(*beyond: float, at: float = 2.0) -> Results:
    """A rotary model's scores at 4 L, one per seed."""
    rows = [row("transformer", 4, bits, seed) for seed, bits in enumerate(beyond)]
    rows += [row("transformer", 1, at, seed) for seed in range(len(beyond))]
    return gather(rows, [])


@pytest.mark.parametrize(
    ("beyond", "verdict"),
    [
        ([3.0, 2.3], "holds"),
        ([2.05, 2.051], "does not hold"),  # above, by less than 5 %
        ([2.05, 3.0], "not shown at this scale"),  # the seeds disagree
        ([3.0, 2.1003], "not shown at this scale"),  # so may be, by its stretches of text
        ([3.0], "not shown at this scale"),
    ],
)
def test_a_claim_is_decided_by_whole_intervals_of_every_seed(beyond, verdict):
    (found,) = judge(rotary(*beyond))
    assert (found.claim.number, found.verdict) == (1, verdict)
    values = [cell.value for cell in found.cells[0]]
    assert values == pytest.approx([bits - 1.05 * 2.0 for bits in beyond])


@pytest.mark.parametrize(
    ("beyond", "why"),
    [
        ([2.516], "1 seed, at least 2 are needed"),
        ([2.05, 3.0], "the seeds disagree"),
        ([3.0, 2.1003], "an interval holds 0"),
        ([3.0, 2.3], ""),
    ],
)
def test_what_was_not_decided_says_why(beyond, why):
    results = rotary(*beyond)
    (found,) = judge(results)
    assert found.why == why
    table = claims_table(results)
    assert table is not None
    assert why in table.rows[0][1].text
    assert why in as_text(results)


def test_an_arm_measured_in_several_settings_decides_nothing():
    results = rotary(3.0, 3.0)
    others = [{**one, "lr": 0.1, "bits_per_byte": 2.0} for one in results.rows]
    (found,) = judge(gather([*({**one, "lr": 0.2} for one in results.rows), *others], []))
    assert found.verdict == "not shown at this scale"
    assert found.why == "transformer was measured in 2 settings, which may not be mixed"


def test_an_arm_that_has_not_learned_decides_nothing():
    rows = rotary(3.0, 3.0).rows
    for one in rows:
        one |= {"tokenizer": "bytes", "bits_per_byte": one["bits_per_byte"] + 7.7 - 2.0}
    (found,) = judge(gather(rows, []))
    assert found.verdict == "not shown at this scale"
    assert "has not learned" in found.why


@pytest.mark.parametrize(("alone", "verdict"), [(2.0, "holds"), (7.9, "not shown at this scale")])
def test_what_an_extension_breaks_is_compared_and_what_never_learned_is_not(alone, verdict):
    scores = {"pi": 7.8, "ntk": 4.0, "yarn": 3.0, "longrope": 2.0}
    arms = {f"transformer + {name} x8": bits for name, bits in scores.items()}
    rows = [
        row(arm, times, bits, seed) | {"run": f"s{seed}", "tokenizer": "bytes"}
        for times, those in ((8, arms), (1, {"transformer": alone}))
        for arm, bits in those.items()
        for seed in (0, 1)
    ]
    if alone > 7:
        rows = [one | {"run": one["arm"]} for one in rows]  # of other weights
    found = {each.claim.number: each.verdict for each in judge(gather(rows, []))}
    assert found[5] == verdict


def test_a_seed_without_an_interval_decides_nothing():
    results = rotary(3.0, 3.0)
    for one in results.rows:
        if one["seed"] == 1:
            del one["unit_bits"]
    (found,) = judge(results)
    assert found.verdict == "not shown at this scale"


def test_one_missed_comparison_is_enough_and_a_missing_one_too_many():
    arms = {"alibi": (2.0, 2.0, 1.9), "xpos": (2.0, 2.0, 1.9), "sinusoidal": (2.0, 4.0, 4.0)}
    rows = []
    for arm, (near, far, blocks) in arms.items():
        for seed in (0, 1):
            off = 1e-4 * seed
            rows += [row(arm, 1, near + off, seed), row(arm, 8, far + off, seed)]
            rows += [row(arm, 1, near + off, seed, "blocks")]
            rows += [row(arm, 8, blocks + off, seed, "blocks")]
    (found,) = judge(gather(rows, []))
    assert (found.claim.number, found.verdict) == (9, "holds")
    for one in rows:
        if one["arm"] == "sinusoidal":
            one |= row("sinusoidal", one["length"] // L, 2.0, one["seed"], one["protocol"])
    (found,) = judge(gather(rows, []))
    assert found.verdict == "does not hold"
    assert judge(gather([one for one in rows if one["arm"] != "xpos"], [])) == []


def test_below_is_above_mirrored():
    results = rotary(3.0, 3.0)
    for side, verdict in (("above", "holds"), ("below", "does not hold")):
        each = Comparison(Score("transformer", 4), side, Score("transformer", 1))
        assert each.verdict(each.cells(results)) == verdict


def test_the_report_says_the_verdict_and_what_it_rests_on():
    results = rotary(3.0, 3.0)
    said = as_text(results)
    assert "claim 1 holds: A rotary model's perplexity rises" in said
    assert "transformer at 4 L above 1.05 times transformer at L: +0.900 ±" in said
    table = claims_table(results)
    assert table is not None
    assert [cell.text for cell in table.rows[0]][1] == "holds"
    assert claims_table(gather([row("mamba", 1, 2.0)], [])) is None


def test_every_claim_names_its_source_and_arms_that_can_be_trained():
    assert [claim.number for claim in published()] == sorted(
        {claim.number for claim in published()}
    )
    assert [claim.number for claim in published()] == [*range(1, 22)]
    assert all(claim.source and claim.rows and claim.mind for claim in published())
    assert all(bool(claim.comparisons) != bool(claim.rule) for claim in published())


def test_a_rule_is_read_as_it_is_written():
    rules = [each for claim in published() for each in claim.comparisons]
    assert len(rules) > 10
    for each in rules:
        assert comparison(str(each)) == each
    one = comparison("a + b x8 at 16 L above 1.05 times c at L")
    assert one == Comparison(Score("a + b x8", 16), "above", Score("c", 1), 1.05)
    for wrong in ("a at 4 L", "a at 4 L over b at L", "a below b"):
        with pytest.raises(ValueError, match="no comparison"):
            comparison(wrong)


def copied(arm: str, times: int, right: float, seed: int) -> dict:
    """A row of task=accuracy."""
    about = {"arm": arm, "model": arm, "run": f"{arm}-{seed}", "seed": seed, "task": "accuracy"}
    about |= {"train_length": L, "length": times * L, "status": "ok", "audited": {}}
    about |= {"data": "selective_copying"}
    return about | {"accuracy": right, "interval": [right - 0.05, right + 0.05]}


@pytest.mark.parametrize(
    ("mamba", "verdict"),
    [
        ((0.9, 0.8), "holds"),
        ((0.2, 0.2), "does not hold"),
        ((0.9, 0.2), "not shown at this scale"),  # the seeds disagree
        ((0.9, 0.48), "not shown at this scale"),  # an interval reaches the other's
    ],
)
def test_accuracies_are_compared_seed_by_seed_by_the_nearer_ends_of_their_intervals(mamba, verdict):
    arms = {"mamba": mamba, "gated_deltanet": (1.0, 1.0), "retnet": (0.4, 0.4)}
    arms["transformer"] = (0.3, 0.3)
    rows = [copied(a, 4, right, seed) for a, own in arms.items() for seed, right in enumerate(own)]
    (found,) = judge(gather(rows, []))
    assert (found.claim.number, found.verdict) == (15, verdict)
    assert "mamba accuracy at 4 L above retnet accuracy at 4 L" in as_text(gather(rows, []))
    other = [{**one, "data": "mqar"} for one in rows]
    assert not judge(gather(other, []))  # another task's accuracy is no evidence


def test_arms_are_distinguished_by_the_states_they_were_trained_with():
    bits = {("deltanet", "none", 1): 2.0, ("deltanet", "none", 16): 2.4}
    bits |= {("deltanet tuned", states, 1): 2.0 for states in ("none", "carry")}
    bits |= {("deltanet tuned", "none", 16): 2.4, ("deltanet tuned", "carry", 16): 2.0}
    rows = [
        row(arm, times, value + 1e-4 * seed, seed)
        | {"state_passing": states, "run": f"{arm}-{states}-{seed}"}
        for (arm, states, times), value in bits.items()
        for seed in (0, 1)
    ]
    (found,) = judge(gather(rows, []))
    assert (found.claim.number, found.verdict) == (16, "holds")


def test_numbers_of_two_kinds_are_no_comparison():
    with pytest.raises(ValueError, match="no comparison: accuracy with bits per byte"):
        comparison("a accuracy at 4 L above b at L")


def test_an_arm_whose_accuracy_is_a_guess_decides_nothing():
    where = {("mamba", 1): 0.07, ("mamba", 256): 0.07, ("transformer", 4): 0.01}
    rows = [
        copied(arm, times, right, seed) | {"chance": 0.06, "data": "induction"}
        for (arm, times), right in where.items()
        for seed in (0, 1)
    ]
    fast = {"data": "induction", "task": "speed", "phase": "forward", "tokens_per_second": 9.0}
    rows += [copied("mamba", times, 0, seed) | fast for times in (1, 16) for seed in (0, 1)]
    (found,) = judge(gather(rows, []))
    assert (found.claim.number, found.verdict) == (14, "not shown at this scale")
    assert "mamba has not learned" in found.why


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, ""),
        ({"session": "b"}, "timed in another session"),
        ({"threads": 8}, "timed with other threads"),
        ({"device": "gpu"}, "timed on another machine"),
    ],
)
def test_times_that_no_table_ranks_decide_no_claim(changed, why):
    arms, rows = ("rwkv7", "retnet", "cosformer"), []
    for arm, times, seed in itertools.product(arms, (1, 16), (0, 1)):
        speed = {"task": "speed", "phase": "forward", "tokens_per_second": 9.0, "session": "a"}
        speed |= changed if (arm, times) == ("retnet", 16) else {}
        rows.append(copied(arm, times, 0, seed) | {"state_bytes": 8} | speed)
        rows.append(copied(arm, times, 0, seed) | {"state_bytes": 8, "task": "speed"})
        rows[-1] |= {"phase": "decode"}
    (found,) = judge(gather(rows, []))
    assert found.claim.number == 17
    assert (found.verdict == "holds") == (not changed)
    assert found.why == (f"retnet speed at 16 L was {why} than retnet speed at L" if why else "")


def test_l_is_the_training_length_of_the_reference_also_among_a_part_of_the_rows():
    rows = [
        copied(arm, times, right, seed) | {"train_length": L if arm == "transformer" else 2 * L}
        for arm, right in (("mamba", 0.9), ("gated_deltanet", 1.0), ("retnet", 0.4))
        for times, seed in itertools.product((4, 8), (0, 1))
    ]
    rows += [copied("transformer", 4, 0.3, seed) for seed in (0, 1)]
    (found,) = judge(gather(rows, []))
    assert found.verdict == "holds"
