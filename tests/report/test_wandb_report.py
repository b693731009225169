"""The W&B report: what its blocks show, and one line where it cannot be made."""

import sys

import pytest
from synthetic import experiment, run_records

import zoo.report.wandb_report as wandb_report
from zoo.errors import UserError
from zoo.report.rows import Results, gather
from zoo.report.tables import Table, Td
from zoo.report.wandb import by_length
from zoo.report.wandb_report import build, markdown, report_blocks, save_report

PACKAGE = ("wandb_workspaces", "wandb_workspaces.reports", "wandb_workspaces.reports.v2")
PLACE = {"entity": "lab", "project": "lengths", "evaluation": "abcd1234"}


@pytest.fixture(scope="module")
def results() -> Results:
    rows = experiment()
    arms = {row["run"]: row["arm"] for row in rows}
    runs = [
        run | {"wandb": f"id-{run['run']}", "arm": arms[run["run"]]} for run in run_records(rows)
    ]
    return gather(rows, runs)


@pytest.fixture(scope="module")
def blocks(results) -> list[dict]:
    return report_blocks(results, **PLACE, pictures=["speed.png"])


def panels(blocks: list[dict], kind: str) -> list[dict]:
    grids = [block for block in blocks if block["block"] == "PanelGrid"]
    return [panel for grid in grids for panel in grid["panels"] if panel["block"] == kind]


def test_every_metric_that_is_mirrored_has_its_line(blocks):
    by_metric = {name for metrics in by_length(experiment(), []).values() for name in metrics}
    plots = [panel for panel in panels(blocks, "LinePlot") if panel["x"] == "length"]
    assert {name for plot in plots for name in plot["y"]} == by_metric
    assert all(plot["log_x"] for plot in plots)


def test_plots_by_length_draw_the_evaluations_run_and_curves_those_of_training(blocks, results):
    grids = [block for block in blocks if block["block"] == "PanelGrid"]
    sets = [one for grid in grids for one in grid["runsets"]]
    assert {(one["entity"], one["project"]) for one in sets} == {("lab", "lengths")}
    *measured, training = grids
    assert {one["filters"] for grid in measured for one in grid["runsets"]} == {
        "Metric('ID') = 'abcd1234'"
    }
    named = {one["name"]: one["filters"] for one in training["runsets"]}
    assert {*named} == {run["arm"] for run in results.runs}
    for run in results.runs:
        assert repr(run["wandb"]) in named[run["arm"]]
    assert [panel["y"] for panel in training["panels"]] == [["train/loss"], ["valid/loss"]]


def test_tables_pictures_rows_and_limits_are_there(blocks):
    tables = [block["text"] for block in blocks if block["block"] == "MarkdownBlock"]
    assert any("Bits per byte." in text and "| transformer-alibi |" in text for text in tables)
    assert any("What each arm was given." in text for text in tables)
    (media,), (rows,) = panels(blocks, "MediaBrowser"), panels(blocks, "WeavePanelSummaryTable")
    assert media["media_keys"] == ["figures/speed"]
    assert rows["table_name"] == "rows"
    assert any("not tuned" in block.get("text", "") for block in blocks)


def test_runs_that_wandb_has_not_seen_have_no_curves_and_that_is_said():
    rows = experiment()
    blocks = report_blocks(gather(rows, run_records(rows)), **PLACE)
    assert any("trained without W&B" in block.get("text", "") for block in blocks)
    assert all(panel["x"] == "length" for panel in panels(blocks, "LinePlot"))


def test_a_table_in_markdown_has_as_many_cells_in_each_line():
    table = Table("T.", [("arm", ""), ("8", "x1"), ("16", "x2")], [[Td("a|b"), Td("why", span=2)]])
    lines = markdown(table).splitlines()[2:]
    assert lines == ["| arm | 8 x1 | 16 x2 |", "| --- | --- | --- |", r"| a\|b | why |  |"]


def test_the_package_takes_every_block(blocks):
    reports = pytest.importorskip("wandb_workspaces.reports.v2")
    built = build(blocks, reports)
    assert [type(block).__name__ for block in built] == [block["block"] for block in blocks]
    grid = next(block for block in built if isinstance(block, reports.PanelGrid))
    assert isinstance(grid.panels[0], reports.LinePlot)


def test_without_the_package_or_a_login_nothing_is_sent(monkeypatch, tmp_path):
    monkeypatch.setattr(wandb_report, "mirror", lambda *_, **__: pytest.fail("it was sent"))
    given = ([], [], "lab/lengths", tmp_path, tmp_path / "page.html")
    for name in PACKAGE:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'zoo\[wandb-report\]'"):
        save_report(*given)
    for name in PACKAGE:
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setattr("wandb.login", lambda **_: False)
    with pytest.raises(UserError, match="wandb=lab/lengths: no W&B login is known here"):
        save_report(*given)


@pytest.mark.parametrize("where", ["lengths", "/lengths", "lab/", "a/b/c"])
def test_a_place_is_an_entity_and_a_project(where, tmp_path):
    with pytest.raises(UserError, match="must be <entity>/<project>"):
        save_report([], [], where, tmp_path, tmp_path / "page.html")
