"""Make a smaller run of a trained one: `zoo shrink run=<run folder> rank=16`, or sparsity=0.5.

The new run is measured like any other, and tuned by `zoo train finetune=<new folder>`, which keeps
its ranks and its zeros. Where a run has been made already the same command says so.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from zoo.cli.guard import read_options, run_program
from zoo.config.schema.model import PAIRS, Shrunk
from zoo.config.sizes import read_count
from zoo.console import say
from zoo.errors import UserError, refuse, refuse_path
from zoo.runs.files import check_place

USAGE = """zoo shrink run=<run folder> rank=<n> | sparsity=<share> | sparsity=2:4 [to=<new folder>]
make a run with a smaller model of a trained one

  rank=16        the nearest product of that rank in place of each matrix that has more numbers
  sparsity=0.5   zeros in place of that share of each matrix, its smallest numbers
  sparsity=2:4   zeros in place of the two smallest of every four inputs
  to=            the new run's folder, made with those above it; without it, beside the run
"""
OPTIONS = ("run", "rank", "sparsity", "to")
MAX_RANK = 2**17


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run_program("zoo shrink", USAGE, argv, _shrink)


def _shrink(words: Sequence[str]) -> int:
    given = read_options(words, OPTIONS)
    if "run" not in given:
        refuse("run", "", "must be given", "See zoo shrink --help")
    settings = {name: given[name] for name in ("rank", "sparsity") if name in given}
    if len(settings) != 1:
        refuse_path(" ".join(words), "needs one of rank= and sparsity=", "See zoo shrink --help")
    how = Shrunk(run=given["run"], rank=_rank(given), sparsity=_sparsity(given))
    if "to" in given:
        check_place("to", given["to"])
    from zoo.training.shrunk import shrunk_run  # heavy: seconds

    try:
        say(shrunk_run(how, Path(given["to"]) if "to" in given else None))
    except UserError as error:  # as it was written: 1k, where a number would be shown as 1024
        ((name, typed),) = settings.items()
        raise UserError(re.sub(rf"^{name}=\S+: ", f"{name}={typed}: ", str(error))) from None
    return 0


def _rank(given: Mapping[str, str]) -> int | None:
    if "rank" not in given:
        return None
    try:
        rank = read_count(given["rank"])
    except ValueError:
        rank = 0
    if not 1 <= rank <= MAX_RANK:
        refuse("rank", given["rank"], f"must be a whole number from 1 to {MAX_RANK}")
    return rank


def _sparsity(given: Mapping[str, str]) -> float | Literal["2:4"] | None:
    if "sparsity" not in given:
        return None
    if given["sparsity"] == PAIRS:
        return PAIRS
    try:
        share = float(given["sparsity"])
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        refuse("sparsity", given["sparsity"], f"must be above 0 and below 1, or {PAIRS}")
    return share
