"""Draw a report from rows that are there: of a published table, or of run folders.

Nothing is trained or measured: `zoo report state_tracking`, `zoo report run='runs/recall/*'`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.cli.guard import run_program
from zoo.errors import refuse, refuse_path, refuse_unknown
from zoo.report import published
from zoo.runs.files import check_report
from zoo.runs.find import find_runs

USAGE = """zoo report [table | run=<pattern>] [report=report.html] [wandb=<entity>/<project>]
draw a report again from rows: nothing is trained or measured

  zoo report                      the tables there are, and the commands they came from
  zoo report state_tracking       the page and its pictures; a table is a name or a .json file
  zoo report run='runs/recall/*'  of what was measured of these runs
  zoo report run='runs/recall/*' wandb=lab/lengths
                                  and as a report of W&B; needs a login and zoo[wandb-report]
"""
OPTIONS = {"run": None, "report": "report.html", "wandb": None, "runs": "runs"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run_program("zoo report", USAGE, argv, draw)


def draw(words: Sequence[str]) -> int:
    """Carry the command out; see the module."""
    names = [word for word in words if "=" not in word]
    options: dict[str, Any] = dict(OPTIONS)
    for name, _, value in (word.partition("=") for word in words if "=" in word):
        if name not in OPTIONS:
            refuse_unknown("zoo report", "option", name, OPTIONS)
        options[name] = value
    if len(names) + bool(options["run"]) > 1 or len(words) > len({w.split("=")[0] for w in words}):
        refuse_path(" ".join(words), "must be one table or run=, and each option once")
    if options["wandb"] and not options["run"]:
        refuse("wandb", options["wandb"], "needs the runs to compare", "Give run=<pattern>")
    if names or options["run"]:
        return _write(names, options)
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
        folders = find_runs(options["run"], options["runs"])
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
