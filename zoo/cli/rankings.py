"""Compare how other held-out questions rank the arms: `zoo rankings run='runs/mqar/*'`.

Nothing is measured: the rows of both are there after two calls of zoo eval.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from zoo.cli.guard import read_options, run_program
from zoo.config.groups import choices
from zoo.console import say
from zoo.errors import choose, refuse
from zoo.runs.find import find_distinct_runs

USAGE = """zoo rankings run=<pattern> [task=accuracy] [by=task.accuracy.seed] [runs=runs]
say whether two measurements of the same runs, on other held-out questions, rank the arms alike

  zoo eval run='runs/mqar/*' task=accuracy                        the measurement,
  zoo eval run='runs/mqar/*' task=accuracy task.accuracy.seed=1   and that of other examples
  zoo rankings run='runs/mqar/*'
  zoo rankings run='runs/text/*' task=perplexity by=split    of other books, after split=valid and
                                                            split=test
"""
OPTIONS = {"run": "", "task": "accuracy", "by": "", "runs": "runs"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run_program("zoo rankings", USAGE, argv, _rankings)


def _rankings(words: Sequence[str]) -> int:
    given = OPTIONS | read_options(words, [*OPTIONS])
    if not given["run"]:
        refuse("run", "", "must be given", "See zoo rankings --help")
    if "runs" in dict(word.split("=", 1) for word in words) and not Path(given["runs"]).is_dir():
        refuse("runs", given["runs"], "must be a folder that is there")
    task = choose("task", given["task"], choices("task"))
    by = given["by"] or f"task.{task}.seed"
    from zoo.report.rank_agreement import compare  # heavy: seconds
    from zoo.tasks.known import every_current

    rows, runs = every_current(find_distinct_runs(given["run"], given["runs"]))
    try:
        say(compare(rows, runs, task, by))
    except ValueError as error:
        refuse("by", by, str(error), "Measure the runs with another value of it: zoo eval")
    return 0


if __name__ == "__main__":
    sys.exit(main())
