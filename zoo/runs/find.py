"""Finds run folders by path, name or pattern."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from zoo.errors import refuse
from zoo.runs.files import check_path
from zoo.runs.folder import RunFolder


def find_runs(patterns: str | Sequence[str], runs: str, option: str = "run") -> list[RunFolder]:
    """The run folders that `patterns` name, as paths or within the folder `runs`.

    Folders found by a wildcard are not opened, so that a damaged one does not keep the others from
    being measured. Raises UserError where a pattern names none, or there is no pattern, as the
    value of `option`.
    """
    found: dict[Path, RunFolder] = {}
    if not patterns:
        refuse(option, patterns, "names no run", "Give a folder or pattern like runs/*")
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        check_path(option, pattern)
        places = [pattern, os.path.join(runs, pattern)]
        if glob.has_magic(pattern):
            matches = [match for place in places for match in glob.glob(place, recursive=True)]
            paths = [match for match in sorted(matches) if Path(match, "run.json").is_file()]
        else:
            paths = [place for place in places if os.path.exists(place)][:1] or [pattern]
        if not paths:
            refuse(option, pattern, "no run folder matches", "Give a folder or pattern like runs/*")
        opened = RunFolder if glob.has_magic(pattern) else RunFolder.open
        found |= {Path(path).resolve(): opened(Path(path)) for path in paths}
    return list(found.values())


def find_distinct_runs(
    patterns: str | Sequence[str], runs: str, option: str = "run"
) -> list[RunFolder]:
    """The folders that `find_runs` finds, for a comparison: rows have the name of their folder
    alone, and those of two folders of one name would pass for two seeds.

    Raises UserError for two of one name.
    """
    folders = find_runs(patterns, runs, option)
    named: dict[str, RunFolder] = {}
    for folder in folders:
        if (other := named.setdefault(folder.name, folder)) is not folder:
            rule = f"finds two runs named {folder.name}: {other.path} and {folder.path}"
            refuse(option, patterns, rule, "Name one of them")
    return folders
