"""`train.py --list`, `zoo list`: everything that can be chosen, a line each.

The lines are the first ones of the YAML files, which are read as text: this answers at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from zoo.errors import choose
from zoo.paths import shipped

KINDS = {  # as they are called, and the group of configs/ that holds them
    "models": "model",
    "extensions": "extension",
    "recipes": "recipe",
    "corpora": "data",
    "tasks": "task",
    "compressions": "compress",
    "experiments": "experiment",
    "sizes": "size",
}


def summary(file: Path) -> str:
    """The first comment of a YAML file, without Hydra's own."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("# ") and not line.startswith("# @package"):
                return line[2:].strip()
    return ""


def listing(kinds: Sequence[str] = ()) -> str:
    """The choices of these kinds, of all where none is named. UserError for an unknown one."""
    parts = []
    for kind in kinds or KINDS:
        group = KINDS[choose("--list", kind, KINDS, kind="kind")]
        files = sorted((shipped("configs") / group).glob("*.yaml"))
        width = max(len(file.stem) for file in files)
        lines = [f"  {file.stem:<{width}}  {summary(file)}" for file in files]
        way = "zoo recipe <name>" if kind == "recipes" else f"{group}=<name>"
        parts.append("\n".join([f"{kind}: {way}", *lines]) + "\n")
    return "\n".join(parts)


def main(argv: Sequence[str] = ()) -> int:
    """Print what `argv` names."""
    sys.stdout.write(listing(argv))
    return 0
