"""Spells out what YAML files leave to names: a hybrid's pattern, where positions act."""

import re
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from zoo.config.groups import choices, extensions, model_section
from zoo.config.introspect import constructor_parameters
from zoo.config.schema.model import MAX_LAYERS, Model
from zoo.config.schemes import DEFAULT, declared, scheme, scheme_target, short_name
from zoo.errors import choose, refuse


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
    taps = model.get("short_conv")
    if tree.get("objective") == "masked":
        _check_bidirectional(parts)
        if taps is not None:
            advice = "Leave it out, or use objective=causal."
            refuse("model.short_conv", taps, "the convolution sees earlier tokens alone", advice)
    chosen = [scheme(part["positions"], "model.positions") for part in parts if "positions" in part]
    embedded = {short_name(one["_target_"]): one for one in chosen if _is_embedded(one)}
    if len(embedded) > 1:
        refuse(
            "hybrid",
            pattern or model["pattern"],
            f"mixes {' and '.join(sorted(embedded))} positions at the embedding",
            "Use models with one of the two",
        )
    spelled = {
        "name": model.get("name"),
        "blocks": [_block(part, taps) for part in parts],
        "embedding_positions": next(iter(embedded.values()), None),
        "match": model.get("match"),
        **{key: model[key] for key in Model.unwritten if key in model},
    }
    return {**tree, "model": spelled}


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
            refuse(
                "model",
                part["name"],
                "has no bidirectional form, which objective=masked needs",
                f"Use one of: {', '.join(able)}",
            )


def reads_both_ways(name: str) -> bool:
    """Whether the model of that name has a bidirectional form for objective=masked."""
    part = model_section(name)
    if part.get("short_conv") or "mixer" not in part:
        return False
    given = part.get("positions", DEFAULT)
    if declared(scheme_target(given, "model.positions"), "one_sided", False):
        return False
    return "causal" in (constructor_parameters(part["mixer"]["_target_"]) or [])


def _is_embedded(chosen: dict[str, Any]) -> bool:
    """Whether positions are added at the embedding rather than seen by the mixer."""
    return declared(chosen["_target_"], "embedded", False)


def _block(part: dict[str, Any], short_conv: Any) -> dict[str, Any]:
    mixer = part.get("mixer")
    if isinstance(mixer, dict) and str(mixer.get("_target_")).startswith("zoo.mixers."):
        mixer = _with_positions(mixer, part.get("positions"))
    block = {"mixer": mixer, "feed_forward": part.get("feed_forward")}
    return block if short_conv is None else {**block, "short_conv": short_conv}


def _with_positions(mixer: dict[str, Any], of_model: Any) -> dict[str, Any]:
    """The mixer with its position scheme spelled out: the model's, unless that is embedded."""
    own = mixer.get("positions")
    if of_model is None:
        if own is None:
            return mixer
        chosen = scheme(own, "model.mixer.positions")
        if _is_embedded(chosen):
            rule = "is added at the embedding, not in the mixer"
            advice = f"Use model.positions={short_name(chosen['_target_'])} with model=transformer."
            refuse("model.mixer.positions", short_name(chosen["_target_"]), rule, advice)
        return {**mixer, "positions": chosen}
    chosen = scheme(of_model, "model.positions")
    name = short_name(chosen["_target_"])
    if own is not None:
        given = own if isinstance(own, str) else short_name(own["_target_"])
        rule = f"model.positions={name} sets it"
        refuse("model.mixer.positions", given, rule, "Use model.positions")
    takes = "positions" in (constructor_parameters(mixer["_target_"]) or [])
    if _is_embedded(chosen):
        chosen = scheme("none", "model.positions")
    elif not takes and name != "none":
        class_name = mixer["_target_"].rpartition(".")[2]
        rule = f"{class_name} has no positions of its own"
        refuse("model.positions", name, rule, "Use none, sinusoidal or learned.")
    return {**mixer, "positions": chosen} if takes else mixer


def _hybrid(pattern: Any, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The models of a hybrid's layers, by the pattern that is repeated over them."""
    if not isinstance(pattern, list) or not pattern:
        refuse("hybrid", pattern, "must be a list of models, such as [7*mamba,transformer]")
    parts = [part for entry in pattern for part in _load_models(str(entry), tree)]
    if len(parts) > MAX_LAYERS:
        refuse("hybrid", pattern, f"must have at most {MAX_LAYERS} layers (it has {len(parts)})")
    return parts


def _load_models(entry: str, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections of an entry such as mamba or 7*mamba, under the size and options of `tree`."""
    times, star, name = entry.rpartition("*")
    if star and not re.fullmatch(r"[1-9]\d{0,2}", times):
        refuse("hybrid", [entry], "must be of entries such as 7*mamba, with a number from 1 to 999")
    part = model_section(choose("hybrid", name, choices("model"), kind="model"))
    if "pattern" in part:
        refuse("hybrid", [entry], f"{name} is a pattern itself", "Write its models out")
    whole: Any = OmegaConf.to_container(OmegaConf.create({**tree, "model": part}), resolve=True)
    return [whole["model"]] * int(times or 1)
