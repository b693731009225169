"""Draw a report from rows that are there: of a published table, or of run folders.

Nothing is trained or measured: `zoo report state_tracking`, `zoo report run='runs/recall/*'`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.cli.guard import read_options, run_program
from zoo.errors import refuse, refuse_path
from zoo.report import published
from zoo.runs.files import check_report
from zoo.runs.find import find_distinct_runs

USAGE = """zoo report [table | run=<pattern>] [report=report.html] [wandb=<entity>/<project>]
draw a report again from rows: nothing is trained or measured

  zoo report                      the tables there are, and the commands they came from
  zoo report state_tracking       the page and its pictures; a table is a name or a .json file
  zoo report run='runs/recall/*'  of what was measured of these runs
  zoo report run='runs/recall/*' wandb=lab/lengths
                                  and as a report of W&B; needs a login and zoo[wandb-report]
"""
OPTIONS: dict[str, Any] = {"run": None, "report": "report.html", "wandb": None, "runs": "runs"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run_program("zoo report", USAGE, argv, draw)


def draw(words: Sequence[str]) -> int:
    """Carry the command out; see the module."""
    names = [word for word in words if "=" not in word]
    given = read_options([word for word in words if "=" in word], [*OPTIONS])
    if len(names) + ("run" in given) > 1:
        refuse_path(" ".join(words), "must be one table or run=")
    for name in ("wandb", "runs"):
        if name in given and "run" not in given:
            refuse(name, given[name], "needs the runs to compare", "Give run=<pattern>")
    if "runs" in given and not Path(given["runs"]).is_dir():
        refuse("runs", given["runs"], "must be a folder that is there")
    if names or "run" in given:
        return _write(names, OPTIONS | given)
    if "report" in given:
        refuse("report", given["report"], "needs what to draw", "Give a table or run=<pattern>")
    for path in sorted(published.FOLDER.glob("*.json")):
        machine = published.read(path.stem)["machine"]
        sys.stdout.write(f"{path.stem:<20} zoo tune experiment={path.stem} ({machine})\n")
    return 0


def _write(names: Sequence[str], options: Mapping[str, Any]) -> int:
    """Write the page, and the report of W&B where one is wanted."""
    page = Path(options["report"])
    check_report("report", options["report"])
    wandb_report = None
    if options["wandb"]:
        from zoo.report import wandb_report  # heavy: seconds

        wandb_report.entity_and_project(options["wandb"])
        wandb_report.require(options["wandb"])
    if options["run"]:
        folders = find_distinct_runs(options["run"], options["runs"])
        from zoo.tasks.known import require_known  # heavy: seconds

        rows, runs = require_known(options["run"], folders)
    else:
        rows, runs = published.unpack(published.read(names[0]))
    from zoo.report import write_report

    sys.stdout.write(f"{write_report(rows, runs, page)}\n\nreport: {page}\n")
    if wandb_report is not None:
        place = options["wandb"]
        url = wandb_report.save_report(rows, runs, place, Path(options["runs"]), page)
        sys.stdout.write(f"\nW&B report: {url}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
