"""Mirror an evaluation to Weights & Biases, without a prompt; the run folders stay the record."""

import base64
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from zoo.measurement import Quantity
from zoo.report.page import picture_names, pictures_folder
from zoo.report.rows import gather
from zoo.report.statistics import finite

Rows = Sequence[Mapping[str, Any]]
log = logging.getLogger("zoo")


def mirror(
    rows: Rows,
    runs: Rows,
    folder: Path,
    mode: Literal["auto", "offline", "online"] = "auto",
    *,
    project: str = "zoo",
    entity: str | None = None,
    config: Mapping[str, Any] | None = None,
    report: Path | None = None,
) -> Path:
    """Log the rows as a table and as metrics over length; return the W&B run's own folder.

    The W&B run is named after what was measured of which runs, and has the report's figures and
    the report itself, where one was written.

    Args:
        config: the evaluation's options.
        report: the HTML file, with its pictures beside it.
        folder: where W&B keeps its files, online or not.
        mode: "auto" is online where a key is known, else offline; "online" without a key is
            offline too, and says so.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    named = {"name": evaluation_name(rows, runs), "job_type": "evaluation", "group": "evaluation"}
    about = named | {"project": project, "config": dict(config or {}), "dir": str(folder)}
    about |= {"entity": entity} if entity else {}
    with begin(mode, **about) as run:
        run.define_metric("length")
        run.define_metric("*", step_metric="length")
        for length, metrics in sorted(by_length(rows, runs).items()):
            run.log({"length": length} | metrics)
        columns: list[Any] = sorted(
            {n for row in rows for n in row} - {"curve", "unit_bits", "unit_bytes", "declares"}
        )
        table = wandb.Table(columns=columns, allow_mixed_types=True)
        for row in rows:
            table.add_data(*(_plain(row.get(column)) for column in columns))
        run.log({"rows": table} | _pages(report))
        return Path(run.dir).parent


def evaluation_name(rows: Rows, runs: Rows) -> str:
    """What was measured of what: "perplexity, speed of mamba-tiny-256-stdlib-s0-1a2b3c4d"."""
    requested = [row for row in rows if row.get("requested", True)]
    tasks = dict.fromkeys(str(row["task"]) for row in requested if row.get("task"))
    names = dict.fromkeys(str(run["run"]) for run in (*runs, *rows) if run.get("run"))
    of = next(iter(names), "nothing") if len(names) < 2 else f"{len(names)} runs"
    return f"{', '.join(tasks) or 'evaluation'} of {of}"


def _pages(report: Path | None) -> dict[str, Any]:
    """The report and its pictures, each as a page of its own: an image of W&B's needs Pillow."""
    import wandb

    if report is None or not report.is_file():
        return {}
    pages = {"report": wandb.Html(report.read_text(encoding="utf-8"), inject=False)}
    for name in sorted(picture_names(report)):
        if (file := pictures_folder(report) / name).is_file():
            data = base64.b64encode(file.read_bytes()).decode()
            picture = f'<img alt="{file.stem}" width="100%" src="data:image/png;base64,{data}">'
            pages[f"figures/{file.stem}"] = wandb.Html(picture, inject=False)
    return pages


def begin(mode: str, **about: Any) -> Any:
    """Start a W&B run, online where that works: a dead network must not cost the results."""
    import wandb

    settings = wandb.Settings(console="off", silent=True, init_timeout=20, reinit="create_new")
    try:
        if mode != "offline" and wandb.login(prompt=False, verify=False):
            return wandb.init(mode="online", settings=settings, **about)
        if mode == "online":
            log.warning("no W&B key is known: mirroring offline, under %s", about["dir"])
    except wandb.Error as error:
        log.warning("W&B cannot be used (%s): mirroring offline, under %s", error, about["dir"])
    return wandb.init(mode="offline", settings=settings, **about)


def by_length(rows: Rows, runs: Rows) -> dict[int, dict[str, float]]:
    """length -> metric name -> value, the mean over seeds, for every quantity of every arm."""
    results = gather(rows, runs)
    metrics: dict[int, dict[str, float]] = {}
    for task, said in results.tasks.items():
        for quantity in said.quantities:
            for label, mine in results.measured(task, quantity).items():
                name = metric_name(task, quantity, label)
                for length, cell in mine.items():
                    if cell.value is not None:
                        metrics.setdefault(length, {})[name] = cell.value
    return metrics


def metric_name(task: str, quantity: Quantity, label: str) -> str:
    """<task>/<field>/<what distinguishes its rows>/<arm>."""
    return "/".join([task, quantity.field, *map(str, quantity.where.values()), label])


def _plain(value: Any) -> Any:
    """A table cell W&B takes: numbers and words as they are, anything else in words."""
    return value if value is None or finite(value) or isinstance(value, str) else str(value)
