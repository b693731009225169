"""The program `eval.py`: find trained runs, measure them, write the report."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from zoo.cli import processes
from zoo.cli.arms import Arm
from zoo.cli.launch import launch
from zoo.config.applicability import check_applies, position_schemes
from zoo.config.effects import check_compression, check_extension, check_names, check_reads
from zoo.config.groups import corpora
from zoo.config.measurable import check_measurable
from zoo.config.resolve import resolve
from zoo.config.schema.eval import EvalConfig
from zoo.config.schema.train import TrainConfig
from zoo.config.stages import check_composition, stages_of
from zoo.config.validate import plain, refuse_missing, validate
from zoo.console import say
from zoo.data.sources import check_source
from zoo.devices import check_device, cuda_devices
from zoo.errors import UserError, refuse
from zoo.pretrained.options import described_config
from zoo.runs.files import ROWS, check_file, check_report
from zoo.runs.find import find_distinct_runs
from zoo.runs.folder import RunFolder
from zoo.runs.resume import with_place
from zoo.training.partition import crowded

USAGE = """
Measure trained runs and write a report.

  python eval.py run=<folder or pattern> [option=value ...]

Examples
  python eval.py run='runs/compare/*'
  python eval.py run=runs/my-run task=perplexity task.perplexity.lengths=[512,4k,16k]
  python eval.py run='runs/*mamba*' task=stream task.stream.tokens=1M
  python eval.py checkpoint=<folder of a pretrained model> data.path=<folder of .txt files>

Exit code: 0 when every measurement succeeded; 1 when one failed, or a model leaks; 2 when an option
is wrong or no run can be measured. Damaged runs of a pattern keep their place in the table.
"""


def check(tree: dict[str, Any], given: list[str]) -> EvalConfig:
    """The configuration of a composed tree, its runs found. Imports nothing heavy."""
    check_names("eval", tree, given)
    tree = resolve(tree)
    config = validate(EvalConfig, tree, partly=True)
    if config.report is not None:
        check_report("report", config.report)
    if config.publish is not None:
        check_file("publish", str(config.publish), ROWS, "file of published rows", "rows.json")
        if config.report and Path(config.report).resolve() == Path(config.publish).resolve():
            refuse("publish", config.publish, "is the file of report= as well", "Name another")
    _check_ranks(config)
    check_device(config.device)
    folders = find_distinct_runs(config.run, config.runs) if config.run else []
    if config.checkpoint:
        _check_checkpoint(config.checkpoint, config)
    trained = [*_trained(config, folders)]
    check_measurable(config, trained)
    if folders and not config.checkpoint and all(map(_without_weights, folders)):
        names = ", ".join(map(str, folders[:3])) + ", ..." * (len(folders) > 3)
        raise UserError(f"run={names}: has no checkpoint. Train it again with train.py fresh=true.")
    # Of several, one without weights keeps its row and says why.
    if len(folders) == 1 and not config.checkpoint:
        RunFolder.open(folders[0].path).checkpoint()
    _check_extension(config, trained, given)
    refuse_missing(EvalConfig, tree)
    check_extension(config.extension, given)
    check_compression(config.compress, given)
    moved = any(value is not None for value in plain(config.data).values())
    if len(folders) == 1 and not config.checkpoint and moved:
        check_source(with_place(plain(trained[0])["data"], plain(config.data)))
    return config


def _check_extension(
    config: EvalConfig, trained: Sequence[TrainConfig], given: Sequence[str]
) -> None:
    """Refuse an extension that acts on none of the models, of several of which one has its row, and
    one that trains."""
    refused: list[UserError] = []
    for one in trained:
        try:
            check_applies(config.extension, position_schemes(one.model))
            check_composition(config.extension, stages_of(one), given)
            break
        except UserError as error:
            refused.append(error)
    if refused and len(refused) == len(trained):
        raise refused[0]
    check_reads(config.extension)


def job(config: EvalConfig, arm: Arm | None, answers: list[dict[str, Any]] | None = None) -> int:
    """Measure the runs one after another; the exit code says whether every one could be.

    `answers` gets the rows of what is requested.

    One that crashes the process it is measured in does not stop the others, where one can be forked
    from this.
    """
    del arm
    folders = find_distinct_runs(config.run, config.runs) if config.run else []
    processes.load("zoo.tasks.evaluate")
    if config.checkpoint:
        from zoo.training.pretrained import pretrained_run  # heavy: seconds

        text = _text(config)
        folders.append(pretrained_run(Path(config.checkpoint), text, Path(config.runs)))
    from zoo.tasks.evaluate import evaluate
    from zoo.tasks.isolation import here

    apart = processes.run if processes.can_fork() else here
    return evaluate(config, folders, say=_print, fresh=config.fresh, apart=apart, answers=answers)


def _check_ranks(config: EvalConfig) -> None:
    """Refuse several processes on an accelerator; say where they share a processor."""
    count = config.sequence_parallel or 1
    if count > 1 and (
        config.device not in ("auto", "cpu") or (config.device == "auto" and cuda_devices())
    ):
        rule = "sequence_parallel splits texts over processes on the CPU alone"
        refuse("device", config.device, rule, "Use device=cpu, or leave sequence_parallel out")
    if line := crowded(f"sequence_parallel={count}", count):
        say(line)


def _trained(config: EvalConfig, folders: Sequence[RunFolder]) -> Iterator[TrainConfig]:
    """How the runs and the checkpoint were trained; damaged ones have their rows."""
    for folder in folders:
        with suppress(UserError):
            yield RunFolder.open(folder.path).config
    if config.checkpoint:
        yield described_config(Path(config.checkpoint), _text(config), Path(config.runs))


def _without_weights(folder: RunFolder) -> bool:
    """Whether a finished run's checkpoints are gone."""
    try:
        opened = RunFolder.open(folder.path)
        done = opened.info["status"] == "done"
    except UserError:  # damaged otherwise
        return False
    own = opened.config.checkpoint is None  # not those of a pretrained checkpoint
    return done and own and not any((folder.path / "checkpoints").glob("*.ckpt"))


def _check_checkpoint(checkpoint: str, config: EvalConfig) -> None:
    """Refuse a checkpoint or a text that could not be read, before anything heavy is imported."""
    from zoo.pretrained.checkpoint import check_checkpoint

    check_checkpoint(Path(checkpoint), config.data.tokenizer)
    check_source({**_text(config), "tokenizer": config.data.tokenizer or "bytes"})


def _text(config: EvalConfig) -> dict[str, Any]:
    """The data section of the text that a checkpoint is measured on."""
    text = corpora()[config.data.name or "text"]
    return with_place({**text, "tokenizer": None}, plain(config.data))


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def main(
    argv: Sequence[str] | None = None,
    name: str | None = None,
    answers: list[dict[str, Any]] | None = None,
) -> int:
    """`name` begins the line of a refusal, where another program calls this one, and `answers` gets
    the rows of what it requests."""
    work = partial(job, answers=answers)
    return launch("eval", argv, usage=USAGE, check=check, job=work, name=name)
