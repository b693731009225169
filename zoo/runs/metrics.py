"""A run's metrics.csv: training and validation figures by step."""

import csv
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import refuse_path
from zoo.runs.files import append_line, one_line, write_text

log = logging.getLogger("zoo")


class MetricsFile:
    """Appends figures by step to a CSV: the column `step`, then `columns`.

    Opening it drops the rows after `step`, which a resumed run writes again. A figure that a row
    lacks is left empty.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, step: int = 0) -> None:
        self.path = path
        self.rows = [row for row in read_metrics(path) if int(row["step"]) <= step]
        before = [name for row in self.rows for name in row]
        self.columns = list(dict.fromkeys(["step", *columns, *before]))
        write_text(path, self._csv(self.rows, header=True))

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the figures of one step. ValueError for a column that was not declared."""
        append_line(self.path, self._csv([row]).rstrip("\n"))

    def complete(self, row: Mapping[str, Any]) -> None:
        """Add figures to the row of the step that was continued after, which is there."""
        (*_, last) = (one for one in self.rows if int(one["step"]) == row["step"])
        last |= row
        write_text(self.path, self._csv(self.rows, header=True))

    def _csv(self, rows: Iterable[Mapping[str, Any]], header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def last_metric(path: Path, column: str) -> float | None:
    """The last figure in a column; None where there is none."""
    found = [row[column] for row in read_metrics(path) if row.get(column)]
    return float(found[-1]) if found else None


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read the rows; none where there is no file.

    A last line without an end, which a kill cut, is left out. So are lines that do not hold one
    figure per column, with a warning. UserError where the file cannot be read.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        refuse_path(path, f"cannot be read ({one_line(error)})", "Change its permissions")
    if not lines:
        return []
    header, bad, rows = _fields(lines[0]), [], []
    if not header or header[0] != "step" or len(set(header)) < len(header) or "" in header:
        log.warning("%s is damaged: it does not begin with the names of its columns", path)
        return []
    for number, line in enumerate(lines[1:], 2):
        fields = _fields(line)
        if len(fields) == len(header) and _is_step(fields[0]) and all(map(_is_figure, fields)):
            rows.append(dict(zip(header, fields, strict=True)))
        else:
            bad.append(number)
    if bad:
        log.warning(
            "%s: %d lines hold no figures and are left out (line %d)", path, len(bad), bad[0]
        )
    return rows


def _fields(line: bytes) -> list[str]:
    """The fields in a line of CSV; none where it is no text."""
    try:
        return next(csv.reader([line.decode("ascii")]), []) if b"\0" not in line else []
    except (UnicodeDecodeError, csv.Error):
        return []


def _is_figure(text: str) -> bool:
    try:
        return not text or float(text) is not None
    except ValueError:
        return False


def _is_step(text: str) -> bool:
    return text.isdecimal() and len(text) < 19
