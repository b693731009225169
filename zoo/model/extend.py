"""Extends a model beyond its training length: rotary scalings, attention patterns, interpolated
slopes, training positions of a longer text. Only trained frequencies (CLEX) are new weights."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Generator, Tensor

from zoo.attention.pattern import AttentionPattern, Scaling
from zoo.config.applicability import Declared, acts_on, check_applies
from zoo.config.introspect import constructor_parameters
from zoo.config.schema.model import Extension
from zoo.config.schema.train import TrainConfig
from zoo.config.stages import (
    Stages,
    check_composition,
    original_length,
    pattern_length,
    scalings,
    stages_of,
)
from zoo.data.loader import DrawPositions
from zoo.errors import UserError, below, refuse, refuse_path
from zoo.model.backbone import Backbone
from zoo.ops.runtime.sizes import ceil_div
from zoo.positions.base import Positions, PositionScheme
from zoo.positions.rope import Rope
from zoo.positions.scaling import on_top, temperature


def extend_as_trained(model: Backbone, config: TrainConfig) -> Backbone:
    """Put a model through the stages of its training, in place; return it."""
    for extension, seq_len in stages_of(config):
        extend(model, extension, seq_len)
    return model


def extend(model: Backbone, extension: Extension, seq_len: int) -> Backbone:
    """Put every position scheme that the extension acts on under it, in place; return the model.

    What the model was under before stays beneath, as zoo.config.stages says.

    Args:
        seq_len: tokens of the windows that the model was trained on, in this stage or before it.

    Raises:
        UserError: the extension does not act on the model, or its settings do not go together.
    """
    schemes = position_schemes(model)
    check_applies(extension, {declared_by(scheme) for scheme in schemes})
    check_composition(extension, model.stages)
    if extension.step is not None and (extension.scaling is None or _is_trained(extension)):
        rule = f"extension={extension.name} has no scaling that changes in steps"
        refuse("extension.step", extension.step, rule, "Leave it out.")
    length = original_length(extension, model.stages, seq_len)
    own = extension.model_copy(update={"original_length": length})
    stages = (*model.stages, (own, seq_len))
    if extension.positions is not None:
        _check_places(model, extension, length, seq_len)
    if _is_trained(extension):
        _train_frequencies(model, own)
    for scheme in schemes:
        acting = [number for number, stage in enumerate(stages) if _acts(stage[0], scheme)]
        if not any(stages[n][0].scaling or stages[n][0].attention for n in acting):
            continue
        if isinstance(scheme, Rope):
            scheme.pattern = _pattern(scheme, model, stages, acting)
            if scheme.pattern.top_k and scheme.softcap is not None:
                rule = "selects keys by scores without a cap, and the model has score_softcap"
                refuse("extension.attention.top_k", scheme.pattern.top_k, rule, "Use 0")
            continue
        if any(stages[n][0].scaling for n in acting):
            _scale(scheme, [stages[n][0] for n in acting])
        if any(stages[n][0].attention for n in acting):
            scheme.pattern = _remap(Frequencies(lambda _: ((), 1.0), None), stages, acting)
    if model.positions is not None:  # embedded: what attention sees has its place there
        patterns = [
            one.pattern
            for one in schemes
            if isinstance(one, Positions) and any(_acts(stage, one) for stage, _ in stages)
        ]
        model.positions.pattern = next((one for one in patterns if one is not None), None)
    if not any(map(_is_trained, scalings(stages))):
        model.frequencies = None
    model.stages = stages
    return model


def _acts(extension: Extension, scheme: PositionScheme) -> bool:
    return acts_on(extension.model_dump(by_alias=True), declared_by(scheme))


def position_schemes(model: Backbone) -> list[PositionScheme]:
    """Return the schemes that extensions can act on: in attention that lets them, and embedded."""
    inside = [cast(Any, one).positions for one in model.sublayers() if one.extendable]
    return [*inside, model.positions] if model.positions is not None else [*inside]


def declared_by(scheme: PositionScheme) -> Declared:
    """Return what a scheme's class declares, of what extensions act on."""
    return Declared(*(getattr(scheme, name) for name in Declared._fields))


def rotary_positions(model: Backbone) -> list[Rope]:
    """Return the rotary schemes of the model's attention layers."""
    return [scheme for scheme in position_schemes(model) if isinstance(scheme, Rope)]


def places(extension: Extension, seq_len: int) -> DrawPositions | None:
    """Return what draws the positions of a step's training windows; None: they are 0, 1, 2 ..."""
    if extension.positions is None:
        return None
    length = extension.original_length or seq_len
    return partial(_place, extension.positions.load(), _longest(extension, length))


def _place(
    sample: Callable[..., Tensor], longest: int, rows: int, tokens: int, generator: Generator
) -> Tensor:
    return sample(rows, tokens, longest, generator)


def _longest(extension: Extension, original_length: int) -> int:
    return int(original_length * extension.factor)


def _check_places(
    model: Backbone, extension: Extension, original_length: int, seq_len: int
) -> None:
    if any(stage.attention for stage, _ in model.stages):
        rule = "chooses positions, and the model was trained under a pattern of attention"
        refuse("extension", extension.name, rule, "Tune a run of before that pattern.")
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


def _train_frequencies(model: Backbone, extension: Extension) -> None:
    """Give all rotary layers one module of frequencies, trained with the model's weights."""
    assert extension.scaling is not None
    ropes = [rope for rope in rotary_positions(model) if _acts(extension, rope)]
    if extension.positions is None:
        rule = "is trained on windows with positions of a longer text"
        advice = "Use python train.py finetune=<run> extension=clex extension.factor=<largest>."
        refuse("extension.scaling._target_", extension.scaling.target, rule, advice)
    if extension.composition == "on_top":
        rule = f"extension={extension.name} learns from the model's own frequencies on"
        refuse("extension.composition", "on_top", rule, "Use extension.composition=replace.")
    if len({(rope.rotary_width, rope.rope_base) for rope in ropes}) > 1:
        rule = (
            "has one set of frequencies, and the rotary layers differ in rotary width or rope_base"
        )
        refuse("extension", extension.name, rule, "Use layers that are alike.")
    model.frequencies = _built(extension.scaling.load(), "scaling", **_given(ropes[0], extension))


def _given(rope: Rope, extension: Extension) -> dict[str, Any]:
    """Return what the model and the extension settle of a scaling's arguments."""
    sizes = {"width": rope.rotary_width, "base": rope.rope_base}
    lengths = {"factor": extension.factor, "original_length": extension.original_length}
    return {**sizes, **lengths}


def _built(make: Callable[..., Any], slot: str, *args: Any, **given: Any) -> Any:
    """Call what a slot of the extension names; UserError that names the option it refuses."""
    try:
        return make(*args, **given)
    except UserError as error:
        of_length = str(error).startswith("original_length=")
        raise below("extension" if of_length else f"extension.{slot}", error) from error
    except (TypeError, ValueError) as error:
        refuse_path(f"extension.{slot}", str(error).splitlines()[0], "Correct its options")


def _scale(scheme: PositionScheme, stages: Sequence[Extension]) -> None:
    """Put a scheme without frequencies under its own scaling."""
    scaled = [extension for extension in stages if extension.scaling is not None]
    last, factor = scaled[-1], 1.0
    assert last.scaling is not None
    if last.positions or last.scaling.options:
        rule = f"scales positions={scheme.name} by extension.factor alone"
        advice = "Leave extension.positions and the options of extension.scaling out."
        refuse("extension", last.name, rule, advice)
    for extension in scaled:
        factor = extension.factor * (factor if extension.composition == "on_top" else 1)
    _built(scheme.scale, "scaling", last.scaling.load(), factor, last.original_length)


class Frequencies(NamedTuple):
    """Those of a rotary layer under its scalings."""

    scaling: Scaling  # length -> (inverse frequencies, attention factor)
    bucket: int | None  # tokens between which they change; None where the length does not matter


def frequencies(rope: Rope, model: Backbone, stages: Stages) -> Frequencies:
    """Return the frequencies of a rotary layer after the stages, of which all act on it."""
    found = Frequencies(lambda _: (rope.inv_freq, 1.0), None)
    in_force = scalings(stages)
    for number, extension in enumerate(in_force):
        if _is_trained(extension):
            assert model.frequencies is not None
            found = Frequencies(model.frequencies, extension.original_length)
        elif extension.composition == "replace":
            found = _scaled(rope, extension, None)
        elif trained := [one.name for one in in_force[:number] if _is_trained(one)]:
            rule = (
                f"would hide the trained frequencies of extension={trained[0]} from their gradient"
            )
            refuse("extension.composition", "on_top", rule, "Use extension.composition=replace.")
        else:
            found = _scaled(rope, extension, found)
    return found


def _scaled(rope: Rope, extension: Extension, under: Frequencies | None) -> Frequencies:
    """Return the frequencies under a scaling: of the model's own, or of those of `under`."""
    part, length = extension.scaling, extension.original_length
    assert part is not None
    assert length is not None
    function, given = part.load(), _given(rope, extension)
    takes = inspect.signature(function).parameters
    bound = partial(function, **{name: one for name, one in given.items() if name in takes})
    if under is not None and "theta" not in takes:
        rule = f"{part.target} scales the model's own frequencies alone (it takes no theta)"
        refuse("extension.composition", "on_top", rule, "Use extension.composition=replace.")
    beneath = under.scaling(length)[0] if under is not None else None
    if isinstance(beneath, Sequence) and not any(beneath):
        rule = "scales frequencies, and the model's were dropped"
        refuse("extension.composition", "on_top", rule, "Use extension.composition=replace.")
    channels = _of_all_channels(rope, extension)

    def scaled(tokens: int, beneath: int | None = None) -> Any:
        make = partial(bound, length=tokens) if "length" in takes else bound
        found, factor = make() if under is None else on_top(make, under.scaling(beneath or tokens))
        return found, factor * channels

    within = _built(scaled, "scaling", length)
    own = "length" in takes and within != _built(scaled, "scaling", 2 * length)
    if extension.step is not None:
        if not own:
            rule = f"extension={extension.name} does not depend on the length of the text"
            refuse("extension.step", extension.step, rule, "Leave it out.")
        length = extension.step
    if under is not None and under.bucket is not None:
        if not own:
            return Frequencies(scaled, under.bucket)
        steps = length, under.bucket

        def each_in_its_steps(tokens: int) -> Any:
            return scaled(*(ceil_div(tokens, step) * step for step in steps))

        return Frequencies(each_in_its_steps, math.gcd(*steps))
    return Frequencies(scaled, length) if own else Frequencies(lambda _: within, None)


def _of_all_channels(rope: Rope, extension: Extension) -> float:
    """Return DeepSeek's factor of all scores: here q and k of every channel carry its root."""
    assert extension.scaling is not None
    all_dim = extension.scaling.options.get("mscale_all_dim")
    if not all_dim:
        return 1.0
    if rope.rotary_width < rope.head_width:
        rule = "scales channels that are not rotated, which partial_rotary_factor < 1 leaves"
        refuse("extension.scaling.mscale_all_dim", all_dim, rule, "Use mscale.")
    return temperature(extension.factor, all_dim)


def _pattern(
    rope: Rope, model: Backbone, stages: Stages, acting: Sequence[int]
) -> AttentionPattern:
    """Return the last remap of the stages that act, over the frequencies of them all."""
    found = frequencies(rope, model, [stages[n] for n in acting])
    if not any(stages[n][0].attention for n in acting):
        return AttentionPattern(found.scaling, bucket=found.bucket)
    return _remap(found, stages, acting)


def _remap(found: Frequencies, stages: Stages, acting: Sequence[int]) -> AttentionPattern:
    """Return the last remap of the stages that act, over these frequencies."""
    (scaling, bucket), last = found, max(n for n in acting if stages[n][0].attention)
    extension = stages[last][0]
    assert extension.attention is not None
    length = pattern_length(stages[: last + 1])
    takes = constructor_parameters(extension.attention.target) or []
    more = {"original_length": length} if "original_length" in takes else {}
    if bucket is not None:
        if "bucket" not in takes:
            rule = "keeps a window of the text, so its scaling cannot depend on the length"
            refuse("extension", extension.name, rule, "Use extension.scaling=pi, ntk or yarn.")
        more["bucket"] = bucket
    return _built(extension.attention.load(), "attention", scaling, **more)
