"""zoo from Python: `zoo.load`, `zoo.rows`, `zoo.write_report`. Imported when one is used."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo import report
from zoo.config.domains import check
from zoo.model.language_model import load_language_model as load
from zoo.runs.files import check_path, check_report
from zoo.runs.find import find_distinct_runs, find_runs
from zoo.runs.folder import RunFolder
from zoo.tasks.known import all_known, require_known

__all__ = ["load", "rows", "write_report"]

HIDDEN = ("declares", "question")  # for those who draw a row, not for those who read it


Pattern = str | Path | Sequence[str | Path]


def rows(
    pattern: Pattern, folder: str | Path = "runs", other_code: bool = False
) -> list[dict[str, Any]]:
    """What was measured of runs: one dictionary for each row, as pandas.DataFrame takes them.

    Rows that another version of the code measured are left out, with a warning of how many.

    Args:
        pattern: a run folder, a pattern such as "runs/*", or a list of them.
        folder: where run folders are looked for that are not found as they are written.
        other_code: whether to include these, where the code of now has answered nothing; each row
            then has a field `other_code` that says what it is.

    Raises:
        UserError: where a pattern names no run, or a run is damaged.
    """
    check("other_code", other_code, bool)
    found, _ = all_known(_found(pattern, folder), other_code)
    return [{name: one for name, one in row.items() if name not in HIDDEN} for row in found]


def write_report(
    pattern: Pattern, html: str | Path = "report.html", folder: str | Path = "runs"
) -> str:
    """Write the report of what was measured of runs; return the tables as text. Measures nothing.

    Args:
        pattern, folder: as for `rows`.
        html: the file to write; its pictures go into a folder of its name beside it. Folders above
            it that are missing are made.

    Raises:
        UserError: where a pattern names no run, a run is damaged, nothing was measured, or the file
            cannot be written or is another's.
    """
    check("html", html, str | Path, "report.html")
    check_report("html", str(html))
    folders = _found(pattern, folder, find_distinct_runs)
    found, records = require_known(_words(pattern), folders, "pattern")
    return report.write_report(found, records, Path(html))


def _found(
    pattern: Pattern, folder: str | Path, find: Callable[..., list[RunFolder]] = find_runs
) -> list[RunFolder]:
    check("pattern", pattern, Pattern)
    check("folder", folder, str | Path, "runs")
    check_path("folder", str(folder))
    return find(_words(pattern), str(folder), "pattern")


def _words(pattern: Pattern) -> str | list[str]:
    return [*map(str, pattern)] if isinstance(pattern, list | tuple) else str(pattern)
