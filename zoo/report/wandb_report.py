"""Build the comparison of runs as a W&B report: panel grids, tables, pictures and text.

The numbers are those of `mirror`'s run, which the panels draw; the report is a tree of plain
dictionaries until it is saved, so that it can be read and tested without W&B's package.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import refuse, refuse_path
from zoo.report.caveats import banners, failures, limits
from zoo.report.headlines import heading
from zoo.report.page import facts, picture_names
from zoo.report.protocols import PROTOCOLS
from zoo.report.rows import Results, gather
from zoo.report.tables import Table, budgets, grid, shown_quantities, task_tables
from zoo.report.timings import comparable, incomparable
from zoo.report.verdicts import claims_table
from zoo.report.wandb import Rows, metric_name, mirror
from zoo.report.words import caption, score

Block = dict[str, Any]  # "block": the class of wandb_workspaces.reports.v2, then its arguments
CURVES = {"train/loss": "Training loss", "valid/loss": "Validation loss"}
WIDE = {"block": "Layout", "w": 24, "h": 10}
HALF = {"block": "Layout", "w": 12, "h": 8}


def report_blocks(
    results: Results, *, entity: str, project: str, evaluation: str, pictures: Sequence[str] = ()
) -> list[Block]:
    """The report's blocks from top to bottom, as plain trees.

    Args:
        evaluation: the id of the W&B run that has the rows and pictures.
        pictures: the names of the report's PNGs, as `mirror` logs them under figures/.
    """
    place = {"block": "Runset", "entity": entity, "project": project}
    measured = place | {"name": "evaluation", "filters": f"Metric('ID') = '{evaluation}'"}
    blocks = [_text("P", " · ".join(facts(results)))]
    blocks += [_text("CalloutBlock", line) for line in banners(results)]
    for task, said in results.tasks.items():
        blocks += [_text("H2", said.title), _text("P", said.about)]
        blocks += [_text("P", line) for line in _left_out(results, task)]
        if plots := [*_plots(results, task)]:
            blocks.append({"block": "PanelGrid", "runsets": [measured], "panels": plots})
        blocks += [_text("MarkdownBlock", markdown(table)) for table in _tables(results, task)]
    blocks += [_text("H2", "Pictures and rows"), _media(measured, pictures)]
    blocks += [_text("H2", "Training"), *_training(results, place)]
    blocks.append(_text("MarkdownBlock", markdown(budgets(results))))
    for title, table in {
        "Claims": claims_table(results),
        "Without a result": failures(results),
    }.items():
        blocks += [_text("H2", title), _text("MarkdownBlock", markdown(table))] if table else []
    blocks.append(_text("H2", "Limits"))
    return blocks + [_text("P", line) for line in limits(results)]


def save_report(rows: Rows, runs: Rows, where: str, folder: Path, page: Path) -> str:
    """Mirror the rows online, save the report beside them, and return its address.

    Args:
        where: <entity>/<project>.
        folder: where W&B keeps its files.
        page: the HTML report, whose pictures go with it.

    Raises:
        UserError: W&B's package for reports or a login is missing, before anything is sent.
    """
    entity, project = entity_and_project(where)
    reports = require(where)
    made = mirror(rows, runs, folder, "online", entity=entity, project=project, report=page)
    if made.name.startswith("offline-"):
        refuse("wandb", where, f"W&B cannot be reached; the rows are in {made}", "Try again")
    results, evaluation = gather(rows, runs), made.name.rpartition("-")[2]
    blocks = report_blocks(
        results,
        entity=entity,
        project=project,
        evaluation=evaluation,
        pictures=sorted(picture_names(page)),
    )
    report = reports.Report(
        entity=entity,
        project=project,
        title=heading(results)[:128],
        blocks=[build(block, reports) for block in blocks],
        width="fluid",
    )
    report.save()
    return report.url


def entity_and_project(where: str) -> tuple[str, str]:
    """The two parts of wandb=<entity>/<project>."""
    entity, _, project = where.partition("/")
    if not entity or not project or "/" in project:
        refuse("wandb", where, "must be <entity>/<project>", "Name both, as W&B's addresses do")
    return entity, project


def require(where: str) -> Any:
    """The package that builds reports, where a login is known too; UserError otherwise."""
    try:
        reports = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError:
        rule = "is not installed, and zoo report wandb= needs it"
        refuse_path("wandb-workspaces", rule, "Run pip install 'zoo[wandb-report]'")
    import wandb

    if not wandb.login(prompt=False, verify=False):
        refuse("wandb", where, "no W&B login is known here", "Run wandb login first")
    return reports


def build(tree: Any, reports: Any) -> Any:
    """A tree of plain blocks as objects of the package."""
    if isinstance(tree, list):
        return [build(each, reports) for each in tree]
    if not isinstance(tree, dict) or "block" not in tree:
        return tree
    arguments = {key: build(value, reports) for key, value in tree.items() if key != "block"}
    return getattr(reports, tree["block"])(**arguments)


def markdown(table: Table) -> str:
    """A table as Markdown, each cell's note behind it."""
    heads = [" ".join(filter(None, head)) for head in table.head]
    lines = [heads, ["---"] * len(heads)]
    for row in table.rows:
        cells = [[" ".join(filter(None, (c.text, c.note)))] + [""] * (c.span - 1) for c in row]
        lines.append([text.replace("|", r"\|") for cell in cells for text in cell])
    drawn = (f"| {' | '.join(line)} |".replace("\n", " ") for line in lines)
    return "\n".join([table.caption, "", *drawn])


def _plots(results: Results, task: str) -> Iterator[Block]:
    """A line plot over test length for each quantity of a task that was measured."""
    for quantity in results.tasks[task].quantities:
        cells = comparable(results, task, quantity)
        arms = [label for label, mine in cells.items() if any(c.seeds for c in mine.values())]
        if arms:
            where = ", ".join(map(str, quantity.where.values()))
            title = f"{caption(quantity)}{f', {where}' if where else ''}"
            names = [metric_name(task, quantity, label) for label in arms]
            yield {
                "block": "LinePlot",
                "title": title,
                "x": "length",
                "y": names,
                "layout": HALF,
            } | {
                "log_x": True,
                "title_x": "test length",
                "title_y": quantity.unit or quantity.name,
            }


def _left_out(results: Results, task: str) -> Iterator[str]:
    """The arms that the plots of a task's times leave out, and why."""
    for quantity in results.tasks[task].quantities:
        if apart := incomparable(results, task, quantity):
            arms = (f"{label} ({why})" for label, why in apart.items())
            yield f"{caption(quantity)}: not drawn: {', '.join(arms)}."


def _tables(results: Results, task: str) -> list[Table]:
    """Those of a task; of perplexity the scores of each protocol."""
    if task != "perplexity":
        return task_tables(results, task) if shown_quantities(results, task) else []
    found = []
    for protocol, words in PROTOCOLS.items():
        cells = results.cells("perplexity", "bits_per_byte", protocol=protocol)
        found.append(grid(results, cells, f"Bits per byte. {words}.", score))
    return [table for table in found if table]


def _media(measured: Block, pictures: Sequence[str]) -> Block:
    """The report's pictures and the rows as a table that W&B filters and sorts."""
    panels: list[Block] = [{"block": "WeavePanelSummaryTable", "table_name": "rows"}]
    if keys := [f"figures/{Path(name).stem}" for name in pictures]:
        panels.append({"block": "MediaBrowser", "media_keys": keys, "num_columns": 1})
    panels = [panel | {"layout": WIDE} for panel in panels]
    return {"block": "PanelGrid", "runsets": [measured], "panels": panels}


def _training(results: Results, place: Mapping[str, Any]) -> Iterator[Block]:
    """The curves of the runs that W&B has, a run set for each arm."""
    arms: dict[str, list[str]] = {}
    for run in results.runs:
        if run.get("wandb"):
            arms.setdefault(str(run.get("arm") or run.get("run")), []).append(run["wandb"])
    if not arms:
        yield _text("P", "The runs were trained without W&B: it has no curves of them.")
        return
    sets = [
        {**place, "name": arm, "filters": f"Metric('ID') in {ids!r}"} for arm, ids in arms.items()
    ]
    panels = [
        {"block": "LinePlot", "title": title, "x": "Step", "y": [name], "layout": HALF}
        for name, title in CURVES.items()
    ]
    yield {"block": "PanelGrid", "runsets": sets, "panels": panels}


def _text(block: str, text: str) -> Block:
    return {"block": block, "text": text}
