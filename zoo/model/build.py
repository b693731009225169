"""From a checked configuration to a model, sized so that arms can be compared.

`match=params` makes every arm cost what the transformer of that size costs, by the knobs its YAML
lists (`match: [layers, mixer.inner_width]`): the number of layers first, to the nearest, then a
width to within 1 %.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from zoo.config.introspect import constructor_parameters
from zoo.config.schema.model import Size
from zoo.config.schema.sections import Component
from zoo.config.schema.train import TrainConfig
from zoo.errors import UserError, below, refuse, refuse_path
from zoo.mixers.base import Mixer
from zoo.mixers.feed_forward import SwiGLU
from zoo.mixers.low_rank import LowRank
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.backbone import Backbone
from zoo.model.shrink import factorize

TOLERANCE = 0.01  # arms of a comparison differ by at most this share of the parameters
STEPS = (16, 8, 4, 2, 1)  # widths are multiples of the first of these that meets the tolerance


def build_model(
    config: TrainConfig, vocab_size: int, built: Callable[[nn.Module], None] = lambda _: None
) -> tuple[Backbone, dict[str, int]]:
    """The configured model, and the settings that `match` found: {"layers": 7, ...}.

    Args:
        built: called with each part of the model that has its first weights, and at the end with
            the whole; it may take them away.

    Raises UserError where an architecture refuses an argument, or where no setting of the knobs
    meets the reference within 1 %.
    """
    knobs: dict[str, int] = {}
    try:
        if config.match == "params":
            knobs = _match(config, vocab_size)
        model = assemble(config, vocab_size, knobs, built)
        if config.shrunk is not None and config.shrunk.rank is not None:

            def unit(dense: nn.Linear, rank: int) -> LowRank:
                built(made := LowRank.in_place_of(dense, rank))
                return made

            factorize(model, config.shrunk.rank, unit)
        built(model)
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # such as sizes larger than a tensor can be
        message = _reason(error)
        if message.startswith("heads="):  # of the transformer that match=params sizes to
            raise below("size", ValueError(message)) from error
        refuse("model", config.model.name, message, "Change its options or the size")
    _check_window(model, config.model.name, config.seq_len)
    if config.objective == "causal" and not model.causal:
        kinds = sorted({type(layer).__name__ for layer in model.sublayers() if not layer.causal})
        raise UserError(
            f"objective=causal: {', '.join(kinds)} declares causal=False, so it cannot be trained "
            "or scored left to right. Use objective=masked."
        )
    return model, knobs


def _reason(error: Exception) -> str:
    message = str(error).splitlines()[0]
    overflow = "Overflow when unpacking" in message
    return "its sizes are larger than a tensor can be" if overflow else message


def _check_window(model: Backbone, name: str, window: int) -> None:
    if model.max_length is not None and window > model.max_length:
        advice = f"Use seq_len={model.max_length} or less"
        if model.sink is not None:  # whose place a limit that follows seq_len has no room for
            advice = "Use model.sink_token=false, or another model"
        rule = f"model={name} reads at most {model.max_length} tokens"
        refuse("seq_len", window, rule, advice)
    if window < model.min_window:
        raise UserError(
            f"seq_len={window}: windows of model={name} must have at least {model.min_window} "
            "tokens, or some of its parameters would have no gradient. Use longer windows, or "
            "smaller blocks, landmarks or segments."
        )


def count_parameters(model: nn.Module) -> int:
    """Trained numbers, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def assemble(
    config: TrainConfig,
    vocab_size: int,
    knobs: Mapping[str, int],
    built: Callable[[nn.Module], None] = lambda _: None,
) -> Backbone:
    """The configured model with the layers and widths that `knobs` name in place of its own;
    `built` is the Backbone's."""
    model, width = config.model, config.size.width
    embedded = model.embedding_positions
    return Backbone(
        vocab_size=vocab_size,
        width=width,
        layers=knobs.get("layers", config.size.layers),
        mixers=[_constructor(config, "mixer", block.mixer, knobs) for block in model.blocks],
        feed_forwards=[
            _constructor(config, "feed_forward", part, knobs) if part else None
            for part in (block.feed_forward for block in model.blocks)
        ],
        short_convs=[block.short_conv for block in model.blocks],
        positions=embedded.load()(width) if embedded else None,
        norm=model.norm,
        norm_eps=model.norm_eps,
        embedding_norm=model.embedding_norm,
        parallel_residual=model.parallel_residual,
        post_norm=model.post_norm,
        embedding_scale=model.embedding_scale,
        logit_softcap=model.logit_softcap,
        tied=model.tied,
        sink_token=model.sink_token,
        checkpoint_activations=config.checkpoint_activations,
        built=built,
    )


def _constructor(
    config: TrainConfig, slot: str, part: Component, knobs: Mapping[str, int]
) -> Callable[..., Any]:
    """The part's class with its arguments and those knobs of its slot that it takes.

    UserError where it refuses an argument, named as the option that sets it.
    """
    taken = constructor_parameters(part.target) or []
    widths: dict[str, Any] = {
        name: knobs[f"{slot}.{name}"] for name in taken if f"{slot}.{name}" in knobs
    }
    if config.objective == "masked" and slot == "mixer":
        widths["causal"] = False
    cls = part.load()

    def constructed(**place: int) -> Mixer:
        try:
            return cls(**widths, **place)
        except (TypeError, ValueError) as error:
            message = _reason(error)
            if not (name := re.match(r"([\w.]+)=", message)):
                raise
            given = part.options.get(name[1])
            owner = "size" if name[1] == "heads" and given == config.size.heads else f"model.{slot}"
            raise below(owner, ValueError(message)) from error

    return constructed


def _reference_parameters(size: Size, vocab_size: int) -> int:
    """Those of the transformer of that size, whose layers are all alike."""

    def parameters(layers: int) -> int:
        with torch.device("meta"):
            return count_parameters(
                Backbone(
                    vocab_size=vocab_size,
                    width=size.width,
                    layers=layers,
                    mixers=[partial(SoftmaxAttention, heads=size.heads)],
                    feed_forwards=[SwiGLU],
                )
            )

    one, two = parameters(1), parameters(2)
    return one + (size.layers - 1) * (two - one)


def _match(config: TrainConfig, vocab_size: int) -> dict[str, int]:
    cycle, goal = len(config.model.blocks), _reference_parameters(config.size, vocab_size)

    def cost(knobs: Mapping[str, int]) -> int:
        with torch.device("meta"):
            return count_parameters(assemble(config, vocab_size, knobs))

    knobs: dict[str, int] = {}
    for knob in config.model.match:
        if knob == "layers":
            at = {layers: cost({"layers": layers}) for layers in (cycle, 2 * cycle)}
            per_layer = (at[2 * cycle] - at[cycle]) / cycle
            layers = max(1, round(cycle + (goal - at[cycle]) / per_layer))
            knobs["layers"] = layers
        elif not _has(config, knob, knobs):
            continue
        elif abs(cost(knobs) - goal) > TOLERANCE * goal:
            knobs[knob] = _fit_width(lambda w, k=knob: cost({**knobs, k: w}), goal)
    found = cost(knobs)
    if abs(found - goal) > TOLERANCE * goal:
        if (layers := knobs.get("layers", cycle)) < cycle:
            refuse_pattern(config, layers)
        refuse_path(
            f"model={config.model.name} match=params",
            f"cannot be sized to the reference's {goal:,} parameters within 1 % (nearest "
            f"{found:,})",
            "Use match=none, which trains it at its own size",
        )
    return knobs


def refuse_pattern(config: TrainConfig, layers: int) -> NoReturn:
    """Raise the UserError for a hybrid whose pattern is longer than its `layers`."""
    pattern, name = len(config.model.blocks), config.model.name
    matched = config.match == "params" and "layers" in config.model.match
    refuse_path(
        f"size={config.size.name} match=params" if matched else f"size.layers={layers}",
        f"the {layers} layers must hold the whole pattern of model={name}, which has {pattern}",
        f"Use a larger size, a pattern of at most {layers} layers, or match=none "
        f"size.layers={pattern}",
    )


def _has(config: TrainConfig, knob: str, knobs: Mapping[str, int]) -> bool:
    """Whether one of the layers has the part whose width `knob` names."""
    slot = knob.rpartition(".")[0]
    layers, blocks = knobs.get("layers", config.size.layers), config.model.blocks
    return any(getattr(block, slot) is not None for block in blocks[:layers])


def _fit_width(cost: Callable[[int], int], goal: int) -> int:
    """The width whose cost meets the goal, as round a number as the tolerance allows."""
    low, slope = cost(16), (cost(32) - cost(16)) / 16  # parameters are linear in a width
    if not slope:
        refuse_path(
            "match=params",
            "no layer has the width that the model's `match` names",
            "Name another in the model's YAML file, or use match=none",
        )
    width = 1
    for step in STEPS:
        width = max(step, step * round((16 + (goal - low) / slope) / step))
        if abs(cost(width) - goal) <= TOLERANCE * goal:
            break
    return width
