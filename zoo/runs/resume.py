"""Runs that go on from others: the configuration of one to resume, and of one to fine-tune."""

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.config.schedule import continued
from zoo.config.schema import TrainConfig
from zoo.config.tree import within
from zoo.config.validate import plain, validate
from zoo.errors import UserError
from zoo.runs.checkpoints import step_of
from zoo.runs.folder import RunFolder
from zoo.runs.longrope import with_found

# What a run that goes on may change; all else makes it another run.
RESUMABLE = (
    *("trainer.max_steps", "trainer.max_time", "logger", "workers", "threads"),
    *("trainer.devices", "trainer.accelerator", "trainer.strategy"),
    *("trainer.accumulate_grad_batches", "optim.continuation"),
    *("data.path", "data.cache", "changed_code"),
)
MOVABLE = ("data.path", "data.cache")  # where a text is says nothing of what it is


def resumed(tree: Mapping[str, Any], given: Sequence[str]) -> TrainConfig:
    """The configuration of the run `tree["resume"]`, with those of the options `given` that may
    change. UserError for any other, and where there is no whole run to resume."""
    folder = RunFolder.open(str(tree["resume"]))
    changes = [key for key in given if key != "resume"]
    if fixed := [key for key in changes if not within(key, RESUMABLE)]:
        told = (
            f"resume={folder} goes on with the run's own options: {', '.join(fixed)} cannot change"
        )
        raise UserError(f"{told} ({', '.join(RESUMABLE)} can)")
    reached = step_of(folder.checkpoint())
    before, config = folder.config, plain(folder.config)
    for key in changes:
        section, _, last = ("", "", "logger") if key.startswith("logger") else key.rpartition(".")
        if section == "data":
            config["data"] = with_place(config["data"], {last: tree["data"][last]})
            continue
        (config[section] if section else config)[last] = (tree[section] if section else tree)[last]
    config = plain(validate(TrainConfig, config))
    continued(before, config, reached, given)
    return validate(TrainConfig, {**config, "resume": str(folder)})


def with_place(data: Mapping[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """A run's data section with the folder, and the cache, where its text is now.

    UserError where its text is not kept in a folder that could be named.
    """
    moved = {key: value for key, value in place.items() if value is not None}
    for key, value in moved.items():
        if key not in data:
            raise UserError(
                f"data.{key}={value}: data={data['name']}, which the run has, takes none"
            )
    return {**data, **moved}


def finetuned(tree: Mapping[str, Any], given: Sequence[str]) -> TrainConfig:
    """The configuration that trains the run `tree["finetune"]` further, under an extension.

    What was trained, on what and with which seed comes from that run, unless `given`. So does the
    window, times the extension's factor unless it places tokens. UserError where there is no whole
    run to start from.
    """
    folder = RunFolder.open(str(tree["finetune"]))
    folder.checkpoint()
    base = plain(folder.config)
    if fixed := [key for key in given if within(key, ("model", "size", "match", "objective"))]:
        raise UserError(f"finetune={folder} keeps its model: {', '.join(fixed)} cannot change")
    if base["extension"]["name"] != "none":
        raise UserError(f"finetune={folder} was fine-tuned itself: start from the run it came from")
    kept = {key: base[key] for key in ("model", "size", "match", "objective")}
    if "seed" not in given:
        kept["seed"] = base["seed"]
    data = [key for key in given if within(key, ("data",))]
    if not any(key not in MOVABLE for key in data):  # the base's text, wherever it is now
        moved = {key.removeprefix("data."): tree["data"][key.removeprefix("data.")] for key in data}
        kept["data"] = with_place(base["data"], moved)
    extension = with_found(tree["extension"], folder)
    extension["original_length"] = extension.get("original_length") or base["seq_len"]
    if "seq_len" not in given:
        longer = 1 if extension.get("positions") else extension["factor"]
        kept["seq_len"] = int(base["seq_len"] * longer)
    tree = {**tree, **kept, "extension": extension, "finetune": str(folder)}
    return validate(TrainConfig, tree)
