"""A table of a paper measured here, ours beside theirs: `zoo paper <table> checkpoint=<model>`.

A table is a file of configs/papers: what is measured, of which model under which extension, and the
numbers that were published. A row may need a run of its own, such as one that was fine-tuned.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from zoo.cli.guard import run_program
from zoo.config.compose import compose
from zoo.config.groups import CONFIGS
from zoo.console import say
from zoo.errors import choose, refuse, refuse_path, short_names

TABLES = sorted(path.stem for path in (CONFIGS / "papers").glob("*.yaml"))
USAGE = f"""zoo paper <table> checkpoint=<model> data.path=<text> [option=value ...]
measure a table of a paper, and print our numbers beside the published ones

  zoo paper dca_pg19 checkpoint=models/Llama-2-7b data.path=pg19/validation
  zoo paper pi_pg19 checkpoint=models/llama-7b data.path=pg19/test pi_8k=runs/tuned

tables    {", ".join(TABLES)} (configs/papers, whose headers say what each needs)
lengths=  [512,1k] instead of the paper's; further options are those of eval.py
          and replace the table's
"""
NO = "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a measurement failed."""
    return run_program("zoo paper", USAGE, argv, _paper)


def _paper(words: Sequence[str]) -> int:
    names = [word for word in words if "=" not in word]
    if len(names) != 1:
        refuse_path(" ".join(names) or "no table", "must be one table of zoo paper --help")
    name = choose("table", names[0], TABLES)
    table = yaml.safe_load((CONFIGS / "papers" / f"{name}.yaml").read_text(encoding="utf-8"))
    given = [word for word in words if "=" in word]
    slots = {row["run"] for row in table["rows"] if "run" in row}
    runs = dict(word.split("=", 1) for word in given if word.split("=", 1)[0] in slots)
    others = [word for word in given if word.split("=", 1)[0] not in slots]
    lengths = [word for word in others if word.startswith("lengths=")]
    others = [word for word in others if word not in lengths]
    if not any(word.startswith("checkpoint=") for word in others):
        refuse("checkpoint", "", "must be given (a folder of transformers, or a .gguf file)")
    which = lengths[-1].partition("=")[2] if lengths else str(table["lengths"]).replace(" ", "")
    named = {word.split("=", 1)[0] for word in others}  # replaces the table's own value
    settings = [word for word in table["words"] if word.split("=", 1)[0] not in named]
    common = [*settings, f"{table['option']}={which}", "report=null", "logger=none"]
    lines, failed = [], False
    for row in table["rows"]:
        slot = row.get("run")
        if slot and slot not in runs:
            lines.append((row, None))
            continue
        with short_names(*[table["option"].removesuffix("lengths")] * bool(lengths)):
            code, found = _measured(row, table, [*common, *others], runs.get(slot))
        failed |= code != 0
        lines.append((row, found))
    say("\n".join(_table(table, lines)))
    return int(failed)


def _measured(
    row: Mapping[str, Any], table: Mapping[str, Any], words: Sequence[str], run: str | None
) -> tuple[int, dict[int, float | None]]:
    """The exit code of a row's measurement, and its value at each length."""
    from zoo.cli.eval import _text
    from zoo.cli.eval import main as measure
    from zoo.runs.folder import RunFolder
    from zoo.training.pretrained import pretrained_run

    config = compose("eval", [*words, *row["words"]])
    if run is None:
        assert config.checkpoint is not None
        folder = pretrained_run(Path(config.checkpoint), _text(config), Path(config.runs))
    else:
        folder = RunFolder.open(run)
    mine = [word for word in words if not word.startswith(("checkpoint=", "data."))]
    answers: list[dict[str, Any]] = []
    code = measure([f"run={folder.path}", *mine, *row["words"]], answers=answers)
    rows = [one for one in answers if all(one.get(k) == v for k, v in table["where"].items())]
    return code, {one["length"]: one.get(table["field"]) for one in rows if "length" in one}


def _table(
    table: Mapping[str, Any],
    lines: Sequence[tuple[Mapping[str, Any], dict[int, float | None] | None]],
) -> list[str]:
    """The table's lines: ours at each length, the published number in brackets."""
    known = dict.fromkeys(table["lengths"])
    every = sorted({*known} | {length for _, found in lines for length in found or ()})
    head = ["", *[f"{length:,}" for length in every]]
    printed = [head]
    for row, found in lines:
        theirs = dict(zip(table["lengths"], row["published"], strict=True))
        cells = [_cell((found or {}).get(length), theirs.get(length)) for length in every]
        note = "" if found is not None else f"  (needs {row['run']}=<run>)"
        printed.append([f"{row['name']}{note}", *cells])
    widths = [max(map(len, column)) for column in zip(*printed, strict=True)]
    lines_ = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in printed
    ]
    return [f"{table['field']}: ours (published)", *lines_]


def _cell(ours: float | None, theirs: float | None) -> str:
    mine = NO if ours is None else f"{ours:.2f}"
    return mine if theirs is None else f"{mine} ({theirs:.2f})"
