"""What every program does around its work: say plain lines, take stops, turn errors into lines.

The one place where an error becomes a line and an exit code: `zoo/__main__.py`, and with it
train.py and eval.py, calls `guarded`, and so does each program that begins its lines with its name.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from zoo.console import say
from zoo.errors import RunError, UserError, refuse, refuse_path, refuse_unknown
from zoo.runs.files import one_line
from zoo.runs.stopping import STOPPED, handled


class _Lines(logging.Handler):
    """What the modules log, as the program's own plain lines."""

    held: list[str] | None = None  # while another text is written

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if self.held is None:
            say(line)
        else:
            self.held.append(line)


@contextmanager
def held_back() -> Iterator[None]:
    """Print what modules log only after the block, which writes a text that it would cut."""
    found = [one for one in logging.getLogger("zoo").handlers if isinstance(one, _Lines)]
    held: list[str] = []
    for handler in found:
        handler.held = held
    try:
        yield
    finally:
        for handler in found:
            handler.held = None
        for line in held:
            say(line)


def guarded(program: str, work: Callable[[], int]) -> int:
    """The exit code of `work`; what the user can mend and a stop are printed in one line.

    `program` begins that line; "" where the error names what was called.
    """
    _open_closed()
    log_plainly()
    name = f"{program}: " if program else ""
    try:
        with handled():
            return work()
    except (UserError, OSError) as error:
        say(f"{name}{one_line(error)}")
        return 2
    except RunError as error:
        say(f"{name}{one_line(error)}")
        return 1
    except KeyboardInterrupt as stop:
        say(f"{name}{str(stop) or 'stopped'}")
        return STOPPED


def run_program(
    program: str, usage: str, argv: Sequence[str] | None, work: Callable[[list[str]], int]
) -> int:
    """The exit code of a program that reads its own words; `--help` prints its usage.

    Args:
        program: begins its lines, such as "zoo chat".
        argv: its words; None for those of the process.
        work: carries them out.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return guarded(program, lambda: work(words) if not explains(words, usage) else 0)


def explains(words: Sequence[str], usage: str) -> bool:
    """Whether `--help` is given, and has been answered with the usage.

    UserError where it is not alone: the other words would do nothing.
    """
    if not (flags := [word for word in words if word in ("-h", "--help")]):
        return False
    if len(words) > 1:
        refuse_path(" ".join(words), f"{flags[0]} prints the usage alone", f"Use {flags[0]} alone")
    sys.stdout.write(usage)
    return True


def _open_closed() -> None:
    """Discard what is printed where the process began without a place for it (`>&-`).

    A file that is opened later must not get the number of a closed stream: what libraries print
    would go there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, to the end


def read_options(words: Sequence[str], allowed: Sequence[str]) -> dict[str, str]:
    """The words `<option>=<value>` by option; UserError for an unknown, repeated or empty one."""
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in allowed or not equals:
            refuse_unknown(word, "option", name, allowed)
        if name in given:
            refuse_path(word, f"{name} is given twice", "Give each option once")
        if not value:
            refuse(name, "", "is empty", "Give it a value, or leave it out")
        given[name] = value
    return given


def log_plainly() -> None:
    """Let what the modules log be said in plain lines."""
    log = logging.getLogger("zoo")
    if not log.handlers:
        log.addHandler(_Lines())
        log.setLevel(logging.INFO)
