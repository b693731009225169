"""What went wrong, in one line. The bottom of the import order: anything may import this."""

import difflib
from collections.abc import Iterable
from typing import NoReturn


class UserError(ValueError):
    """A mistake in the input, told in one line; the programs print it and exit with code 2."""


class RunError(RuntimeError):
    """Why a run cannot go on, told in one line; the programs print it and exit with code 1."""


class NoStateError(TypeError):
    """A mixer that keeps no state was given one: it can be read whole, not in chunks."""


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed spelling closest to `name`, or None where nothing is close."""
    found = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.55)
    return found[0] if found else None


def refuse(kind: str, name: object, allowed: Iterable[str]) -> NoReturn:
    """Raise the `UserError` for an unknown name: what was wrong, the nearest, what is allowed."""
    allowed = list(allowed)
    guess = nearest(str(name), allowed)
    hint = f"did you mean {guess!r}? " if guess else ""
    raise UserError(f"unknown {kind} {str(name)!r}: {hint}allowed: {', '.join(allowed)}")


def choose(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Return `name` if it is one of `allowed`, otherwise `refuse`."""
    allowed = list(allowed)
    return name if name in allowed else refuse(kind, name, allowed)
