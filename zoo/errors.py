"""Errors of one line. The bottom of the import order: anything may import this.

A user's mistake reads `<option>=<value>: <rule>. <what to do>.` Call `refuse`, or `refuse_path`
for a file or folder, instead of writing that line by hand: they put the parts together.
"""

import difflib
import json
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from zoo.paths import PACKAGE, ROOT

LONGEST_VALUE = 100  # characters of a value that are shown
# An option with its value, or a path; what is wrong; what to do. A rule that says what a value
# must be says what to do as well.
FORM = re.compile(r"(?!unknown )(?![^=]*: unknown option)\S.*?: (must \S.*|\S.*?[^.]\. [A-Z].*)\.")


class UserError(ValueError):
    """A mistake in the input, in one line; the programs print it and exit with code 2."""


class RunError(RuntimeError):
    """Why a run cannot go on, in one line; the programs print it and exit with code 1."""


class NonFiniteError(RunError):
    """Training diverged: the loss or the gradient is not finite; names the step and the batch."""


class NoStateError(TypeError):
    """A mixer that keeps no state was given one: it can be read whole, not in chunks."""


def refuse(option: str, value: Any, rule: str, advice: str = "") -> NoReturn:
    """Raise the `UserError` for a value that breaks a rule.

    Args:
        option: the option as it is written on the command line, such as `optim.lr`. Code that
            knows only the last name gives that one; whoever knows the rest adds it (`below`).
        value: what was given.
        rule: what is wrong or allowed, without a final period: "must be at least 1".
        advice: what to do about it, a sentence: "Use a smaller seq_len.". It may be left out only
            where the rule names the allowed values ("must be ..").
    """
    raise UserError(sentence(f"{option}={shown(value)}", rule, advice))


def refuse_path(path: Path | str, rule: str, advice: str = "") -> NoReturn:
    """Raise the `UserError` for a file, a folder or a word that is no option, named as it is."""
    raise UserError(sentence(str(path), rule, advice))


def sentence(setting: str, rule: str, advice: str = "") -> str:
    """The line `<setting>: <rule>. <advice>.`, for errors that are recorded rather than raised."""
    rule, advice = rule.removesuffix("."), advice.removesuffix(".")
    assert advice or rule.startswith("must "), f"what to do about {rule!r}?"
    return f"{setting}: {rule}." + (f" {advice}." if advice else "")


def below(path: str, error: ValueError) -> UserError:
    """The error of `<name>=<value>` as that of `<path>.<name>=<value>`."""
    return UserError(f"{path}.{error}")


def shown(value: Any) -> str:
    """A value as it is written on the command line: null, true, 2, [1,2]."""
    if value is None or isinstance(value, bool):
        text = json.dumps(value)
    elif isinstance(value, float):
        text = numeral(value).removesuffix(".0")
    elif isinstance(value, list | tuple):
        text = f"[{','.join(map(shown, value))}]"
    else:
        text = str(value)
    text = re.sub(r"\s*\n\s*", " ", text)  # of an array, or a text of several lines
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def numeral(value: float) -> str:
    """The number as people type it: 1e-9 and 1e30, which Python writes 1e-09 and 1e+30."""
    return re.sub(r"e(-?)\+?0*(?=\d)", r"e\1", repr(value))


@contextmanager
def short_names(*places: str) -> Iterator[None]:
    """Within, errors name options as a command does that leaves out the places where they are."""
    try:
        yield
    except UserError as error:
        said = str(error)
        for place in places:
            said = said.removeprefix(place)
        raise UserError(said) from None


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed spelling closest to `name`, or None where nothing is close."""
    found = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.55)
    return found[0] if found else None


def refuse_unknown(
    setting: str, kind: str, name: object, allowed: Iterable[str], guess: str | None = None
) -> NoReturn:
    """Raise the `UserError` for a name that is none of `allowed`, with the nearest of them.

    `guess` is the nearest where the caller knows better, "" where there is none.
    """
    allowed = list(allowed)
    guess = nearest(str(name), allowed) if guess is None else guess
    hint = f"Did you mean {guess!r}? " if guess else ""
    rest = f"Use one of: {', '.join(allowed)}" if allowed else "There is none"
    raise UserError(sentence(setting, f"unknown {kind}", f"{hint}{rest}"))


def choose(option: str, name: str, allowed: Iterable[str], kind: str | None = None) -> str:
    """Return `name` if it is one of `allowed`, otherwise refuse it as the value of `option`.

    `kind` is what such a name is called; the option's last name by default.
    """
    allowed = list(allowed)
    if name in allowed:
        return name
    refuse_unknown(f"{option}={name}", kind or option.rpartition(".")[2], name, allowed)


def place_of(error: Exception) -> str:
    """The innermost line of this package that raised an error: " (zoo/tasks/speed.py:31)".

    Where that is the line which caught it, it says nothing and is left out.
    """
    frames = traceback.extract_tb(error.__traceback__)[1:]
    files = [(Path(frame.filename).resolve(), frame.lineno) for frame in frames]
    own = [(file, line) for file, line in files if file.is_relative_to(PACKAGE)]
    return f" ({own[-1][0].relative_to(ROOT).as_posix()}:{own[-1][1]})" if own else ""
