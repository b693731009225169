"""Translates the rotary settings of a checkpoint's `config.json` into options of the zoo.

They are `rope_theta`, `partial_rotary_factor` and `rope_scaling`, or all of these in
`rope_parameters`. Of the types of `transformers`' ROPE_INIT_FUNCTIONS:

    linear, proportional (of whole heads)    extension=pi
    dynamic                                  extension=dynamic_ntk
    yarn, llama3, longrope                   the extension of that name

Frequencies of `dynamic` and `longrope` depend on the length of the text. `transformers` takes one
length for all tokens of a call; here each query takes the length of its own part of the text, in
steps of the trained length, so that the same text read in pieces gives the same logits.

Frequencies of `linear` do not depend on the length before it, and most files do not say it: some
keep it in `max_position_embeddings` (Vicuna 1.5), some write the factor times it (DeepSeek-Coder).
It is read from `original_max_position_embeddings`, as the zoo exports it, and is otherwise taken to
be `max_position_embeddings`. What is scaled anew in its place counts from it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from zoo.errors import UserError
from zoo.pretrained.config_reader import Reader, unsupported

Settings = dict[str, Any]


def rotary(read: Reader, length: int, base_key: str = "rope_theta") -> list[str]:
    """The options for rotary positions and for the scaling that the model was trained under.

    Args:
        length: the longest text that the model was trained on, in tokens.
        base_key: the key of the base beside `rope_scaling`, of older files.

    Raises:
        UserError: for what the zoo does not compute.
    """
    old, new = read.get("rope_scaling", {}), read.get("rope_parameters", {})
    shared = {key for key in {*old} & {*new} if old[key] != new[key]}
    if shared or (_names_type(old) and _names_type(new) and rope_type(old) != rope_type(new)):
        raise unsupported("rope_scaling", old, "says otherwise than rope_parameters")
    scaling = {**old, **new}
    base = scaling.pop("rope_theta", None) or read.get(base_key, 10000.0)
    kind = rope_type(scaling)
    for key in ("rope_type", "type"):
        scaling.pop(key, None)
    words = [f"model.positions.rope_base={float(base)}"]
    if kind == "default":
        _nothing_left(scaling)
        return words
    if kind not in SCALINGS:
        raise unsupported("rope_scaling.rope_type", kind)
    before = read.get("original_max_position_embeddings")
    if before is not None:
        scaling["original_max_position_embeddings"] = before  # counts before the one beside it
    return words + SCALINGS[kind](scaling, length)


def rope_type(scaling: Mapping[str, Any]) -> str:
    return scaling.get("rope_type") or scaling.get("type") or "default"


def _names_type(scaling: Mapping[str, Any]) -> bool:
    return rope_type(scaling) != "default" or "rope_type" in scaling


def _nothing_left(scaling: Mapping[str, Any]) -> None:
    for key, value in scaling.items():
        if value is not None:
            raise unsupported(f"rope_scaling.{key}", value)


def _option(scaling: Settings, key: str, option: str) -> list[str]:
    value = scaling.pop(key, None)
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, list):
        value = str([float(one) for one in value]).replace(" ", "")
    return [] if value is None else [f"{option}={value}"]


def _scaled(
    name: str, options: Mapping[str, str], prepare: Callable[[Settings, float, int], None]
) -> Callable[[Settings, int], list[str]]:
    """Reads one kind of rope_scaling as the zoo's extension of that `name`.

    `prepare` gets the settings, the factor and the original length, and brings what differs to the
    names in `options`.
    """

    def read(scaling: Settings, length: int) -> list[str]:
        before = scaling.pop("original_max_position_embeddings", None)
        factor = scaling.pop("factor", None) or (length / before if before else None)
        if factor is None:
            raise UserError("config.json: must give rope_scaling.factor.")
        prepare(scaling, factor, before or length)
        words = [f"extension={name}", f"extension.factor={factor}"]
        words += [f"extension.original_length={before}"] if before else []
        for key, option in options.items():
            words += _option(scaling, key, f"extension.scaling.{option}")
        _nothing_left(scaling)
        return words

    return read


def _as_it_is(_scaling: Settings, _factor: float, _before: int) -> None:
    pass


def _proportional(scaling: Settings, length: int) -> list[str]:
    """As linear, where all channels are rotated; its factor is 1 unless given.

    A part of them has other frequencies than under any other type: by the width of the whole head.
    """
    share = scaling.pop("partial_rotary_factor", None)
    if share not in (None, 1.0):
        rule = f"is supported where whole heads are rotated (partial_rotary_factor is {share})"
        raise unsupported("rope_scaling.rope_type", "proportional", rule)
    return _scaled("pi", {}, _as_it_is)({"factor": 1.0, **scaling}, length)


def _dynamic(scaling: Settings, length: int) -> list[str]:
    """Scaled beyond `max_position_embeddings`, whatever an original length beside it says."""
    scaling.pop("original_max_position_embeddings", None)
    return _scaled("dynamic_ntk", {}, _as_it_is)(scaling, length)


def _attention_factor(scaling: Settings, factor: float, _before: int) -> None:
    """mscale and mscale_all_dim count together, and only without an attention factor."""
    one, other = (scaling.pop(key, None) for key in ("mscale", "mscale_all_dim"))
    if scaling.get("attention_factor") is None and one and other:
        over, under = (1 if factor <= 1 else 0.1 * m * math.log(factor) + 1 for m in (one, other))
        scaling["attention_factor"] = over / under


def _magnitude(scaling: Settings, factor: float, before: int) -> None:
    """An attention factor as one of the ways in which the zoo derives it from the length."""
    given = scaling.pop("attention_factor", None)
    if given is None:
        return
    su = math.sqrt(1 + math.log(factor) / math.log(before)) if factor > 1 else 1.0
    known = {"su": su, "yarn": 0.1 * math.log(max(factor, 1)) + 1, "none": 1.0}
    for name, value in known.items():
        if math.isclose(given, value, rel_tol=1e-7):
            scaling["magnitude"] = name
            return
    raise unsupported("rope_scaling.attention_factor", given)


def _between(scaling: Settings, _factor: float, _before: int) -> None:
    """Refuse frequency factors that leave nothing between them, over which llama3 interpolates."""
    low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    if low is not None and high is not None and high <= low:
        rule = f"must be more than low_freq_factor={low}"
        raise unsupported("rope_scaling.high_freq_factor", high, rule)


def _names(*keys: str) -> dict[str, str]:
    return {key: key for key in keys}


YARN = _names("beta_fast", "beta_slow", "attention_factor", "truncate")
LONGROPE = {"long_factor": "long_factors", "short_factor": "short_factors"}
SCALINGS: dict[str, Callable[[Settings, int], list[str]]] = {
    "linear": _scaled("pi", {}, _as_it_is),
    "proportional": _proportional,
    "dynamic": _dynamic,
    "llama3": _scaled("llama3", _names("low_freq_factor", "high_freq_factor"), _between),
    "yarn": _scaled("yarn", YARN, _attention_factor),
    "longrope": _scaled("longrope", LONGROPE | _names("magnitude"), _magnitude),
}
