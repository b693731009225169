"""Run folders by pattern."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from zoo.errors import UserError
from zoo.runs.files import replacing as replacing  # part of what a run folder offers
from zoo.runs.folder import RunFolder


def find_runs(patterns: str | Sequence[str], runs: str) -> list[RunFolder]:
    """The run folders that `patterns` name, as paths or within `runs`.

    UserError where one names none. Those that a pattern found are not opened: one that is damaged
    does not keep the others from being measured.
    """
    found: dict[Path, RunFolder] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        places = [pattern, os.path.join(runs, pattern)]
        if glob.has_magic(pattern):
            matches = [match for place in places for match in glob.glob(place, recursive=True)]
            paths = [match for match in sorted(matches) if Path(match, "run.json").is_file()]
        else:
            paths = [place for place in places if os.path.exists(place)][:1] or [pattern]
        if not paths:
            raise UserError(f"no run folder matches {pattern!r}")
        opened = RunFolder if glob.has_magic(pattern) else RunFolder.open
        found |= {Path(path).resolve(): opened(Path(path)) for path in paths}
    return list(found.values())
