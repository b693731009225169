"""`zoo train ..`, `zoo eval ..`, `zoo doctor`: the programs, from wherever the package lies."""

import runpy
import sys

from zoo.errors import UserError, refuse_unknown
from zoo.paths import ROOT, shipped

PROGRAMS = ("train", "eval", "doctor")
USAGE = """zoo <program> [option=value ...]

  zoo train     train a model
  zoo eval      measure trained runs, write a report
  zoo doctor    say which form every operation takes on this machine

zoo train --help and zoo eval --help explain the options.
"""


def main() -> int:
    given = sys.argv[1] if len(sys.argv) > 1 else ""
    if given in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    try:
        program = given
        if program not in PROGRAMS:
            refuse_unknown(f"zoo {given}".rstrip(), "program", given, PROGRAMS)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if program == "doctor":
        from zoo.cli import doctor

        return doctor.main()
    folder = shipped("programs")
    file = (folder if folder.is_dir() else ROOT) / f"{program}.py"
    sys.argv[:2] = [str(file)]
    runpy.run_path(str(file), run_name="__main__")  # which exits
    return 0


if __name__ == "__main__":
    sys.exit(main())
