"""Configurations in run folders of before, as the schema reads them now."""

from collections.abc import Mapping
from typing import Any

from zoo.config.trainer_arguments import TRAINER_OWNED, TRAINER_REFUSED

UNSET_BY_ZERO = ("kv_heads", "dt_rank", "inner_width", "hidden_width")


def as_now(tree: Any) -> Any:
    """A run's stored configuration without the options that did nothing and now are refused.

    Arguments of Lightning that were accepted and not carried through, and zeros that were read as
    null.
    """
    if not isinstance(tree, dict):
        return tree
    tree = {**tree}
    if isinstance(trainer := tree.get("trainer"), dict):
        tree["trainer"] = {key: v for key, v in trainer.items() if _still_accepted(key, v)}
        if trainer.get("devices") == -1:  # Lightning's word for all of them
            tree["trainer"]["devices"] = "auto"
    if isinstance(model := tree.get("model"), dict) and isinstance(model.get("blocks"), list):
        tree["model"] = {**model, "blocks": [_without_zeros(block) for block in model["blocks"]]}
    return tree


def _still_accepted(argument: str, value: Any) -> bool:
    if argument in TRAINER_REFUSED or argument in TRAINER_OWNED:
        return False
    allowed = {"strategy": ("auto", "ddp"), "deterministic": (True, False, None, "warn")}
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
