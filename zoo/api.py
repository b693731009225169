"""zoo from Python: `zoo.load`, `zoo.rows`, `zoo.write_report`. Imported when one is used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo import report
from zoo.model.language_model import load_language_model as load
from zoo.runs.find import find_runs
from zoo.tasks.known import all_known, require_known

__all__ = ["load", "rows", "write_report"]

HIDDEN = ("declares", "question")  # for those who draw a row, not for those who read it


def rows(pattern: str | Sequence[str], folder: str | Path = "runs") -> list[dict[str, Any]]:
    """What was measured of runs: one dictionary for each row, as pandas.DataFrame takes them.

    Args:
        pattern: a run folder, a pattern such as "runs/*", or a list of them.
        folder: where run folders are looked for that are not found as they are written.

    Raises:
        UserError: where a pattern names no run, or a run is damaged.
    """
    found, _ = all_known(find_runs(pattern, str(folder)))
    return [{name: one for name, one in row.items() if name not in HIDDEN} for row in found]


def write_report(
    pattern: str | Sequence[str], html: str | Path = "report.html", folder: str | Path = "runs"
) -> str:
    """Write the report of what was measured of runs; return the tables as text. Measures nothing.

    Args:
        pattern, folder: as for `rows`.
        html: the file to write; its pictures go into a folder of its name beside it.

    Raises:
        UserError: where a pattern names no run, a run is damaged, or nothing was measured.
    """
    found, records = require_known(pattern, find_runs(pattern, str(folder)))
    return report.write_report(found, records, Path(html))
