"""Write a run's model for use elsewhere: `zoo export run=<run folder> to=<new folder>`."""

from collections.abc import Sequence
from pathlib import Path

from zoo.cli.guard import read_options, run_program
from zoo.console import say
from zoo.errors import refuse
from zoo.runs.files import check_place

USAGE = """zoo export run=<run folder> to=<new folder> [format=auto|transformers|zoo|adapter]
write a model as safetensors with its config.json and tokenizer

  format=auto          as transformers reads it where it has the architecture, else as the zoo does
  format=transformers  refuse a model that transformers does not have
  format=zoo           the zoo's own: checkpoint=<folder> and zoo.load open it
  format=adapter       the adapters of a run with lora.rank alone, as peft reads them
"""
OPTIONS = ("run", "to", "format")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run_program("zoo export", USAGE, argv, _export)


def _export(words: Sequence[str]) -> int:
    given = read_options(words, OPTIONS)
    for name in ("run", "to"):
        if name not in given:
            refuse(name, "", "must be given", "See zoo export --help")
    check_place("to", given["to"])
    from zoo.model.export import export  # heavy: seconds
    from zoo.runs.folder import RunFolder

    folder = RunFolder.open(given["run"])
    found = export(folder, Path(given["to"]), given.get("format", "auto"))
    if (info := folder.info)["status"] != "done":
        say(
            f"{folder}: is {info['status']}, its last checkpoint was exported (step {info['step']})"
        )
    form = found.architecture
    if found.difference:
        form += f" (transformers has no architecture for this model: {found.difference})"
    say(f"{given['to']}: {form}, {found.weights}, {found.tokenizer}")
    if found.base:
        say(f"{given['to']}: {found.base}")
    return 0
