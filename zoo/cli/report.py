"""Draw a published table again from its rows: `zoo report state_tracking`. Nothing is trained."""

import sys
from collections.abc import Sequence
from pathlib import Path

from zoo.cli.guard import guarded
from zoo.errors import refuse_path
from zoo.report import published

USAGE = """zoo report [table] [report=report.html]    draw a published table again from its rows

  zoo report                      the tables there are, and the commands they came from
  zoo report state_tracking       the page and its pictures; a table is a name or a .json file
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & {*words}:
        sys.stdout.write(USAGE)
        return 0
    return guarded("zoo report", lambda: draw(words))


def draw(words: Sequence[str]) -> int:
    """Carry the command out; see the module."""
    names = [word for word in words if not word.startswith("report=")]
    pages = [word.removeprefix("report=") for word in words if word.startswith("report=")]
    if len(names) > 1 or len(pages) > 1:
        refuse_path(" ".join(words), "must be one table and at most one page")
    if not names:
        for path in sorted(published.FOLDER.glob("*.json")):
            machine = published.read(path.stem)["machine"]
            sys.stdout.write(f"{path.stem:<20} zoo tune experiment={path.stem} ({machine})\n")
        return 0
    table = published.read(names[0])
    from zoo.report import write_report  # heavy: seconds

    rows, runs = published.unpack(table)
    sys.stdout.write(f"{write_report(rows, runs, Path((pages or ['report.html'])[0]))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
