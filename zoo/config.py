"""From words on the command line to a resolved configuration, by Hydra and our own checks.

Hydra composes the YAML groups. Before it sees an option we check that the name exists, so that a
misspelt one gets the nearest right name; afterwards `resolve` spells out what the YAML files leave
to names (a hybrid's pattern, where positions act) and the schema checks every value.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.errors import UserError, choose, nearest
from zoo.options import (
    TRAINER_OWNED,
    TRAINER_REFUSED,
    constructor_parameters,
    leaves,
    shipped,
    target_parameters,
    trainer_parameters,
    within,
)

# "x as x": who composes a configuration also finds its types here.
from zoo.schema import MAX_LAYERS
from zoo.schema import EvalConfig as EvalConfig
from zoo.schema import Optim as Optim
from zoo.schema import Part as Part
from zoo.schema import TrainConfig as TrainConfig
from zoo.schema import plain as plain
from zoo.schema import validate as validate

CONFIGS = shipped("configs")
ONE_SIDED = ("xpos", "alibi", "t5")  # positions that bidirectional attention lacks
SCHEMAS = {"train": TrainConfig, "eval": EvalConfig}

# What changes neither the weights nor the figures: where and how a run is carried out.
INCIDENTAL = (
    *("runs", "name", "resume", "fresh", "logger", "workers", "threads", "allocator"),
    "changed_code",
    *("trainer.devices", "trainer.accelerator", "trainer.strategy", "trainer.max_time"),
    *("trainer.accumulate_grad_batches", "trainer.enable_progress_bar"),
    *("trainer.enable_model_summary", "trainer.log_every_n_steps", "trainer.profiler"),
)


def composing(program: str) -> initialize_config_dir:
    """The context in which Hydra knows the program's YAML files."""
    return initialize_config_dir(str(CONFIGS), version_base="1.3", job_name=program)


@overload
def compose(program: Literal["train"], words: Sequence[str] = ()) -> TrainConfig: ...
@overload
def compose(program: Literal["eval"], words: Sequence[str] = ()) -> EvalConfig: ...
def compose(program: str, words: Sequence[str] = ()) -> TrainConfig | EvalConfig:
    """The configuration of `program` under options such as `model=mamba`, checked."""
    with composing(program):
        tree = compose_tree(program, parse(words))
    return validate(SCHEMAS[program], resolve(tree))


@functools.cache
def groups(program: str) -> dict[str, str | None]:
    """The program's groups and the choice each has unless told otherwise."""
    entries = yaml.safe_load((CONFIGS / f"{program}.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return {group: choice for group, choice in pairs if not group.startswith("override ")}


def choices(group: str) -> list[str]:
    """The YAML files of a group, by name."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def parse(words: Sequence[str]) -> list[Override]:
    """The words as Hydra reads them, model=hybrid added where hybrid=[a,b] has no model beside it.

    UserError for one it cannot read, a key given twice, or a pattern that no model takes.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    found: dict[str, Override] = {}
    for word in words:
        if "=" not in word:
            files = sorted(CONFIGS.glob(f"*/{word}.yaml"))
            hint = f" (did you mean '{files[0].parent.name}={word}'?)" if files else ""
            raise UserError(f"cannot read {word!r}: options are written option=value{hint}")
        try:
            override = parser.parse_override(word)
        except HydraException:
            advice = "lists are [a,b], values with special characters need quotes: 'key=\"a b\"'"
            raise UserError(f"cannot read {word!r}: {advice}") from None
        if override.key_or_group in found:
            raise UserError(f"{override.key_or_group!r} is given twice")
        found[override.key_or_group] = override
    if "hybrid" in found and found["hybrid"].value() is None:
        pass  # the pattern of the file, as without it
    elif "hybrid" in found and "model" not in found:
        found["model"] = parser.parse_override("model=hybrid")
    elif "hybrid" in found and "hybrid" not in _swept_values(found["model"]):
        line = found["model"].input_line
        raise UserError(
            f"{found['hybrid'].input_line}: {line} takes no pattern. "
            f"Leave {line} out, or sweep over both: -m {line},hybrid"
        )
    if "hybrid" in found and "model.pattern" in found:
        raise UserError("model.pattern: hybrid= says the same. Leave one of the two out.")
    return list(found.values())


def _swept_values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [str(override.value())]


def compose_tree(program: str, overrides: Sequence[Override]) -> dict[str, Any]:
    """What the YAML files and single-valued options make, names and values as they were given."""
    also = [*groups(program)]
    if {"resume", "finetune"} & {override.key_or_group for override in overrides}:
        also.append("data.path")  # of that run's data, whatever this tree's default is
    try:
        tree = compose_groups(program, overrides)
        for override in overrides:
            if not _chooses_a_file(program, override):
                check_key(override.key_or_group, tree, also)
                OmegaConf.update(tree, override.key_or_group, override.value(), force_add=True)
        container: Any = OmegaConf.to_container(tree, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error).splitlines()[0]) from None
    for path, value in leaves(container):
        if value == "???":
            field, owner = None, SCHEMAS[program]
            for name in path.split("."):
                field = getattr(owner, "model_fields", {}).get(name)
                owner = field.annotation if field else None
            raise UserError(f"{path}= is needed: {field.description if field else ''}")
    return container


def compose_groups(program: str, overrides: Sequence[Override], hydra: bool = False) -> DictConfig:
    """The YAML files that `overrides` choose, without their single values; `hydra` keeps Hydra's
    own section."""
    words = []
    for override in overrides:
        group, value = override.key_or_group, override.value()
        if group in groups(program) and not (value is None and groups(program)[group] is None):
            choose(group, "null" if value is None else str(value), choices(group))
        if _chooses_a_file(program, override):
            words.append((override.input_line or "").lstrip("+"))
    return hydra_compose(program, words, return_hydra_config=hydra)


def _chooses_a_file(program: str, override: Override) -> bool:
    return override.is_hydra_override() or override.key_or_group in groups(program)


def check_key(key: str, tree: DictConfig, also: Sequence[str]) -> None:
    """Refuse an option that neither the YAML files nor the code they configure know."""
    known = [*also, *_paths(OmegaConf.to_container(tree))]
    if key in known or key in [f"trainer.{name}" for name in (*TRAINER_OWNED, *TRAINER_REFUSED)]:
        return  # the schema tells what to use instead
    parent = key.rpartition(".")[0]
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    last = key.rpartition(".")[2]
    beside = {path: path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == parent}
    elsewhere = [path for path in known if path.rpartition(".")[2] == last]
    close = nearest(last, beside.values())
    guesses = [*elsewhere, *(path for path, name in beside.items() if name == close)]
    hint = f"did you mean {guesses[0]!r}? " if guesses else ""
    raise UserError(f"unknown option {key!r}: {hint}allowed: {', '.join(beside)}")


def _paths(node: Any, path: str = "") -> Iterator[str]:
    """Every dotted path in `node`, and those that its code would take."""
    if not isinstance(node, dict):
        return
    names = [str(key) for key in node]
    if "_target_" in node:
        names += target_parameters(node["_target_"]) or []
    if path == "trainer":
        names += trainer_parameters()
    for name in dict.fromkeys(names):
        child = f"{path}.{name}" if path else name
        yield child
        yield from _paths(node.get(name), child)


def resolve(tree: dict[str, Any]) -> dict[str, Any]:
    """The composed `tree` with its model spelled out: `blocks`, cycled over the layers.

    An extension's `scaling`, where it names another extension, becomes that one's.
    """
    extension = tree.get("extension")
    if isinstance(extension, dict) and isinstance(extension.get("scaling"), str):
        tree = {**tree, "extension": {**extension, "scaling": _scaling(extension["scaling"])}}
    model, pattern = tree.get("model"), tree.get("hybrid")
    tree = {key: value for key, value in tree.items() if key != "hybrid"}
    if not isinstance(model, dict) or "blocks" in model:
        return tree
    parts = [model]
    if "pattern" in model:  # the other models of a sweep have no use for one
        parts = _hybrid(model["pattern"] if pattern is None else pattern, tree)
    if tree.get("objective") == "masked":
        _check_bidirectional(parts)
    for part in parts:
        if part.get("max_length") is not None and part.get("positions") != "learned":
            raise UserError(
                f"model.max_length={part['max_length']}: positions={part.get('positions')} have no "
                "length to learn. Leave it out, or use model.positions=learned."
            )
    embedded = {part["positions"]: part for part in parts if _is_embedded(part)}
    if len(embedded) > 1:
        raise UserError(f"model.pattern mixes {' and '.join(sorted(embedded))} positions")
    spelled = {
        "name": model.get("name"),
        "blocks": [_block(part) for part in parts],
        "embedding_positions": next(iter(embedded), None),
        "max_length": next((part.get("max_length") for part in embedded.values()), None),
        "match": model.get("match"),
    }
    return {**tree, "model": spelled}


def extensions() -> dict[str, dict[str, Any]]:
    """Every extension's YAML by its name."""
    return {name: _inherited(name, "extension") for name in choices("extension")}


def _scaling(name: str) -> dict[str, Any]:
    """The rotary scaling of the extension of that name."""
    parts = {other: tree["scaling"] for other, tree in extensions().items()}
    scalings = {other: part for other, part in parts.items() if isinstance(part, dict)}
    return scalings[choose("extension.scaling", name, [*scalings])]


def _check_bidirectional(parts: Sequence[dict[str, Any]]) -> None:
    """Refuse objective=masked for a model that cannot read both ways."""
    for part in parts:
        if not reads_both_ways(part["name"]):
            able = [name for name in choices("model") if reads_both_ways(name)]
            raise UserError(
                f"model={part['name']} has no bidirectional form, which objective=masked trains; "
                f"those that have one: {', '.join(able)}"
            )


def reads_both_ways(name: str) -> bool:
    """Whether the model of that name has a bidirectional form for objective=masked."""
    part = _inherited(name)
    if part.get("positions") in ONE_SIDED or "mixer" not in part:
        return False
    return "causal" in (constructor_parameters(part["mixer"]["_target_"]) or [])


def _is_embedded(part: dict[str, Any]) -> bool:
    """Whether positions are added at the embedding rather than seen by the mixer."""
    if "positions" not in part:
        return False
    everywhere = ["rope", *ONE_SIDED, "none", "sinusoidal", "learned"]
    return choose("model.positions", part["positions"], everywhere) in ("sinusoidal", "learned")


def _block(part: dict[str, Any]) -> dict[str, Any]:
    mixer = part.get("mixer")
    if "positions" in part and isinstance(mixer, dict):
        if "positions" in mixer:
            given, name = mixer["positions"], part["positions"]
            raise UserError(
                f"model.mixer.positions={given}: model.positions={name} sets it. Use that one."
            )
        mixer = {**mixer, "positions": "none" if _is_embedded(part) else part["positions"]}
    return {"mixer": mixer, "feed_forward": part.get("feed_forward")}


def _hybrid(pattern: Any, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The models of a hybrid's layers, by the pattern that is repeated over them."""
    if not isinstance(pattern, list) or not pattern:
        shown = "null" if pattern is None else pattern
        raise UserError(f"hybrid={shown}: must be a list of models, such as [7*mamba,transformer]")
    parts = [part for entry in pattern for part in _load_models(str(entry), tree)]
    if len(parts) > MAX_LAYERS:
        raise UserError(f"hybrid={pattern}: {len(parts)} layers, more than a model can have")
    return parts


def _load_models(entry: str, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections of an entry such as mamba or 7*mamba, under the size and options of `tree`."""
    times, star, name = entry.rpartition("*")
    if star and not re.fullmatch(r"[1-9]\d{0,2}", times):
        raise UserError(
            f"hybrid=[{entry}]: layers in a row are written 7*mamba, with a number from 1 to 999"
        )
    part = _inherited(choose("model in hybrid", name, choices("model")))
    if "pattern" in part:
        raise UserError(f"hybrid=[{entry}]: {name} is a pattern itself. Write its models out.")
    whole: Any = OmegaConf.to_container(OmegaConf.create({**tree, "model": part}), resolve=True)
    return [whole["model"]] * int(times or 1)


def _inherited(name: str, group: str = "model") -> dict[str, Any]:
    """A YAML of a group over those its `defaults` name, as Hydra merges them."""
    part: Any = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
    parents = [parent for parent in part.pop("defaults", []) if parent != "_self_"]
    merged: Any = OmegaConf.merge(*[_inherited(parent, group) for parent in parents], part)
    return OmegaConf.to_container(merged)  # type: ignore[return-value]


def identity(config: TrainConfig) -> dict[str, Any]:
    """What makes a run this run and no other: {path: value}."""
    return {path: value for path, value in leaves(plain(config)) if not within(path, INCIDENTAL)}


def run_name(config: TrainConfig) -> str:
    """The run folder's name: as given, otherwise the same for the same options."""
    if config.name:
        return config.name
    told = json.dumps(identity(config), sort_keys=True)
    digest = hashlib.sha256(told.encode()).hexdigest()[:8]
    size, data = config.size.name, config.data.name
    return f"{config.model.name}-{size}-{config.seq_len}-{data}-s{config.seed}-{digest}"
