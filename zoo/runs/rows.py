"""A run's results.jsonl: one measurement per line; a later line replaces an earlier one."""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zoo.config.stored import row_as_now
from zoo.errors import refuse_path
from zoo.measurement import replaces, wrong_field
from zoo.runs.files import altered, append_line, checked, one_line, parse_json

log = logging.getLogger("zoo")


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Add one measurement, with a hash of its fields."""
    append_line(file, json.dumps(checked(row)))


def time_of_now() -> str:
    """As rows give the time at which they were measured."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the measurements of the last weights that were measured, the latest of each question,
    in the order of the file.

    Damaged lines are left out with a warning. UserError where the file cannot be read.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        refuse_path(file, f"cannot be read ({one_line(error)})", "Change its permissions")
    rows: dict[int, dict[str, Any]] = {}
    groups: dict[str, list[int]] = {}  # lines that may answer the same question
    train_steps = None
    for number, line in enumerate(lines, 1):
        if not line and number == len(lines):
            continue
        row = _parse(line)
        if isinstance(row, str):
            log.warning("%s: line %d %s and is left out", file, number, row)
            continue
        key = json.dumps([row.get(name) for name in ("task", "protocol", "phase", "length")])
        same = groups.setdefault(key, [])
        for other in [other for other in same if replaces(row, rows[other])]:
            same.remove(other)
            del rows[other]
        same.append(number)
        rows[number], train_steps = row, row.get("train_steps")
    return [row for row in rows.values() if row.get("train_steps") == train_steps]


def _parse(line: bytes) -> dict[str, Any] | str:
    """Return the measurement in a line, or what is wrong with the line."""
    try:
        row = parse_json(line.decode("utf-8"))
    except ValueError:
        return "was not written whole"
    if not isinstance(row, dict) or not row:
        return "holds no measurement"
    if altered(row):
        return "was altered since it was written"
    if why := wrong_field(row):
        return f"holds no measurement ({why})"
    return row_as_now(row)
