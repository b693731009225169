"""Builds the configuration of a run that resumes or fine-tunes another."""

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.config.longrope_factors import with_found_factors
from zoo.config.schedule import continued
from zoo.config.schema.train import TrainConfig
from zoo.config.tree import within
from zoo.config.validate import plain, validate
from zoo.errors import refuse
from zoo.runs.checkpoints import step_of
from zoo.runs.folder import RunFolder

# Options that a resumed run may change; any other makes it another run.
RESUMABLE = (
    *("trainer.max_steps", "trainer.max_time", "logger", "workers", "threads"),
    *("trainer.devices", "trainer.accelerator", "trainer.strategy"),
    *("trainer.accumulate_grad_batches", "optim.continuation"),
    *("data.path", "data.cache", "changed_code"),
)
MOVABLE = ("data.path", "data.cache")  # the same text may be elsewhere


def resumed(tree: Mapping[str, Any], given: Sequence[str]) -> TrainConfig:
    """The configuration of the run `tree["resume"]`, changed by the options `given`.

    Raises UserError for an option that may not change, and where there is no whole run to resume.
    """
    folder = RunFolder.open(str(tree["resume"]))
    changes = [key for key in given if key != "resume"]
    if fixed := [key for key in changes if not within(key, RESUMABLE)]:
        rule = f"continues a run with its own options: {', '.join(fixed)} cannot change"
        refuse("resume", folder, rule, f"Change only {', '.join(RESUMABLE)}")
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
    """A run's data section with the path and the cache where its text is now.

    Raises UserError where its text has no such place.
    """
    moved = {key: value for key, value in place.items() if value is not None}
    for key, value in moved.items():
        if key not in data:
            rule = f"data={data['name']}, on which the run was trained, has no such option"
            refuse(f"data.{key}", value, rule, "Leave it out")
    return {**data, **moved}


def finetuned(tree: Mapping[str, Any], given: Sequence[str]) -> TrainConfig:
    """The configuration that fine-tunes the run `tree["finetune"]` under an extension.

    Model, size and objective are that run's; data and seed too, unless `given`. So is seq_len,
    times the extension's factor unless the extension draws positions. Raises UserError where there
    is no whole run to start from.
    """
    folder = RunFolder.open(str(tree["finetune"]))
    folder.checkpoint()
    base = plain(folder.config)
    if fixed := [key for key in given if within(key, ("model", "size", "match", "objective"))]:
        rule = f"keeps the run's model: {', '.join(fixed)} cannot change"
        refuse("finetune", folder, rule, "Leave them out, or train a new run")
    if base["extension"]["name"] != "none":
        refuse("finetune", folder, "was fine-tuned itself", f"Use finetune={base['finetune']}")
    inherited = {key: base[key] for key in ("model", "size", "match", "objective")}
    if "seed" not in given:
        inherited["seed"] = base["seed"]
    data = [key for key in given if within(key, ("data",))]
    if not any(key not in MOVABLE for key in data):  # the base's text, wherever it is now
        moved = {key.removeprefix("data."): tree["data"][key.removeprefix("data.")] for key in data}
        inherited["data"] = with_place(base["data"], moved)
    extension = with_found_factors(tree["extension"], folder.path)
    extension["original_length"] = extension.get("original_length") or base["seq_len"]
    if "seq_len" not in given:
        longer = 1 if extension.get("positions") else extension["factor"]
        inherited["seq_len"] = int(base["seq_len"] * longer)
    tree = {**tree, **inherited, "extension": extension, "finetune": str(folder)}
    return validate(TrainConfig, tree)
