"""Stops by SIGINT (Ctrl-C) and SIGTERM: the first is honoured within seconds, a second at once.

Outside the training steps the first signal raises KeyboardInterrupt where the program is. While
steps are `deferred` it is only noted, for the loop to stop after the step at hand. Python runs its
handlers between two of its own instructions, so that a long operation in C would hold either up:
a thread, which the signal wakes whatever the main thread does, then ends the process after `GRACE`
seconds. Whatever must be on record before is written by the `last_words`.

Only the main thread of a process can take signals: elsewhere nothing is installed, and signals
stay with whoever owns the process.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
GRACE = 8.0  # seconds from the first signal to the end of what does not end by itself
SAME = 0.3  # seconds within which signals are one request, as `timeout` sends two
STOPPED = 130  # exit code

LastWords = Callable[[str], object]


class Stop:
    """What signals have asked for since `handled` began."""

    def __init__(self) -> None:
        self.asked: str | None = None  # the first signal's name
        self.deferring = False
        self.patient = False
        self.on_patience: Callable[[], object] | None = None
        self.last_words: list[LastWords] = []
        self._first = 0.0
        self._ending = threading.Lock()

    def handle(self, number: int, _frame: object = None) -> None:
        """The signal handler, in the main thread."""
        if self.asked is not None:
            if time.monotonic() - self._first > SAME:
                self.end("at once")
            return
        self._first, self.asked = time.monotonic(), NAMES[signal.Signals(number)]
        if not self.deferring:
            raise KeyboardInterrupt(f"stopped by {self.asked}")

    def end(self, how: str) -> NoReturn:
        """End the process here and now, whatever it is doing, once the record is true."""
        self._ending.acquire()  # the first of two threads ends the process
        reason = f"stopped by {self.asked} {how}"
        for words in reversed(self.last_words):
            with suppress(Exception):
                words(reason)
        with suppress(OSError):
            os.write(2, f"{reason}\n".encode())
        os._exit(STOPPED)

    def be_patient(self) -> None:
        """The stop is under way and may take its time, as a checkpoint is being written."""
        self.patient = True
        if self.on_patience:
            self.on_patience()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are noted in `asked` and raise nothing; the caller stops at a good moment."""
        before, self.deferring = self.deferring, True
        try:
            yield
        finally:
            self.deferring = before

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What breaks because a stop interrupted it is told as that stop."""
        try:
            yield
        except Exception as error:
            if self.asked is None:
                raise
            raise KeyboardInterrupt(f"stopped by {self.asked}") from error

    @contextmanager
    def recording(self, words: LastWords) -> Iterator[None]:
        """Let `words(reason)` be called should the process have to end in the midst of this."""
        self.last_words.append(words)
        try:
            yield
        finally:
            self.last_words.remove(words)

    def watch(self, wakeup: int) -> None:
        """The thread: read the numbers of signals as they arrive; a 0 ends it."""
        first = None
        while number := os.read(wakeup, 1):
            if number == b"\0":
                return
            if number[0] not in NAMES:
                continue  # another handler's signal
            if first is not None:
                if time.monotonic() - first > SAME:
                    time.sleep(SAME)  # the main thread's handler does this better, where it runs
                    self.end("at once")
                continue
            first = time.monotonic()
            name = NAMES[signal.Signals(number[0])]
            threading.Thread(target=self._wait, args=[name], daemon=True).start()

    def _wait(self, name: str) -> None:
        time.sleep(GRACE)
        if self is current() and not self.patient:
            self.asked = self.asked or name
            self.end("in the midst of what did not end by itself")


_current: list[Stop] = []


def current() -> Stop:
    """The Stop of this process; one that nothing ever asks anything of outside `handled`."""
    return _current[-1] if _current else Stop()


@contextmanager
def handled() -> Iterator[Stop]:
    """Take SIGINT and SIGTERM from here on; within another `handled` the outer one goes on."""
    if _current or threading.current_thread() is not threading.main_thread():
        yield current()
        return
    stop = Stop()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=stop.watch, args=[reader], daemon=True)
    before = {number: signal.signal(number, stop.handle) for number in NAMES}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    _current.append(stop)
    try:
        with stop.telling():
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


def _in_child() -> None:
    """What is forked from here (a loader's worker, a rank) leaves signals to its parent."""
    if _current:
        _current.clear()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
