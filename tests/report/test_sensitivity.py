"""The rates that were tried are shown, and an arm that was tuned is not called untuned."""

import dataclasses

import pytest
from synthetic import run_records, score_row

from zoo.report.caveats import banners
from zoo.report.charts import styles
from zoo.report.page import render
from zoo.report.rates import VALIDATED_ON, Rate
from zoo.report.rows import gather
from zoo.report.sensitivity import rates_table


def tuned(extension: str | None = None):
    rows, runs = [], []
    for lr, losses in {1e-3: (0.5, 0.7), 4e-3: (0.2, 0.4)}.items():
        for seed, loss in enumerate(losses):
            name = f"mamba-{lr:g}-{seed}"
            row = score_row("mamba", 512, 2 + loss, seed=seed, lr=lr) | {"run": name}
            rows.append(row)
            record = {**row, "status": "done", "valid_loss": loss, "settings": {"optim.lr": lr}}
            runs.append(record)
            if extension:
                rows.append(row | {"arm": f"mamba + {extension}", "extension": extension})
    pruned = {"run": "p", "arm": "mamba", "lr": 8e-3, "settings": {"optim.lr": 8e-3}}
    runs.append(pruned | {"status": "stopped", "reason": "pruned at step 10 of 40"})
    return gather(rows, runs)


def test_only_the_best_rate_is_an_arm_and_every_rate_is_in_the_table():
    results = tuned()
    assert results.arms == ["mamba"]
    assert {row["lr"] for row in results.rows} == {4e-3}
    table = rates_table(results)
    assert table is not None
    (row,) = table.rows
    assert [cell.text for cell in row] == ["mamba", "0.6000", "0.3000", "pruned at step 10 of 40"]
    assert [cell.kind for cell in row] == ["", "", "best", "reason"]
    assert row[2].note == "2 seeds, 0.2 to 0.4"
    assert "pruned at step 10 of 40" in render(results, styles(results))


@pytest.mark.parametrize("extension", [None, "state_scaling"])
def test_a_tuned_arm_is_not_said_to_be_untuned_and_its_other_rates_are_no_failures(extension):
    said = banners(tuned(extension))
    assert not any("Untuned" in line or "not finished" in line for line in said)


def test_rows_of_one_rate_have_no_such_table():
    rows = [score_row("mamba", 512, 2.0)]
    assert rates_table(gather(rows, run_records(rows))) is None


def test_a_best_rate_on_the_edge_of_the_grid_is_marked():
    rates = [Rate("mamba", lr, (1 - lr,), chosen=lr == 4e-3) for lr in (1e-3, 2e-3, 4e-3)]
    results = dataclasses.replace(tuned(), rates=tuple(rates))
    table = rates_table(results)
    assert table is not None
    assert "best rate at the edge of the grid" in table.rows[0][3].note
    assert "best rate at the edge" not in table.rows[0][1].note


APART = [{"size": "base"}, {"settings": {"size.layers": 9}}, *({k: "b"} for k in VALIDATED_ON)]


@pytest.mark.parametrize("apart", APART)
def test_two_arms_of_one_name_have_their_own_rates(apart):
    runs = []
    for more, best in (({}, 0.5), (apart, 0.25)):
        for lr, loss in ((1e-3, best), (4e-3, best + 0.125)):
            run = {"run": f"{best}-{lr}", "arm": "mamba", "lr": lr, "size": "small"}
            run |= dict.fromkeys(VALIDATED_ON, "a") | more
            settings = {"optim.lr": lr, **more.get("settings", {}), "size.name": run["size"]}
            runs.append(run | {"settings": settings, "status": "done", "valid_loss": loss})
    rows = [score_row("mamba", 512, 2.0, run=run["run"], lr=run["lr"]) for run in runs]
    once = {"run": "c", "arm": "mamba", "lr": 1e-3, "settings": {"optim.lr": 1e-3, "seq_len": 9}}
    rows.append(score_row("mamba", 512, 2.0, run="c", train_length=9))
    results = gather(rows, [*runs, once | {"status": "done", "valid_loss": 1.0}])
    table = rates_table(results)
    assert table is not None
    losses = [[cell.text for cell in row[1:]] for row in table.rows]
    assert losses == [["0.5000", "0.6250"], ["0.2500", "0.3750"]]
    assert len({row[0].text for row in table.rows}) == 2
    assert any("one was tried for every arm" in line for line in banners(results))
