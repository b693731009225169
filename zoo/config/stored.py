"""Names that were renamed, and stored configurations and rows brought to today's names.

The tables say, once for all programs, what an option, a class or a choice was called before. A
renamed thing gets one line here, and then

    as_now, row_as_now     run folders of before are read under today's names
    as_before              hashes that name runs and measurements stay what they were
    positions_as_now, ..   the same for position schemes, which were words and are parts
    weights_as_now         weights of before are loaded under today's names
    refuse_renamed         refuses an old name on a command line with the new one

Where something was renamed twice, both lines name today's name, the oldest name first.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from zoo.config.trainer_arguments import TRAINER_OWNED, TRAINER_REFUSED
from zoo.errors import UserError

# Dotted options, of sections as well: what is below them moves along. Those of a task,
# task.<task>.<option>, are fields of its rows too.
OPTIONS = {
    "extension.reach": "extension.attention",
    "task.longrope.times": "task.longrope.factor",
}
# Classes and functions that `_target_` names.
TARGETS: dict[str, str] = {
    "zoo.mixers.rwkv7.ChannelMixing": "zoo.mixers.rwkv7.RWKV7ChannelMixing",
}
# What a class or function (by its name of today) takes: {its name: {old: new}}.
ARGUMENTS: dict[str, dict[str, str]] = {}
# YAML files by group: {group: {old: new}}.
CHOICES: dict[str, dict[str, str]] = {
    "experiment": {"reach": "length_extension"},
    "task": {"reach": "length_extension"},
}
# Position schemes that were words in a mixer's `positions`, with `rope_base` and xPos's `window`
# beside them; those at the embedding were words in `model.embedding_positions`.
SCHEMES = {
    "rope": "zoo.positions.rope.Rope",
    "xpos": "zoo.positions.xpos.XPos",
    "alibi": "zoo.positions.alibi.ALiBi",
    "t5": "zoo.positions.t5.T5",
    "none": "zoo.positions.none.NoPositions",
}
EMBEDDED = {
    "sinusoidal": "zoo.positions.sinusoidal.Sinusoidal",
    "learned": "zoo.positions.learned.Learned",
}
ROPE_BASE = 10000.0
SIMA = "zoo.mixers.sima.SimA"  # its `positions` could be none alone
# Ends of the names of weights.
WEIGHTS = {".mixer.bias.weight": ".mixer.positions.bias.weight"}


def _reversed(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in reversed([*names.items()])}  # the oldest of several


TARGETS_BEFORE = _reversed(TARGETS)
UNSET_BY_ZERO = ("kv_heads", "dt_rank", "inner_width", "hidden_width")


def as_now(tree: Any) -> Any:
    """Read a run's stored configuration under today's names.

    Left out are options that did nothing and are refused now: arguments of Lightning that were
    accepted and not carried through, and zeros that were read as null.
    """
    if not isinstance(tree, dict):
        return tree
    tree = Names(OPTIONS, TARGETS, ARGUMENTS).read(tree)
    if isinstance(trainer := tree.get("trainer"), dict):
        tree["trainer"] = {key: v for key, v in trainer.items() if _still_accepted(key, v)}
        if trainer.get("devices") == -1:  # Lightning's word for all of them
            tree["trainer"]["devices"] = "auto"
    if isinstance(model := tree.get("model"), dict) and isinstance(model.get("blocks"), list):
        tree["model"] = {**model, "blocks": [_without_zeros(block) for block in model["blocks"]]}
    return positions_as_now(tree)


def as_before(tree: dict[str, Any]) -> dict[str, Any]:
    """Write a configuration under the names it first had, its keys in the same order.

    Hashes are made of these, so that a run and a measurement keep their names when an option or a
    class is renamed.
    """
    older = {TARGETS_BEFORE.get(new, new): _reversed(names) for new, names in ARGUMENTS.items()}
    return Names(_reversed(OPTIONS), TARGETS_BEFORE, older).read(tree)


def row_as_now(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read a line of results.jsonl under today's names.

    These are the options of its extension, the settings of its task, and which of its fields hold
    the question.
    """
    prefix = f"task.{row.get('task')}."
    fields = {
        old.removeprefix(prefix): new.removeprefix(prefix)
        for old, new in OPTIONS.items()
        if old.startswith(prefix)
    }
    row = {fields.get(name, name): value for name, value in row.items()}
    if isinstance(names := row.get("question"), list):
        row["question"] = [fields.get(name, name) for name in names]
    if isinstance(options := row.get("extension_options"), dict):
        row["extension_options"] = {
            _path(f"extension.{name}").removeprefix("extension."): TARGETS.get(str(value), value)
            for name, value in options.items()
        }
    return row


def refuse_renamed(key: str, value: Any, tree: Any = None) -> None:
    """Raise UserError where an option or its value has another name now.

    `tree` is the composed configuration, which says what class an option belongs to.
    """
    shown = "null" if value is None else value
    if (new := _path(key)) != key:
        raise UserError(f"{key}={shown}: renamed. Use {new}.")
    if isinstance(value, str) and value in CHOICES.get(key, {}):
        raise UserError(f"{key}={value}: renamed. Use {key}={CHOICES[key][value]}.")
    section, _, last = key.rpartition(".")
    for name in section.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    target = tree.get("_target_") if isinstance(tree, Mapping) else None
    if new := ARGUMENTS.get(str(target), {}).get(last):
        raise UserError(f"{key}={shown}: renamed. Use {section}.{new}.")
    if last == "_target_" and value in TARGETS:
        raise UserError(f"{key}={value}: renamed. Use {TARGETS[value]}.")


def _path(path: str) -> str:
    """Today's name of an option, which may lie in a section that was renamed."""
    for old, new in OPTIONS.items():
        if path == old or path.startswith(f"{old}."):
            return new + path.removeprefix(old)
    return path


class Names(NamedTuple):
    """Tables as above, from old names to new ones or back; `arguments` by the resulting target."""

    options: Mapping[str, str]
    targets: Mapping[str, str]
    arguments: Mapping[str, Mapping[str, str]]

    def read(self, node: Any, path: str = "") -> Any:
        """The tree `node`, which is at the dotted `path`, with every name replaced."""
        if isinstance(node, list):
            return [self.read(item, path) for item in node]
        if not isinstance(node, dict):
            return node
        target = self.targets.get(str(node.get("_target_")), node.get("_target_"))
        arguments, renamed = self.arguments.get(str(target), {}), {}
        for key, value in node.items():
            below = f"{path}.{key}".lstrip(".")
            name = self.options.get(below, arguments.get(key, key)).rpartition(".")[2]
            renamed[name] = target if key == "_target_" else self.read(value, below)
        return renamed


def _still_accepted(argument: str, value: Any) -> bool:
    if argument in TRAINER_REFUSED or argument in TRAINER_OWNED:
        return False
    allowed = {"strategy": ("auto", "ddp", "fsdp"), "deterministic": (True, False, None, "warn")}
    return value in allowed.get(argument, (value,))


def _without_zeros(block: Any) -> Any:
    if not isinstance(block, Mapping):
        return block
    parts = {**block}
    for slot, part in parts.items():
        if isinstance(part, Mapping):
            zeros = {
                key: None for key in UNSET_BY_ZERO if type(part.get(key)) is int and not part[key]
            }
            parts[slot] = {**part, **zeros}
    return parts


def positions_as_now(tree: dict[str, Any]) -> dict[str, Any]:
    """Read a configuration whose position schemes are words as one whose are parts."""
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("blocks"), list):
        return tree
    rest = {key: value for key, value in model.items() if key != "max_length"}
    if target := EMBEDDED.get(str(model.get("embedding_positions"))):
        length = {"max_length": model.get("max_length")} if target == EMBEDDED["learned"] else {}
        rest["embedding_positions"] = {"_target_": target, **length}
    return {**tree, "model": {**rest, "blocks": [_with_part(block) for block in model["blocks"]]}}


def _with_part(block: Any) -> Any:
    mixer = block.get("mixer") if isinstance(block, Mapping) else None
    name = mixer.get("positions") if isinstance(mixer, Mapping) else None
    if not isinstance(mixer, Mapping) or not isinstance(name, str) or name not in SCHEMES:
        return block
    rest = {key: value for key, value in mixer.items() if key not in ("positions", "rope_base")}
    if mixer.get("_target_") == SIMA:
        return {**block, "mixer": rest}
    part: dict[str, Any] = {"_target_": SCHEMES[name]}
    if name == "xpos":
        part["window"] = rest.pop("window", None)
    base = mixer.get("rope_base")
    if name in ("rope", "xpos") and base not in (None, ROPE_BASE):
        part["rope_base"] = base
    return {**block, "mixer": {**rest, "positions": part}}


def positions_as_before(tree: dict[str, Any]) -> dict[str, Any]:
    """Write a configuration whose position schemes are parts as one whose are words.

    A scheme that was never a word, or has options that it never had, stays a part.
    """
    model, names = tree["model"], _reversed({**SCHEMES, **EMBEDDED})
    embedded = model["embedding_positions"] or {}
    words = {
        "embedding_positions": names.get(str(embedded.get("_target_")), embedded or None),
        "max_length": embedded.get("max_length"),
    }
    blocks = [_with_word(block, names) for block in model["blocks"]]
    return {**tree, "model": {**model, **words, "blocks": blocks}}


def _with_word(block: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    mixer = block["mixer"]
    if mixer["_target_"] == SIMA:
        return {**block, "mixer": {**mixer, "positions": "none"}}
    part = mixer.get("positions")
    had = {"_target_", "rope_base", "window"}
    if not isinstance(part, dict) or part["_target_"] not in names or {*part} - had:
        return block
    beside = {"rope_base": ROPE_BASE} | {key: part[key] for key in part if key != "_target_"}
    return {**block, "mixer": {**mixer, **beside, "positions": names[part["_target_"]]}}


def weights_as_now(weights: dict[str, Any]) -> None:
    """Rename, in place and in their order, weights that a checkpoint has under an old name."""
    for name in [*weights]:
        value = weights.pop(name)
        for old, new in WEIGHTS.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        weights[name] = value
