"""Train a model: `python train.py model=mamba seq_len=64k`. `--help` lists what can be chosen."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from zoo.applies import check_applies, positions_of
from zoo.command_line import launch, say
from zoo.config import resolve
from zoo.data.sources import check_source
from zoo.errors import UserError
from zoo.inert import check_effects, check_names, notes
from zoo.resume import finetuned, resumed
from zoo.run import RunFolder
from zoo.schema import TrainConfig, validate

USAGE = """
python train.py [option=value ...]    train a model; the same line again continues a stopped run

  python train.py model=mamba seq_len=65536
  python train.py -m model=transformer,mamba seed=0,1     each combination, one after another
  python train.py resume=<run folder>                     go on where it stopped

flags: -m sweep over values separated by commas; --cfg job show the configuration;
  -sc install=bash TAB completion (also zsh, fish)
"""


def check(tree: dict[str, Any], given: list[str]) -> TrainConfig:
    """The configuration of a composed tree, or of the run to resume. Imports nothing heavy."""
    check_names("train", tree, given)
    if tree["resume"]:
        config = resumed(tree, given)
    elif tree["finetune"]:
        config = finetuned(resolve(tree), given)
        check_applies(config.extension, positions_of(config.model), None)
    else:
        config = validate(TrainConfig, resolve(tree))
    if not tree["resume"]:
        check_effects(config, tree, given)
    check_source(config.data.model_dump())
    return config


def job(config: TrainConfig, sweep: bool) -> int:
    """Train one configuration in its run folder, from the last checkpoint where there is one."""
    folder = RunFolder.claim(config)
    info, last = folder.info, folder.checkpoint()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        fit(config, folder)  # a further rank of a run that rank 0 locks and records
        return 0
    if info["step"] and not last:
        told = f"{folder} has lost the checkpoints of its {info['step']:,} steps"
        raise UserError(f"{told}: put them back, or fresh=true trains a new run")
    check_code(config, folder)
    if info["status"] == "done" and info["step"] >= config.trainer.max_steps:
        say(f"already trained: {folder} (fresh=true trains again)")
    else:
        sys.argv[1:] = [f"resume={folder}"]  # what Lightning starts further ranks with
        with folder.training(keep=sweep), folder.going_on(config):
            start = f"from {last.name}" if last else f"for {config.trainer.max_steps} steps"
            for note in () if last else notes(config):
                say(note)
            say(f"{folder}: training {config.model.name} {start}")
            fit(config, folder)
    return 0


def check_code(config: TrainConfig, folder: RunFolder) -> None:
    """Refuse a run whose code changed since it was trained, unless told to accept that."""
    files = folder.changed_code(config)
    if files is None and folder.info["step"]:
        say(f"{folder}: what code trained it is not known (it is older than that record)")
    if not files:
        return
    told = f"{folder} was trained by other code: {', '.join(files[:3])}"
    told += f" and {len(files) - 3} more" * (len(files) > 3) + " changed since"
    if config.changed_code == "refuse":
        told += ". fresh=true trains a new run beside it"
        raise UserError(f"{told}, changed_code=accept goes on with this one and records it")
    say(f"{told} (accepted)")


def fit(config: TrainConfig, folder: RunFolder) -> None:
    """Hand over to what is slow to import."""
    from zoo.learner import train

    train(config, folder)


def main(argv: Sequence[str] | None = None) -> int:
    return launch("train", argv, usage=USAGE, check=check, job=job)


if __name__ == "__main__":
    sys.exit(main())
