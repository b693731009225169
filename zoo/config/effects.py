"""Refuses options that would do nothing, or would run one thing under the name of another.

The schema knows what each value may be; what an option does beside the others, and whether it was
given or is a default, is decided here. Nothing heavy is imported.
"""

import functools
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from zoo.config.groups import CONFIGS, groups, inherited
from zoo.config.introspect import constructor_parameters, lineage
from zoo.config.schema.eval import Compress
from zoo.config.schema.model import Extension, Lora
from zoo.config.schema.train import TrainConfig
from zoo.config.schemes import short_name
from zoo.config.tree import leaves, within
from zoo.devices import on_cuda
from zoo.errors import refuse, shown


def check_names(program: str, tree: Mapping[str, Any], given: Sequence[str]) -> None:
    """Refuse a group's `name`, and what makes a variant that variant, given as options."""
    for group in groups(program):
        section = tree.get(group)
        if not isinstance(section, dict) or not isinstance(section.get("name"), str):
            continue
        if f"{group}.name" in given:
            name = section["name"]
            refuse(f"{group}.name", name, "a YAML file sets it", f"Use {group}={name}")
        if group == "optim":  # whose variants differ in code; their numbers are to be chosen
            continue
        named = [one for one in given if one != group]
        for path, value in _own(group, section["name"]):
            found = dict(leaves(section)).get(path)
            key = next((one for one in named if within(f"{group}.{path}", (one,))), None)
            if key and found != value:
                if path.endswith("positions._target_"):
                    found, value = short_name(str(found)), short_name(str(value))
                rule = f"{group}={section['name']} is the variant with {shown(value)}"
                refuse(key, found, rule, f"Choose another {group}")


@functools.cache
def _own(group: str, name: str) -> list[tuple[str, Any]]:
    """What the YAML file of a variant sets over the one that it is a variant of."""
    file = CONFIGS / group / f"{name}.yaml"
    tree = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not tree.pop("defaults", None):
        return []
    mine = [(path, value) for path, value in leaves(tree) if path != "name"]
    return [(path, value) for path, value in mine if not str(value).startswith("${")]


# What an argument of a mixer needs to act, by class: values of its other arguments, or objectives.
Needs = Mapping[str, tuple[str | bool, ...]]
_CAUSAL: Needs = {"objective": ("causal",)}
_MASKED: Needs = {"objective": ("masked",)}
NEEDS: dict[str, dict[str, Needs]] = {
    "Linformer": {
        **dict.fromkeys(("rank", "max_length"), _MASKED),
        **dict.fromkeys(("block", "slots"), _CAUSAL),
    },
    "ReLUAttention": {"alpha": {"normalise": ("length",)}},
    "SoftmaxAttention": {"norm_eps": {"qk_norm": (True,)}},
    "Soft": {
        "form": _CAUSAL,
        "iterations": _MASKED,
        "landmarks": {**_CAUSAL, "form": ("landmarks",)},
        "block": {"form": ("landmarks",)},
        "epsilon": {"form": ("landmarks",)},
    },
    "AFT": {
        "heads": {"variant": ("conv",)},
        "window": {"variant": ("conv", "local")},
        "rank": {"variant": ("local", "full")},
        "max_length": {"variant": ("local", "full")},
    },
}


def _check_used(config: TrainConfig, given: Sequence[str]) -> None:
    """Refuse an argument of a mixer that the others of its arguments leave without effect."""
    names = [key.removeprefix("model.mixer.") for key in given if key.startswith("model.mixer.")]
    for part in (block.mixer for block in config.model.blocks if names):
        classes = [target.rpartition(".")[2] for target in lineage(part.target)]
        known = next((NEEDS[name] for name in classes if name in NEEDS), {})
        for name in names:
            for other, values in known.get(name, {}).items():
                here = config.objective if other == "objective" else part.options.get(other)
                if here not in values:
                    needed = " or ".join(map(shown, values))
                    rule = f"acts with {other}={needed}, and here it is {shown(here)}"
                    value = part.options.get(name)
                    refuse(f"model.mixer.{name}", value, rule, f"Leave {name} out")


# A section of options, the one without which the others have no effect, and what these are of.
SECTIONS = (("distil", "teacher", "is of a teacher"), ("lora", "rank", "is of adapters"))


def check_effects(config: TrainConfig, tree: Mapping[str, Any], given: Sequence[str]) -> None:
    """Refuse those of the options `given` that a new training run would leave without effect."""
    steps, window = config.trainer.max_steps, config.seq_len
    if "batch_tokens" in given:
        tokens = config.batch_tokens
        if "batch_size" in given and tree["batch_size"] is not None:
            if tokens != config.batch_size * window:
                rule = f"batch_size={config.batch_size} says how many windows a step reads"
                refuse("batch_tokens", tokens, rule, "Leave one of the two out")
        elif tokens < window:
            advice = f"Use batch_tokens={window} or more, or a smaller seq_len"
            refuse("batch_tokens", tokens, f"must be at least seq_len={window}, one window", advice)
    if "optim.warmup_steps" in given and config.optim.warmup_steps > steps:
        rule, advice = f"must be at most trainer.max_steps={steps}", "Use a shorter warm-up"
        refuse("optim.warmup_steps", config.optim.warmup_steps, rule, f"{advice} or a longer run")
    if "optim.min_lr_ratio" in given and config.optim.warmup_steps >= steps - 1:
        rule = f"acts on steps after the warm-up of {config.optim.warmup_steps}, and there are none"
        advice = "Use a shorter optim.warmup_steps or a longer run"
        refuse("optim.min_lr_ratio", config.optim.min_lr_ratio, rule, advice)
    benchmarks = config.trainer.benchmark and "trainer.benchmark" in given
    if benchmarks and not on_cuda(config.trainer.accelerator):
        rule = "acts on CUDA alone, and this run is on another device"
        refuse("trainer.benchmark", True, rule, "Leave it out")
    attends = any(
        block.mixer.target.startswith("zoo.mixers.softmax.") for block in config.model.blocks
    )
    if config.model.sink_token and config.state_passing == "carry" and attends:
        rule = "is before a text, and of its keys state_passing=carry passes on the last alone"
        refuse("model.sink_token", True, rule, "Use state_passing=none")
    for section, main, rule in SECTIONS:
        options = getattr(config, section)
        for option in type(options).model_fields if getattr(options, main) is None else ():
            if f"{section}.{option}" in given and option != main:
                value, advice = getattr(options, option), f"Add {section}.{main}=<{main}>"
                refuse(f"{section}.{option}", value, rule, advice)
    if config.match == "params" and not config.finetune:
        _check_matched(config)
    _check_used(config, given)
    if "size.heads" in given:
        _check_heads(config, tree, given)
    check_extension(config.extension, given, longer=config.finetune is not None)


def _check_heads(config: TrainConfig, tree: Mapping[str, Any], given: Sequence[str]) -> None:
    """Refuse `size.heads` where no layer's YAML file refers to it, or the mixers' own is given."""
    pattern = tree.get("hybrid") or tree["model"].get("pattern") or [config.model.name]
    names = {str(entry).rpartition("*")[2] for entry in pattern}
    if "model.mixer.heads" in given:
        refuse(
            "size.heads", config.size.heads, "model.mixer.heads sets it", "Leave one of them out"
        )
    if not any("${size.heads}" in str(inherited(name)) for name in names):
        mixers = [block.mixer.target for block in config.model.blocks]
        if any("heads" in (constructor_parameters(target) or []) for target in mixers):
            rule, advice = f"model={config.model.name} has a number of its own", "model.mixer.heads"
            refuse("size.heads", config.size.heads, rule, f"Use {advice}")
        rule = f"model={config.model.name} has no heads"
        refuse("size.heads", config.size.heads, rule, "Leave it out")


def _check_matched(config: TrainConfig) -> None:
    """Refuse a width that `match=params` would replace."""
    for knob in config.model.match:
        slot, _, name = knob.rpartition(".")
        for block in config.model.blocks:
            part = getattr(block, slot) if slot else None
            if part is not None and part.options.get(name) is not None:
                rule, advice = "match=params sets this width", "Add match=none, or leave it out"
                refuse(f"model.{knob}", part.options[name], rule, advice)


def check_extension(extension: Extension, given: Sequence[str], longer: bool = False) -> None:
    """Refuse settings of an extension that has no use for them.

    `longer`: a run is trained further, in windows that are longer by the factor.
    """
    name = extension.name
    if "extension.name" in given:  # what is recorded would not be what is done
        refuse("extension.name", name, "a name chooses nothing", f"Use extension={name}")
    settings = [key for key in given if key.startswith("extension.")]
    if settings and name == "none":
        value = getattr(extension, settings[0].partition(".")[2], None)
        advice = "Choose an extension, such as extension=yarn"
        refuse(settings[0], value, "extension=none has no settings", advice)
    if "extension.original_length" in given and not _heeds("original_length", extension):
        rule = f"extension={name} does not depend on the trained length"
        refuse("extension.original_length", extension.original_length, rule, "Leave it out.")
    scaling = extension.scaling.options if extension.scaling else {}
    if "extension.scaling.mscale_all_dim" in given and scaling.get("mscale_all_dim"):
        option, rule = "extension.scaling.mscale_all_dim", "acts on channels that are not rotated"
        refuse(option, scaling["mscale_all_dim"], f"{rule}, and here all are", "Use mscale.")
    acts = _heeds("factor", extension)
    if "extension.factor" in given and not acts and extension.factor != 1 and not longer:
        refuse(
            "extension.factor",
            extension.factor,
            f"extension={name} has no scaling that uses it",
            "Add extension.scaling=<pi, ntk, yarn ...>, or leave it out",
        )


def check_reads(extension: Extension) -> None:
    """Refuse to read texts under an extension that draws the positions of training windows."""
    if extension.positions is not None:
        name = extension.name
        how = f"finetune=<run folder> extension={name} extension.factor=<times the length>"
        advice = f"Train with it (python train.py {how}), and measure that run with extension=none"
        refuse("extension", name, "is a way to train", advice)


def check_adapters(lora: Lora) -> None:
    """Refuse adapters where the package that trains them is missing."""
    if lora.rank is not None and find_spec("peft") is None:
        refuse("lora.rank", lora.rank, "needs the package peft", "Run pip install 'zoo[lora]'")


TRUNCATION = "zoo.compression.truncation."


def check_compression(compress: Compress, given: Sequence[str]) -> None:
    """Refuse settings of a compression that has no use for them, and a scorer that is not there."""
    settings = [key for key in given if key.startswith("compress.")]
    if "compress.name" in settings:
        refuse("compress.name", compress.name, "a name chooses nothing", "Use compress=<name>")
    if compress.method is None and settings:
        value = getattr(compress, settings[0].partition(".")[2], None)
        advice = "Choose a method, such as compress=llmlingua"
        refuse(settings[0], value, "compress=none has no settings", advice)
    if compress.method is None:
        return
    if compress.rate is None and compress.flops is None:
        refuse("compress.rate", "", "must be given, or compress.flops=")
    if compress.rate is not None and compress.flops is not None:
        rule = "compress.flops= says how much is kept, too"
        refuse("compress.rate", compress.rate, rule, "Leave one of the two out")
    scores = not compress.method.target.startswith(TRUNCATION)
    if not scores and compress.by is not None:
        rule = f"compress={compress.name} scores nothing"
        refuse("compress.by", compress.by, rule, "Leave it out")
    if scores and not (compress.by and Path(compress.by).exists()):
        advice = "Give the folder of a run or of a checkpoint"
        refuse("compress.by", compress.by, "must be the run that scores", advice)


def _heeds(argument: str, extension: Extension) -> bool:
    """Whether one of its parts takes the argument; training positions take all."""
    parts = [part for part in (extension.scaling, extension.attention) if part is not None]
    takes = [constructor_parameters(part.target) or [] for part in parts]
    return extension.positions is not None or any(argument in names for names in takes)


def notes(config: TrainConfig) -> list[str]:
    """What defaults come to in this run, where it is not what they say."""
    window, lines = config.seq_len, []
    if config.batch_size * window != config.batch_tokens:
        lines.append(
            f"batch_size={config.batch_size}: {config.batch_size * window} tokens per step "
            f"(windows of {window}; batch_tokens={config.batch_tokens})"
        )
    warmup, steps = config.optim.warmup_steps, config.trainer.max_steps
    if warmup > steps:
        lines.append(
            f"optim.warmup_steps={warmup} is longer than the run of {steps} steps: the learning "
            f"rate ends at {config.optim.lr * steps / warmup:.2g}"
        )
    return lines
