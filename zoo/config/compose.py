"""From words on the command line to a resolved configuration, by Hydra and our own checks.

Hydra composes the YAML groups. Before it sees an option we check that the name exists, so that a
misspelt one gets the nearest right name; afterwards `resolve` spells out what the YAML files leave
to names (a hybrid's pattern, where positions act) and the schema checks every value.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import lru_cache
from typing import Any, Literal, overload

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.config.effects import check_reads
from zoo.config.groups import CONFIGS, choices, completed, corpora, groups, inherited
from zoo.config.introspect import target_parameters
from zoo.config.resolve import resolve

# "x as x": who composes a configuration also finds its types here.
from zoo.config.schema.eval import EvalConfig as EvalConfig
from zoo.config.schema.model import Model
from zoo.config.schema.optim import Optim as Optim
from zoo.config.schema.sections import Component as Component
from zoo.config.schema.train import TrainConfig as TrainConfig
from zoo.config.schemes import scheme
from zoo.config.stored import refuse_renamed
from zoo.config.trainer_arguments import TRAINER_OWNED, TRAINER_REFUSED, trainer_parameters
from zoo.config.tree import leaves
from zoo.config.validate import check_option
from zoo.config.validate import plain as plain
from zoo.config.validate import validate as validate
from zoo.errors import choose, nearest, refuse, refuse_path, refuse_unknown, shown

POSITIONS = ("model.positions", "model.mixer.positions")
SCHEMAS = {"train": TrainConfig, "eval": EvalConfig}


def composing(program: str) -> AbstractContextManager[Any]:
    """The context in which Hydra knows the YAML files, those of all programs; may be nested."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return initialize_config_dir(str(CONFIGS), version_base="1.3", job_name=program)


@overload
def compose(program: Literal["train"], words: Sequence[str] = ()) -> TrainConfig: ...
@overload
def compose(program: Literal["eval"], words: Sequence[str] = ()) -> EvalConfig: ...
def compose(program: str, words: Sequence[str] = ()) -> TrainConfig | EvalConfig:
    """The configuration of `program` under options such as `model=mamba`, checked."""
    with composing(program):
        overrides = parse(words)
        for one in overrides:
            if one.is_sweep_override():
                value = str(one.input_line).partition("=")[2]
                refuse(one.key_or_group, value, "must be one value, and names several", "Give one")
        tree = compose_tree(program, overrides)
    config = validate(SCHEMAS[program], resolve(tree))
    if isinstance(config, EvalConfig):
        check_reads(config.extension)
    return config


def parse(words: Sequence[str]) -> list[Override]:
    """The words as Hydra reads them, model=hybrid added where hybrid=[a,b] has no model beside it.

    UserError for one it cannot read, a key given twice, or a pattern that no model takes.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    found: dict[str, Override] = {}
    for word in words:
        if "=" not in word:
            files = sorted(CONFIGS.glob(f"*/{word}.yaml"))
            hint = f"Did you mean '{files[0].parent.name}={word}'? " if files else ""
            refuse_path(word, "is no option", f"{hint}Options are written option=value")
        try:
            override = parser.parse_override(word)
        except HydraException:
            refuse_path(
                word,
                "cannot be read",
                "Write lists as [a,b] and quote special characters: 'k=\"a b\"'",
            )
        if override.is_delete():
            refuse_path(word, "takes an option away, and every run has all", "Leave it out")
        if override.key_or_group in found:
            refuse_path(word, f"{override.key_or_group} is given twice", "Give each option once")
        found[override.key_or_group] = override
    if "hybrid" in found and found["hybrid"].value() is None:
        pass  # the pattern of the file, as without it
    elif "hybrid" in found and "model" not in found:
        found["model"] = parser.parse_override("model=hybrid")
    elif "hybrid" in found and "hybrid" not in _swept_values(found["model"]):
        line = found["model"].input_line
        refuse(
            "hybrid",
            found["hybrid"].value(),
            f"{line} has no pattern of models",
            f"Leave {line} out, or sweep over both: -m {line},hybrid",
        )
    if "hybrid" in found and "model.pattern" in found:
        pattern = found["model.pattern"].value()
        refuse("model.pattern", pattern, "hybrid= says the same", "Leave one of the two out")
    return list(found.values())


def _swept_values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [str(override.value())]


def compose_tree(program: str, overrides: Sequence[Override]) -> dict[str, Any]:
    """What the YAML files and single-valued options make, names and values as they were given."""
    also = [*groups(program), "extension.composition", "extension.step"]
    if program == "train":
        also += [f"model.{key}" for key, f in Model.model_fields.items() if not f.is_required()]
    given = {override.key_or_group for override in overrides}
    if {"resume", "finetune"} & given:
        also += ["data.path", "model.mixer.window"]  # of that run, whatever this tree's default is
    if "finetune" in given:
        also += [f"data.{key}" for text in corpora().values() for key in text if key != "name"]
    read = overrides  # those that are read when a message comes
    try:
        tree = compose_groups(program, overrides)
        if "model" in tree:
            names = [o.value() for o in overrides if o.key_or_group == "model"]
            _complete_model(tree, str(names[-1] if names else groups(program)["model"]))
        for override in overrides:
            if not _chooses_a_file(program, override):
                read = [override]
                refuse_renamed(override.key_or_group, override.value(), tree)
                if "finetune" in given and "data" not in given:
                    _check_of_text(override.key_or_group, override.value())
                key, value = override.key_or_group, override.value()
                check_key(key, value, tree, also)
                if key in POSITIONS:  # another scheme, without the options of the one before
                    OmegaConf.update(tree, key, scheme(value, key), merge=False, force_add=True)
                else:
                    OmegaConf.update(tree, key, value, force_add=True)
        read = overrides
        _check_sources(program, tree)
        container: Any = OmegaConf.to_container(tree, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        message = str(error).splitlines()[0].removesuffix(".")
        refuse_path(" ".join(_at_fault(read, message)), message, "See --help for the options")
    return container


def _check_of_text(key: str, value: Any) -> None:
    """Refuse an option of a synthetic task where a run is fine-tuned and data= names no task."""
    if not key.startswith("data.task."):
        return
    options = {name: inherited(name, "data").get("task", {}) for name in choices("data")}
    tasks = [name for name, task in options.items() if key.removeprefix("data.task.") in task]
    if tasks:
        names = " or ".join(f"data={name}" for name in tasks)
        refuse(key, value, "is of a synthetic task, and data= names none", f"Add {names} as well")


def _at_fault(overrides: Sequence[Override], message: str) -> list[str]:
    """The words that a message of Hydra's is about: those it quotes, else those that take their
    value from another option, else all."""
    words = [override.input_line or "" for override in overrides]
    quoted = [word for word in words if f"'{word.partition('=')[0]}'" in message]
    return quoted or [word for word in words if "${" in word] or words


def _check_sources(program: str, tree: DictConfig) -> None:
    """Refuse a bad value of an option that others are taken from, such as ${seq_len}, as its own.

    What is taken from it would be refused first, by a name that nobody has given.
    """
    raw: Any = OmegaConf.to_container(tree, resolve=False)
    found = (re.fullmatch(r"\$\{([a-z_.]+)\}", str(value)) for _, value in leaves(raw))
    known = {path for path, _ in leaves(raw)}  # of another name OmegaConf says that it is not found
    for path in dict.fromkeys(match[1] for match in found if match and match[1] in known):
        check_option(SCHEMAS[program], path, OmegaConf.select(tree, path))


def _complete_model(tree: DictConfig, name: str) -> None:
    """Give the chosen model the keys that its YAML leaves out."""
    model: Any = OmegaConf.to_container(tree.model, resolve=False)
    OmegaConf.update(tree, "model", completed(name, model), merge=False, force_add=True)


def compose_groups(program: str, overrides: Sequence[Override], hydra: bool = False) -> DictConfig:
    """The YAML files that `overrides` choose, without their single values; `hydra` keeps Hydra's
    own section."""
    words = []
    for override in overrides:
        group, value = override.key_or_group, override.value()
        refuse_renamed(group, value)
        if group in groups(program) and not (value is None and groups(program)[group] is None):
            choose(group, "null" if value is None else str(value), choices(group))
        if _chooses_a_file(program, override):
            words.append((override.input_line or "").lstrip("+"))
    # Hydra's own section has the folder that it was started in.
    within = GlobalHydra.instance().hydra if hydra else _yaml_files()
    return deepcopy(_composed(within, program, tuple(words), hydra))


@lru_cache(maxsize=256)
def _composed(_within: object, program: str, words: tuple[str, ...], hydra: bool) -> DictConfig:
    """What Hydra composes of these files; the arms of a sweep choose the same few."""
    return hydra_compose(program, [*words], return_hydra_config=hydra)


def _yaml_files() -> tuple[object, ...]:
    """What Hydra reads now: the folders that it searches, and when each of our files changed."""
    searched = GlobalHydra.instance().config_loader().get_search_path().get_path()
    found: list[object] = [element.path for element in searched]
    for folder, _, names in os.walk(CONFIGS):
        for name in sorted(names):
            about = os.stat(os.path.join(folder, name))
            found.append((folder, name, about.st_mtime_ns, about.st_size))
    return tuple(found)


def _chooses_a_file(program: str, override: Override) -> bool:
    return override.is_hydra_override() or override.key_or_group in groups(program)


def check_key(key: str, value: Any, tree: DictConfig, also: Sequence[str]) -> None:
    """Refuse an option that neither the YAML files nor the code they configure know."""
    known = [*also, *_paths(OmegaConf.to_container(tree))]
    if key in known or key in [f"trainer.{name}" for name in (*TRAINER_OWNED, *TRAINER_REFUSED)]:
        return  # the schema says what to use instead
    parent = key.rpartition(".")[0]
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    last = key.rpartition(".")[2]
    beside = {path: path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == parent}
    elsewhere = [path for path in known if path.rpartition(".")[2] == last]
    close = nearest(last, beside.values())
    guesses = [*elsewhere, *(path for path, name in beside.items() if name == close)]
    setting = f"{key}={shown(value)}"
    refuse_unknown(setting, "option", key, beside, guess=next(iter(guesses), ""))


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
