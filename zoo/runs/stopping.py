"""Ends a program by signal in order: SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal was closed).

The first signal is honoured within seconds, a second one at once. Outside the training steps the
first raises KeyboardInterrupt wherever the program is. While steps are `deferred` it is only noted,
and the loop stops after the current step. Python runs signal handlers between two of its own
instructions, so a long operation in C delays them: a thread, which the signal wakes in any case,
ends the process after `GRACE` seconds. Functions given to `on_forced_end` complete the record
before that.

Only the main thread of a process can receive signals: elsewhere nothing is installed, and signals
remain with the owner of the process.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
if HANGUP is not None:
    NAMES[HANGUP] = "SIGHUP"
# What a job of a cluster gets minutes before it has to end, where its launcher (submitit) waits for
# it: a stop as the others, without GRACE.
PREEMPTED = getattr(signal, "SIGUSR2", None)
GRACE = 8.0  # seconds from the first signal until a process that does not end is ended
REPEAT = 0.3  # seconds within which signals count as one, as `timeout` sends two
STOPPED = 130  # exit code

Record = Callable[[str], object]


class Stop:
    """The state of a requested stop since `handled` began."""

    def __init__(self) -> None:
        self.requested: str | None = None  # the first signal's name
        self.deferring = False
        self.untimed = False  # the stop may take as long as it needs
        self.on_untimed: Callable[[], object] | None = None
        self.records: list[Record] = []
        self._first = 0.0
        self._ending = threading.Lock()

    def handle(self, number: int, _frame: object = None) -> None:
        """Handle a signal; runs in the main thread."""
        if self.requested is not None:
            if time.monotonic() - self._first > REPEAT:
                self.end("at once")
            return
        name = NAMES.get(signal.Signals(number), signal.Signals(number).name)
        self._first, self.requested = time.monotonic(), name
        if number == HANGUP:
            _leave_terminal()
        if not self.deferring:
            self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt if a stop was requested.

        Python drops an exception that a signal raises in a finaliser or in a callback of C code:
        who begins something long checks again here.
        """
        if self.requested is not None:
            raise KeyboardInterrupt(f"stopped by {self.requested}")

    def end(self, how: str) -> NoReturn:
        """End the process immediately, after completing the record."""
        self._ending.acquire()  # the first of two threads ends the process
        reason = f"stopped by {self.requested} {how}"
        for record in reversed(self.records):
            with suppress(Exception):
                record(reason)
        with suppress(OSError):
            os.write(2, f"{reason}\n".encode())
        os._exit(STOPPED)

    def allow_time(self) -> None:
        """Lift the time limit, because the stop is under way: a checkpoint is being written."""
        self.untimed = True
        if self.on_untimed:
            self.on_untimed()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note signals in `requested` without raising; the caller stops at a good moment.

        Raises KeyboardInterrupt where a stop was requested before.
        """
        if not self.deferring:
            self.check()
        before, self.deferring = self.deferring, True
        try:
            yield
        finally:
            self.deferring = before

    @contextmanager
    def as_interrupt(self) -> Iterator[None]:
        """Turn an error that a requested stop has caused into KeyboardInterrupt."""
        try:
            yield
        except Exception as error:
            if self.requested is None:
                raise
            raise KeyboardInterrupt(f"stopped by {self.requested}") from error

    @contextmanager
    def on_forced_end(self, record: Record) -> Iterator[None]:
        """Call `record(reason)` if the process has to be ended during this block."""
        self.records.append(record)
        try:
            yield
        finally:
            self.records.remove(record)

    def watch(self, wakeup: int) -> None:
        """Read the numbers of signals as they arrive, in a thread of its own; a 0 ends it."""
        first = None
        while number := os.read(wakeup, 1):
            if number == b"\0":
                return
            if number[0] not in NAMES:
                continue  # another handler's signal
            if first is not None:
                if time.monotonic() - first > REPEAT:
                    time.sleep(REPEAT)  # the main thread's handler is better, where it runs
                    self.end("at once")
                continue
            first = time.monotonic()
            name = NAMES[signal.Signals(number[0])]
            threading.Thread(target=self._end_after_grace, args=[name], daemon=True).start()

    def _end_after_grace(self, name: str) -> None:
        time.sleep(GRACE)
        if self is current() and not self.untimed:
            self.requested = self.requested or name
            self.end("in the midst of what did not end by itself")


def _leave_terminal(*_: object) -> None:
    """Discard what is printed from now on: writing to a closed terminal fails."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in _terminals:
        os.dup2(null, stream)
    os.close(null)


_terminals = [stream for stream in (0, 1, 2) if os.isatty(stream)]  # False once it is closed
_current: list[Stop] = []


def current() -> Stop:
    """The Stop of this process; outside `handled` one that is never requested."""
    return _current[-1] if _current else Stop()


@contextmanager
def handled() -> Iterator[Stop]:
    """Handle signals during this block; within another `handled` the outer one goes on.

    A SIGHUP that the process ignores, as under nohup, stays ignored.
    """
    if _current or threading.current_thread() is not threading.main_thread():
        yield current()
        return
    stop = Stop()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=stop.watch, args=[reader], daemon=True)
    under_nohup = HANGUP is not None and signal.getsignal(HANGUP) is signal.SIG_IGN
    numbers = [number for number in NAMES if not (number == HANGUP and under_nohup)]
    if PREEMPTED is not None and is_job():
        numbers.append(PREEMPTED)
    before = {number: signal.signal(number, stop.handle) for number in numbers}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    _current.append(stop)
    try:
        with stop.as_interrupt():
            yield stop
    finally:
        _current.remove(stop)
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


def is_job() -> bool:
    """Whether this process is a job of a cluster, whose launcher waits for SIGUSR2."""
    return PREEMPTED is not None and callable(signal.getsignal(PREEMPTED))


def requeue() -> None:
    """End this job by its launcher's own handler of SIGUSR2, which returns it to the queue."""
    handler = PREEMPTED is not None and signal.getsignal(PREEMPTED)
    if PREEMPTED is not None and callable(handler):
        handler(PREEMPTED, None)


def leave_to_parent() -> None:
    """Ignore, in a child process, the signals of a terminal: its parent gets them and acts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if PREEMPTED is not None and is_job():
        signal.signal(PREEMPTED, signal.SIG_IGN)
    if HANGUP is not None:
        signal.signal(HANGUP, _leave_terminal)


def _in_child() -> None:
    """Leave signals to the parent, in whatever is forked from here: a loader's worker, a rank."""
    if _current:
        _current.clear()
        signal.set_wakeup_fd(-1)
        leave_to_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
