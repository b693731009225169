"""What the programs print for their user, a line at a time."""

import os
import sys

_label = ""


def say(text: str) -> None:
    """One line on stderr, beside what the program produces.

    Where nobody reads any more (a closed terminal, `| head -1`), the work goes on without: what it
    has to say is in its folder too.
    """
    try:
        sys.stderr.write(f"{_label}{text}\n")
        sys.stderr.flush()
    except OSError:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, to the end of the process


def label(text: str) -> None:
    """Begin every line of this process with `text`: which run of several it speaks of."""
    global _label
    _label = text
