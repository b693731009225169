"""Extends a model beyond its training length: rotary scalings, attention patterns, interpolated
slopes, training positions of a longer text. Only trained frequencies (CLEX) are new weights."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Generator, Tensor

from zoo.attention.pattern import AttentionPattern, Scaling
from zoo.config.applicability import Declared, acts_on, check_applies
from zoo.config.introspect import constructor_parameters
from zoo.config.schema.model import Extension
from zoo.data.loader import DrawPositions
from zoo.errors import UserError, below, refuse, refuse_path
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.backbone import Backbone
from zoo.positions.base import Positions, PositionScheme
from zoo.positions.rope import Rope
from zoo.positions.scaling import temperature


def extend(model: Backbone, extension: Extension, trained_length: int) -> Backbone:
    """Put every position scheme that the extension acts on under it, in place; return the model.

    A model tuned under LongRoPE may be read under LongRoPE with factors searched for it anew.

    Args:
        trained_length: tokens of the windows that the model was trained on.

    Raises:
        UserError: the extension does not act on the model, or its settings do not go together.
    """
    schemes, tree = position_schemes(model), extension.model_dump(by_alias=True)
    check_applies(extension, {declared_by(scheme) for scheme in schemes}, model.extended)
    acted = [scheme for scheme in schemes if acts_on(tree, declared_by(scheme))]
    if not acted:
        return model
    original_length = extension.original_length or trained_length
    if extension.positions is not None:
        _check_places(model, extension, original_length, trained_length)
    if extension.scaling is not None or extension.attention is not None:
        ropes = [scheme for scheme in acted if isinstance(scheme, Rope)]
        others = [scheme for scheme in acted if not isinstance(scheme, Rope)]
        if ropes and _is_trained(extension):
            _train_frequencies(model, ropes, extension, original_length)
        else:
            for rope in ropes:
                rope.pattern = _pattern(rope, extension, original_length)
        for scheme in others:
            _scale(scheme, extension, original_length)
    model.extended = extension.name
    return model


def position_schemes(model: Backbone) -> list[PositionScheme]:
    """Return the schemes that extensions can act on: in attention that lets them, and embedded."""
    inside = [one.positions for one in model.sublayers() if isinstance(one, SoftmaxAttention)]
    return [*inside, model.positions] if model.positions is not None else [*inside]


def declared_by(scheme: PositionScheme) -> Declared:
    """Return what a scheme's class declares, of what extensions act on."""
    return Declared(scheme.name, scheme.scaled_by, scheme.takes_pattern, scheme.placeable)


def rotary_positions(model: Backbone) -> list[Rope]:
    """Return the rotary schemes of the model's attention layers."""
    return [scheme for scheme in position_schemes(model) if isinstance(scheme, Rope)]


def places(extension: Extension, seq_len: int) -> DrawPositions | None:
    """Return what draws the positions of a step's training windows; None: they are 0, 1, 2 ..."""
    if extension.positions is None:
        return None
    original_length = extension.original_length or seq_len
    return partial(_place, extension.positions.load(), _longest(extension, original_length))


def _place(
    sample: Callable[..., Tensor], longest: int, rows: int, tokens: int, generator: Generator
) -> Tensor:
    return sample(rows, tokens, longest, generator)


def _longest(extension: Extension, original_length: int) -> int:
    return int(original_length * extension.factor)


def _check_places(
    model: Backbone, extension: Extension, original_length: int, seq_len: int
) -> None:
    longest, limit = _longest(extension, original_length), model.max_length
    if seq_len > longest:
        rule = f"gives positions up to {longest}, fewer than the {seq_len} tokens of a window"
        refuse("extension.factor", extension.factor, rule, "Use a larger factor.")
    if limit is not None and limit < longest:
        rule = (
            f"extension={extension.name} gives positions up to {longest}, and the model has {limit}"
        )
        advice = f"Use model.positions.max_length={longest}, or a smaller factor."
        refuse("extension.factor", extension.factor, rule, advice)


def _is_trained(extension: Extension) -> bool:
    """Whether the scaling is a module, whose frequencies are learned."""
    return extension.scaling is not None and isinstance(extension.scaling.load().func, type)


def _train_frequencies(
    model: Backbone, ropes: Sequence[Rope], extension: Extension, original_length: int
) -> None:
    """Give all rotary layers one module of frequencies, trained with the model's weights."""
    assert extension.scaling is not None
    if extension.positions is None:
        rule = "is trained on windows with positions of a longer text"
        advice = "Use python train.py finetune=<run> extension=clex."
        refuse("extension.scaling._target_", extension.scaling.target, rule, advice)
    if len({(rope.rotary_width, rope.rope_base) for rope in ropes}) > 1:
        rule = (
            "has one set of frequencies, and the rotary layers differ in rotary width or rope_base"
        )
        refuse("extension", extension.name, rule, "Use layers that are alike.")
    frequencies = _built(
        extension.scaling.load(), "scaling", **_given(ropes[0], extension, original_length)
    )
    model.frequencies = frequencies
    for rope in ropes:
        rope.pattern = AttentionPattern(frequencies, bucket=original_length)


def _given(rope: Rope, extension: Extension, original_length: int) -> dict[str, Any]:
    """Return what the model and the extension settle of a scaling's arguments."""
    sizes = {"width": rope.rotary_width, "base": rope.rope_base}
    return {**sizes, "factor": extension.factor, "original_length": original_length}


def _built(make: Callable[..., Any], slot: str, *args: Any, **given: Any) -> Any:
    """Call what a slot of the extension names; UserError that names the option it refuses."""
    try:
        return make(*args, **given)
    except UserError as error:
        of_length = str(error).startswith("original_length=")
        raise below("extension" if of_length else f"extension.{slot}", error) from error
    except (TypeError, ValueError) as error:
        refuse_path(f"extension.{slot}", str(error).splitlines()[0], "Correct its options")


def _scale(scheme: PositionScheme, extension: Extension, original_length: int) -> None:
    """Put a scheme without frequencies under its own scaling."""
    assert isinstance(scheme, Positions)
    assert extension.scaling is not None
    if extension.positions or extension.scaling.options:
        rule = f"scales positions={scheme.name} by extension.factor alone"
        advice = "Leave extension.positions and the options of extension.scaling out."
        refuse("extension", extension.name, rule, advice)
    _built(scheme.scale, "scaling", extension.scaling.load(), extension.factor, original_length)


def _pattern(rope: Rope, extension: Extension, original_length: int) -> AttentionPattern:
    scaling, by_length = _scaling(rope, extension, original_length)
    if extension.attention is None:
        return AttentionPattern(scaling, bucket=original_length if by_length else None)
    takes = constructor_parameters(extension.attention.target) or []
    more = {"original_length": original_length} if "original_length" in takes else {}
    if by_length:
        if "bucket" not in takes:
            rule = "keeps a window of the text, so its scaling cannot depend on the length"
            refuse("extension", extension.name, rule, "Use extension.scaling=pi, ntk or yarn.")
        more["bucket"] = original_length
    return _built(extension.attention.load(), "attention", scaling, **more)


def _scaling(rope: Rope, extension: Extension, original_length: int) -> tuple[Scaling, bool]:
    """Return length -> (inverse frequencies, attention factor), and whether the length matters."""
    plain = rope.inv_freq, 1.0
    if extension.scaling is None:
        return (lambda _: plain), False
    function, given = extension.scaling.load(), _given(rope, extension, original_length)
    takes = inspect.signature(function).parameters
    scaled = partial(function, **{name: one for name, one in given.items() if name in takes})
    if "length" in takes:
        lengths = original_length, 2 * original_length
        within, beyond = (_built(scaled, "scaling", length=length) for length in lengths)
        if within != beyond:
            return (lambda length: scaled(length=length)), True
    else:
        within = _built(scaled, "scaling")
    if all_dim := extension.scaling.options.get("mscale_all_dim"):
        if rope.rotary_width < rope.head_width:
            rule = "scales channels that are not rotated, which partial_rotary_factor < 1 leaves"
            refuse("extension.scaling.mscale_all_dim", all_dim, rule, "Use mscale.")
        # DeepSeek multiplies all scores by its square: here q and k of every channel carry it.
        within = within[0], within[1] * temperature(extension.factor, all_dim)
    return (lambda _: within), False
