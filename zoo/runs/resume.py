"""Builds the configuration of a run that resumes or fine-tunes another."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from zoo.config.groups import corpora
from zoo.config.longrope_factors import with_found_factors
from zoo.config.schedule import continued
from zoo.config.schema.train import TrainConfig
from zoo.config.stages import check_composition, original_length, stages_of, tuned_length
from zoo.config.tree import flat, within
from zoo.config.validate import plain, refuse_missing, validate
from zoo.errors import refuse
from zoo.runs.checkpoints import step_of
from zoo.runs.folder import RunFolder

# Options that a resumed run may change; any other makes it another run.
LAUNCHER = "launcher"  # of the sweep, not of its runs
CHANGED_CODE = "changed_code"  # read before it is known whether steps are left
RESUMABLE = (
    *("trainer.max_steps", "trainer.max_time", "logger", "workers", "threads"),
    *("trainer.devices", "trainer.accelerator", "trainer.strategy", "trainer.checkpoint"),
    "trainer.num_nodes",
    *("trainer.sequence_parallel", "trainer.accumulate_grad_batches", "optim.continuation"),
    *("data.path", "data.cache", CHANGED_CODE),
)
WINDOW = "model.mixer.window"  # which a stage may widen: no weight depends on it
# What trainer=<name> changes of a resumed run.
SHARING = ("strategy", "devices", "checkpoint", "num_nodes", "sequence_parallel")
MOVABLE = ("data.path", "data.cache")  # the same text may be elsewhere


def resumed(tree: Mapping[str, Any], given: Sequence[str]) -> TrainConfig:
    """The configuration of the run `tree["resume"]`, changed by the options `given`.

    Raises UserError for an option that may not change, and where there is no whole run to resume.
    """
    folder = RunFolder.open(str(tree["resume"]))
    changes = [key for key in given if key not in ("resume", LAUNCHER)]
    if fixed := [key for key in changes if key != "trainer" and not within(key, RESUMABLE)]:
        rule = f"continues a run with its own options: {', '.join(fixed)} cannot change"
        refuse("resume", folder, rule, f"Change only {', '.join(RESUMABLE)}")
    if folder.info.get("shrunk"):
        rule = "was made by zoo shrink and has no training to continue"
        refuse("resume", folder, rule, "Train it further: finetune=<run>")
    reached = step_of(folder.checkpoint())
    before, config = folder.config, plain(folder.config)
    for key in changes:
        section, _, last = key.rpartition(".")
        value = (tree[section] if section else tree)[last]
        if section == "data":
            config["data"] = with_place(config["data"], _moved(tree, [key]))
        elif key == "trainer":
            config["trainer"] |= {name: value.get(name) for name in SHARING}
        elif section == "logger" and "logger" not in given and config["logger"]["name"] == "none":
            refuse(key, value, "the run has logger=none, which has no settings", "Add logger=wandb")
        else:
            (config[section] if section else config)[last] = value
    config = plain(validate(TrainConfig, config))
    continued(before, config, reached, given)
    after = validate(TrainConfig, {**config, "resume": str(folder)})
    _check_left(folder, after, changes)
    return after


def _check_left(folder: RunFolder, after: TrainConfig, changes: Sequence[str]) -> None:
    """Refuse options that a run without steps left would not act on: those of other values."""
    if not folder.is_trained(after):
        return
    values, recorded = flat(plain(after)), flat(plain(folder.config))
    differ = [key for key in {**values, **recorded} if values.get(key) != recorded.get(key)]
    names = [key for key in changes if key != CHANGED_CODE]
    if idle := [name for name in names if any(within(key, [name]) for key in differ)]:
        rule = f"has no steps left to train, so {', '.join(idle)} would change nothing"
        advice = f"Give trainer.max_steps above {after.trainer.max_steps}, or leave it out"
        refuse("resume", folder, rule, advice)


def _moved(tree: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The places of a run's text, `data.path` or `data.cache`, that were given."""
    place = {name: tree["data"][name] for name in (key.removeprefix("data.") for key in keys)}
    for name, value in place.items():
        if value is None:
            refuse(f"data.{name}", value, "must be a folder")
    return place


def _options(
    data: Mapping[str, Any], tree: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Any]:
    """Those options of a run's data section that were given. UserError where it has no such."""
    known = corpora().get(data["name"], {})
    values = {name: tree["data"].get(name) for name in names}
    for name, value in values.items():
        if name not in {**known, **data}:
            _refuse_unknown(data, name, value)
    return values


def _refuse_unknown(data: Mapping[str, Any], name: str, value: Any) -> NoReturn:
    refuse(f"data.{name}", value, f"data={data['name']} has no such option", "Leave it out")


def with_place(data: Mapping[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """A data section with the path and the cache where its text is now.

    Raises UserError where its text has no such place, or is of another corpus.
    """
    moved = {key: value for key, value in place.items() if value is not None}
    if (name := moved.get("name", data["name"])) != data["name"]:
        rule = f"the run was trained on data={data['name']}, and is measured on that"
        refuse("data", name, rule, "Leave it out")
    for key, value in moved.items():
        if key not in data:
            _refuse_unknown(data, key, value)
    return {**data, **moved}


def finetuned(tree: Mapping[str, Any], given: Sequence[str]) -> TrainConfig:
    """The configuration that fine-tunes the run `tree["finetune"]` under an extension.

    Model, size and objective are that run's, but for a window of attention; seed too, unless
    `given`, and data, with those of its options that are given, unless data=<name> is. So is
    seq_len, or the extension's factor times its original length unless the extension draws
    positions. Raises UserError where there is no whole run to start from.
    """
    folder = RunFolder.open(str(tree["finetune"]))
    if folder.checkpoint() is None and not folder.config.checkpoint:
        refuse("finetune", folder, "has no checkpoint to start from", "Train it first")
    base, before = plain(folder.config), folder.config
    kept = ("model", "size", "match", "objective")
    if fixed := [key for key in given if within(key, kept) and key != WINDOW]:
        rule = f"keeps the run's model: {', '.join(fixed)} cannot change"
        refuse(
            "finetune", folder, rule, f"Leave them out ({WINDOW} can change), or train a new run"
        )
    inherited = {key: base[key] for key in (*kept, "shrunk") if key in base}
    if WINDOW in given:
        inherited["model"] = _with_window(base["model"], tree["model"]["blocks"][0]["mixer"])
    if "seed" not in given:
        inherited["seed"] = base["seed"]
    if "data" not in given:  # the base's text, wherever it is now, under the options given
        data = [key for key in given if within(key, ("data",))]
        moved = _moved(tree, [key for key in data if key in MOVABLE])
        own = {key.removeprefix("data."): key for key in data if key not in MOVABLE}
        inherited["data"] = with_place(base["data"], moved) | _options(base["data"], tree, own)
    stages, inherited["stages"] = stages_of(before), base.get("stages", [])
    if before.finetune or before.stages or before.extension.name != "none":
        own = {"run": str(folder), "seq_len": base["seq_len"], "extension": base["extension"]}
        inherited["stages"] = [*inherited["stages"], own]
    tree = {**tree, **inherited, "finetune": str(folder)}
    config = validate(TrainConfig, tree, partly=True)
    check_composition(config.extension, stages, given)
    refuse_missing(TrainConfig, tree)
    extension = with_found_factors(tree["extension"], folder.path)
    length = original_length(config.extension, stages, before.seq_len)
    extension["original_length"] = length
    tree["extension"] = extension
    if "seq_len" not in given:
        tree["seq_len"] = tuned_length(config.extension, stages, before.seq_len)
    return validate(TrainConfig, tree)


def _with_window(model: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A run's model section with another window of attention in every mixer that has one.

    Raises UserError where none has.
    """
    blocks = model["blocks"]
    if not any("window" in block["mixer"] for block in blocks):
        refuse(WINDOW, given["window"], f"model={model['name']} has no window", "Leave it out")
    changed = [
        {**block, "mixer": {**block["mixer"], "window": given["window"]}}
        if "window" in block["mixer"]
        else block
        for block in blocks
    ]
    return {**model, "blocks": changed}
