"""The program `train.py`: check a configuration, train it in its run folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.cli import processes
from zoo.cli.arms import Arm
from zoo.cli.launch import launch
from zoo.config.effects import check_adapters, check_effects, check_names, notes
from zoo.config.groups import corpora
from zoo.config.resolve import resolve
from zoo.config.schedule import describe_continuation
from zoo.config.schema.train import TrainConfig
from zoo.config.tree import within
from zoo.config.validate import plain, validate
from zoo.console import say
from zoo.data.sources import check_source
from zoo.devices import check_accelerator, check_deterministic
from zoo.errors import RunError, refuse, refuse_path
from zoo.runs.checkpoints import step_of
from zoo.runs.claim import changed_code, check_data, claim, recording_changes
from zoo.runs.folder import RunFolder
from zoo.runs.identity import run_name
from zoo.runs.resume import finetuned, resumed
from zoo.runs.stopping import current
from zoo.training.partition import (
    check_machines,
    check_partition,
    is_first,
    process_count,
    sharing,
)

USAGE = """
Train a model. The same command again continues a stopped run.

  python train.py [option=value ...]

Examples
  python train.py model=mamba seq_len=65536
  python train.py -m model=transformer,mamba seed=0,1   every combination, one after another
  python train.py resume=<run folder>                   continue a run
  python train.py finetune=<run or pretrained checkpoint> extension=yarn extension.factor=4
  python train.py finetune=<the same> lora.rank=16 ...  low-rank adapters alone
"""


def check(tree: dict[str, Any], given: list[str]) -> TrainConfig:
    """The configuration of a composed tree, or of the run to resume. Imports nothing heavy."""
    check_names("train", tree, given)
    if tree["resume"]:
        config = resumed(tree, given)
    elif tree["finetune"]:
        config = finetuned(*_as_of_run(resolve(tree), given))
    else:
        config = validate(TrainConfig, resolve(tree))
    if config.optim.continuation != "cosine" and not tree["resume"]:
        refuse(
            "optim.continuation",
            config.optim.continuation,
            "says how the learning rate goes on in a run that is given more steps",
            "Use it with resume=<run> trainer.max_steps=<more>",
        )
    if not tree["resume"]:
        check_effects(config, tree, given)
    check_adapters(config.lora)
    check_partition(config)
    check_accelerator(config.trainer.accelerator)
    check_deterministic(config.trainer.accelerator, config.trainer.deterministic)
    if config.data.task is None:
        check_source(config.data.model_dump())
    else:
        from zoo.data.synthetic import check_task  # numpy

        check_task(config.data.name, config.data.task.load(), config.seq_len)
    return config


def _as_of_run(tree: dict[str, Any], given: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The tree, where it fine-tunes a pretrained checkpoint, as one that fine-tunes its run.

    The run is made here, on the text of data.*, unless it was before.
    """
    place = Path(str(tree["finetune"]))
    if not os.path.isfile(place) and not os.path.isfile(place / "config.json"):
        return tree, given
    from zoo.pretrained.checkpoint import check_checkpoint
    from zoo.pretrained.options import described_config

    data = dict(tree["data"])
    if "data" not in given and "data.path" in given:  # not of the default corpus, which has none
        own = {key: value for key, value in data.items() if f"data.{key}" in given}
        data = corpora()["text"] | own
    if "data.tokenizer" not in given:
        data["tokenizer"] = None  # the checkpoint's own
    check_checkpoint(place, data["tokenizer"])
    check_source({**data, "tokenizer": data["tokenizer"] or "bytes"})
    own = plain(described_config(place, data, Path(tree["runs"])))
    validate(TrainConfig, {**tree, **{key: own[key] for key in ("model", "size", "objective")}})
    from zoo.training.pretrained import pretrained_run  # heavy: seconds

    folder = pretrained_run(place, data, Path(tree["runs"]))
    others = [key for key in given if not within(key, ("data",))]
    return {**tree, "finetune": str(folder.path)}, others


def job(config: TrainConfig, arm: Arm | None) -> int:
    """Train one configuration in its run folder, from the last checkpoint where there is one.

    A run that cannot be leaves no folder; an arm of a sweep does, with the reason.
    """
    check_machines(config)
    if not arm and is_first() and not _is_trained(config):
        rehearse(config, apart=process_count(config) > 1)
    try:
        return _train(config, arm)
    finally:
        if arm and arm.folder:
            arm.loss = RunFolder(Path(arm.folder)).last_metric("valid_loss")


def _train(config: TrainConfig, arm: Arm | None) -> int:
    folder = claim(config)
    info, last = folder.info, folder.checkpoint()
    if arm:
        arm.folder = str(folder)
    if not is_first():
        fit(config, folder)  # a further rank of a run that rank 0 locks and records
        return 0
    if info["step"] and not last:
        rule = f"has lost the checkpoints of its {info['step']:,} steps"
        refuse_path(str(folder), rule, "Put them back, or train a new run with fresh=true")
    check_code(config, folder)
    if folder.is_trained(config):
        check_text(config, folder)
        say(f"already trained: {folder} (fresh=true trains again)")
    else:
        message = describe_continuation(folder.config, config, step_of(last))
        training, stop = folder.training(keep=arm is not None), current()
        ended, recorded = stop.on_forced_end(folder.record_stop), recording_changes(folder, config)
        with training, ended, recorded, stop.as_interrupt():
            if arm:
                folder.update(sweep=arm.sweep, arm=arm.options)
                rehearse(config, apart=True)
            start = f"from {last.name}" if last else f"for {config.trainer.max_steps} steps"
            for note in sharing(config) if last else [*notes(config), *sharing(config)]:
                say(note)
            if message:
                say(message)
            say(f"{folder}: training {config.model.name} {start}")
            if arm or process_count(config) > 1:
                fit_apart(config, folder, process_count(config), arm.until if arm else None)
            else:
                fit(config, folder)
    audit = folder.info.get("audit") or {}
    if audit.get("ok") is False:
        raise RunError(f"{folder}: the model leaks and will not be ranked: {audit['reason']}")
    return 0


def check_text(config: TrainConfig, folder: RunFolder) -> None:
    """Refuse a finished run's text that is another now: these options would train another run."""
    if config.data.task is None and folder.info.get("fingerprint"):
        from zoo.data.corpora import open_corpus  # numpy

        text = open_corpus(config.data.model_dump(), Path(config.data.options["cache"]))
        check_data(text.name, text.fingerprint, folder)


def check_code(config: TrainConfig, folder: RunFolder) -> None:
    """Refuse a run whose code changed since it was trained, unless that is accepted."""
    files = changed_code(folder, config)
    if files is None and folder.info["step"]:
        say(f"{folder}: what code trained it is not known (it is older than that record)")
    if not files:
        if config.changed_code == "accept" and files == []:
            say(f"changed_code=accept: {folder} was trained by this code, there is none to accept")
        elif config.changed_code == "accept" and not folder.info["step"]:
            say(f"changed_code=accept: {folder} is a new run, which no other code has trained")
        return
    message = f"was trained by other code ({', '.join(files[:3])}"
    message += f" and {len(files) - 3} more" * (len(files) > 3) + " changed since)"
    if config.changed_code == "refuse":
        advice = (
            "Use fresh=true to train a new run beside it, or changed_code=accept to go on with it"
        )
        refuse_path(str(folder), message, advice)
    say(f"{folder} {message}, which changed_code=accept allows")


def _is_trained(config: TrainConfig) -> bool:
    path = Path(config.resume or Path(config.runs) / run_name(config))
    if config.fresh or not path.is_dir():
        return False
    return RunFolder.open(path).is_trained(config)


def rehearse(config: TrainConfig, apart: bool) -> None:
    """Refuse what is slow to find out, before anything is written.

    `apart`: in a process beside this one, which is still to be forked from.
    """
    if apart:
        processes.load("zoo.training.fit")
    from zoo.training.rehearse import rehearse

    if apart and processes.can_fork():
        processes.run(rehearse, config)
    else:
        rehearse(config)


def fit(config: TrainConfig, folder: RunFolder) -> None:
    """Hand over to what is slow to import."""
    from zoo.training.fit import train

    train(config, folder)


def fit_apart(config: TrainConfig, folder: RunFolder, count: int, until: int | None = None) -> None:
    """Train in as many processes, beside this one: one that crashes is reported here.

    One alone trains in this process where it cannot be forked.
    """
    processes.load("zoo.training.fit")
    from zoo.training.fit import train

    if "LOCAL_RANK" in os.environ or (count == 1 and not processes.can_fork()):
        train(config, folder, until)  # further ranks were started by another program
    else:
        processes.run(train, config, folder, until, count=count)


def main(argv: Sequence[str] | None = None, name: str | None = None) -> int:
    """`name` begins the line of a refusal, where another program calls this one."""
    return launch("train", argv, usage=USAGE, check=check, job=job, name=name)
