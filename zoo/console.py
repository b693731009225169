"""What the programs print for their user, a line at a time."""

import sys

_label = ""


def say(text: str) -> None:
    """One line on stderr, beside what the program produces."""
    sys.stderr.write(f"{_label}{text}\n")


def label(text: str) -> None:
    """Begin every line of this process with `text`: which run of several it speaks of."""
    global _label
    _label = text
