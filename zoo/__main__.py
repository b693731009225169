"""`zoo train ..`, `zoo eval ..` and the like: every program begins here, train.py and eval.py too.

What is slow to import comes after Ctrl-C is taken care of.
"""

import importlib
import sys
from collections.abc import Sequence

from zoo.cli.guard import explains, guarded
from zoo.errors import refuse_unknown

PROGRAMS = {  # the module and what it does
    "train": ("zoo.cli.train", "train a model"),
    "tune": ("zoo.cli.tune", "find the best learning rate of each arm, train it with every seed"),
    "study": ("zoo.cli.study", "carry out the experiments of the results page"),
    "recipe": ("zoo.cli.recipe", "carry out a published recipe of several stages"),
    "eval": ("zoo.cli.eval", "measure trained runs, write a report"),
    "compress": ("zoo.cli.compress", "shorten a text for another model, show what was dropped"),
    "shrink": ("zoo.cli.shrink", "make a smaller run of a trained one: low rank or zeros"),
    "chat": ("zoo.cli.chat", "write on with a trained model or a checkpoint, line by line"),
    "export": ("zoo.cli.export", "write a run's model as transformers or the zoo opens it"),
    "paper": ("zoo.cli.paper", "measure a table of a paper, ours beside theirs"),
    "list": ("zoo.cli.listing", "list models, extensions, tasks, corpora and experiments"),
    "training-free": ("zoo.cli.training_free", "list the extensions that need no training"),
    "patterns": ("zoo.cli.patterns", "draw which tokens each query attends to"),
    "report": ("zoo.cli.report", "draw a report again from rows that are there"),
    "rankings": ("zoo.cli.rankings", "say whether other held-out questions rank the arms alike"),
    "doctor": ("zoo.cli.doctor", "show which kernels and libraries this machine uses"),
}
LINES = {  # the usage of those that print lines
    "list": "zoo list [models | extensions | corpora | tasks | experiments | sizes ...]",
    "training-free": "zoo training-free FACTOR",
}
USAGE = "\n".join(
    [
        *("zoo <program> [option=value ...]", ""),
        *(f"  zoo {name:<14}{does}" for name, (_, does) in PROGRAMS.items()),
        *("", "zoo train --help and zoo eval --help explain the options.", ""),
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that `argv` names; returns its exit code.

    Args:
        argv: the program and its words; None for those of the process.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return guarded("", lambda: _run(*(words or [""])))


def _run(program: str, *rest: str) -> int:
    words = [*rest]
    if program in ("-h", "--help") and explains([program, *words], USAGE):
        return 0
    if program not in PROGRAMS:
        refuse_unknown(f"zoo {program}".rstrip(), "program", program, PROGRAMS)
    if program in LINES:
        usage = f"zoo {program}: {PROGRAMS[program][1]}\n{LINES[program]}\n"
        if explains(words, usage):
            return 0
    if "--list" in words and not {"-h", "--help"} & {*words}:  # which goes alone
        program, words = "list", [word for word in words if word != "--list"]
    return importlib.import_module(PROGRAMS[program][0]).main(words)


if __name__ == "__main__":
    sys.exit(main())
