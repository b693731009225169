"""Of several learning rates an arm is reported at its best by validation, and all are shown."""

import math

import pytest

from zoo.report.rates import VALIDATED_ON, choose_rates


def run(lr: float, seed: int, loss: float | None, status: str = "done", **other) -> dict:
    name = f"{other.get('arm', 'mamba')}-{lr:g}-{seed}"
    settings = {"optim.lr": lr, "size": "tiny"}
    about = {"run": name, "arm": "mamba", "lr": lr, "seed": seed, "settings": settings}
    return about | {"status": status, "valid_loss": loss} | other


def rows_of(runs: list[dict]) -> list[dict]:
    return [{"run": each["run"], "arm": each["arm"], "lr": each["lr"]} for each in runs]


def test_the_lowest_mean_over_seeds_is_chosen():
    runs = [run(1e-3, s, loss) for s, loss in enumerate((0.1, 0.9))]
    runs += [run(2e-3, s, loss) for s, loss in enumerate((0.3, 0.4))]
    rows, kept, rates = choose_rates(rows_of(runs), runs)
    assert {row["lr"] for row in rows} == {each["lr"] for each in kept} == {2e-3}
    assert [(rate.lr, rate.loss, rate.chosen) for rate in rates] == [
        (1e-3, 0.5, False),
        (2e-3, 0.35, True),
    ]


def test_a_rate_that_fewer_seeds_survive_is_not_the_best():
    runs = [run(1e-3, 0, 0.5), run(1e-3, 1, 0.5), run(2e-3, 0, 0.1)]
    runs += [run(2e-3, 1, None, "failed", reason="the loss is nan")]
    runs += [run(4e-3, 0, 0.05, "stopped", reason="pruned at step 150 of 600")]
    _, kept, rates = choose_rates([], runs)
    assert {each["lr"] for each in kept} == {1e-3}
    assert rates[-1].ended == "pruned at step 150 of 600"
    assert rates[-1].loss is None


def test_each_arm_has_its_own_best():
    runs = [run(lr, 0, lr) for lr in (1, 2)] + [run(lr, 0, -lr, arm="lstm") for lr in (1, 2)]
    _, kept, _ = choose_rates([], runs)
    assert {(each["arm"], each["lr"]) for each in kept} == {("mamba", 1), ("lstm", 2)}
    wide = {"settings": {"size": "small", "optim.lr": 2}}
    runs = [run(1, 0, 1.0), run(2, 0, 0.5, **wide)]  # two arms of one rate each
    assert choose_rates([], runs) == ([], runs, [])


@pytest.mark.parametrize("field", VALIDATED_ON)
def test_losses_on_two_texts_choose_no_rate(field):
    runs = [run(1e-3, 0, 0.5, **{field: "a"}), run(2e-3, 0, 0.1, **{field: "b"})]
    assert choose_rates(rows_of(runs), runs) == (rows_of(runs), runs, [])


def test_runs_without_a_validation_loss_stay_as_they_are():
    runs = [run(lr, 0, None) for lr in (1, 2)]
    assert choose_rates(rows_of(runs), runs) == (rows_of(runs), runs, [])
    assert choose_rates([{"run": "x"}], [{"run": "x"}]) == ([{"run": "x"}], [{"run": "x"}], [])


def test_a_loss_that_is_no_number_is_none():
    runs = [run(0.001, 0, math.nan), run(0.004, 0, 1.0)]
    _, _, rates = choose_rates(rows_of(runs), runs)
    assert [rate.lr for rate in rates if rate.chosen] == [0.004]
