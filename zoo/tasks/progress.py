"""One line on stderr that says what is being measured, how fast, and how long it will take."""

import sys
from time import monotonic
from typing import TextIO


class Progress:
    """Counts tokens; on a terminal rewrites one line, elsewhere adds one every few seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Silent without a stream. `run` goes before what is measured."""
        self.stream, self.run = stream, ""
        self.every: float = 0.2 if stream and stream.isatty() else 5.0
        self.begin("", 0)

    @classmethod
    def on_stderr(cls) -> "Progress":
        return cls(sys.stderr)

    def begin(self, what: str, tokens: int) -> None:
        """Start on `what`, which will read `tokens` tokens."""
        self.what, self.total, self.done = what, tokens, 0
        self.started = self.shown = monotonic()
        if self.stream and self.stream.isatty():
            self._write(f"{self.run} {what}")

    def advance(self, tokens: int) -> None:
        self.done += tokens
        now = monotonic()
        if self.stream is None or now - self.shown < self.every:
            return
        self.shown = now
        rate = self.done / (now - self.started)
        left = max(0, self.total - self.done) / rate
        self._write(f"{self.run} {self.what}: {rate:,.0f} tokens/s, {left:.0f} s left")

    def clear(self) -> None:
        """Leave an empty line for what is printed next."""
        if self.stream and self.stream.isatty():
            self._write("", end="\r")

    def _write(self, line: str, end: str = "") -> None:
        assert self.stream is not None
        self.stream.write(f"\r\x1b[2K{line}{end}" if self.stream.isatty() else f"{line}\n")
        self.stream.flush()
