"""What every program does around its work: say plain lines, take stops, turn errors into lines."""

import logging
from collections.abc import Callable

from zoo.console import say
from zoo.errors import RunError, UserError
from zoo.runs.files import one_line
from zoo.runs.stopping import STOPPED, handled


class _Lines(logging.Handler):
    """What the modules tell, in the program's own plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def guarded(program: str, work: Callable[[], int]) -> int:
    """The exit code of `work`; what the user can mend and a stop are told in one line."""
    log_plainly()
    try:
        with handled():
            return work()
    except (UserError, OSError) as error:
        say(f"{program}: {one_line(error)}")
        return 2
    except RunError as error:
        say(f"{program}: {one_line(error)}")
        return 1
    except KeyboardInterrupt as stop:
        say(f"{program}: {str(stop) or 'stopped'}")
        return STOPPED


def log_plainly() -> None:
    """Let what the modules log be said in plain lines."""
    log = logging.getLogger("zoo")
    if not log.handlers:
        log.addHandler(_Lines())
        log.setLevel(logging.INFO)
