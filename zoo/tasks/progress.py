"""One line on stderr that says what is being measured, how fast, and how long it will take."""

import sys
from time import monotonic
from typing import TextIO


class Progress:
    """Counts tokens or what else is named.

    On a terminal it rewrites one line, elsewhere it adds one every few seconds.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """Silent without a stream. `run` goes before what is measured."""
        self.stream, self.run = stream, ""
        self.every: float = 0.2 if stream and stream.isatty() else 5.0
        self.begin("", 0)

    @classmethod
    def on_stderr(cls) -> "Progress":
        return cls(sys.stderr)

    def begin(self, what: str, count: int, unit: str = "tokens") -> None:
        """Start on `what`, which will take `count` of a unit."""
        self.what, self.total, self.done, self.unit = what, count, 0, unit
        self.started = self.shown = monotonic()
        if self.stream and self.stream.isatty():
            self._write(f"{self.run} {what}")

    def advance(self, count: int) -> None:
        self.done += count
        now = monotonic()
        if self.stream is None or now - self.shown < self.every:
            return
        self.shown = now
        rate = self.done / (now - self.started)
        left = max(0, self.total - self.done) / rate
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        self._write(f"{self.run} {self.what}: {shown} {self.unit}/s, {left:.0f} s left")

    def clear(self) -> None:
        """Leave an empty line for what is printed next."""
        if self.stream and self.stream.isatty():
            self._write("", end="\r")

    def _write(self, line: str, end: str = "") -> None:
        assert self.stream is not None
        self.stream.write(f"\r\x1b[2K{line}{end}" if self.stream.isatty() else f"{line}\n")
        self.stream.flush()
