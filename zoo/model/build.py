"""From a checked configuration to a model, sized so that arms can be compared.

`match=params` makes every arm cost what the transformer of that size costs, by the knobs its YAML
lists (`match: [layers, mixer.inner_width]`): the number of layers first, to the nearest, then a
width to within 1 %.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo.config.introspect import constructor_parameters
from zoo.config.schema import Part, Size, TrainConfig
from zoo.errors import UserError
from zoo.mixers.feed_forward import SwiGLU
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.backbone import Backbone
from zoo.positions.absolute import Learned, Sinusoidal

TOLERANCE = 0.01  # arms of a comparison differ by at most this share of the parameters
STEPS = (16, 8, 4, 2, 1)  # widths are multiples of the first of these that meets the tolerance
EMBEDDED = {"sinusoidal": Sinusoidal, "learned": Learned}


def build_model(config: TrainConfig, vocab_size: int) -> tuple[Backbone, dict[str, int]]:
    """The configured model, and the knobs that `match` turned: {"layers": 7, ...}.

    Raises UserError where an architecture refuses an argument, or where no setting of the knobs
    meets the reference within 1 %.
    """
    knobs: dict[str, int] = {}
    try:
        if config.match == "params":
            knobs = _match(config, vocab_size)
        model = assemble(config, vocab_size, knobs)
        _check_window(model, config.seq_len)
        if config.objective == "causal" and not model.causal:
            kinds = sorted({type(half).__name__ for half in model.halves() if not half.causal})
            raise ValueError(
                f"{', '.join(kinds)} declares causal=False, so it cannot be trained or scored left "
                "to right. objective=masked trains encoders"
            )
        return model, knobs
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # an architecture's own word on its arguments
        reason = str(error).splitlines()[0]
        if "Overflow when unpacking" in reason:
            reason = "its sizes are larger than a tensor can be. Use smaller ones."
        raise UserError(f"model={config.model.name}: {reason}") from error


def _check_window(model: Backbone, window: int) -> None:
    if model.max_length is not None and window > model.max_length:
        raise ValueError(f"it reads at most {model.max_length} tokens and seq_len is {window}")
    if window < model.min_window:
        raise ValueError(
            f"windows of seq_len={window} tokens leave some of its parameters without a gradient; "
            f"it needs {model.min_window} (its blocks, landmarks or segments)"
        )


def count_parameters(model: nn.Module) -> int:
    """Trained numbers, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def assemble(config: TrainConfig, vocab_size: int, knobs: Mapping[str, int]) -> Backbone:
    """The configured model with the layers and widths that `knobs` name in place of its own."""
    model, width = config.model, config.size.width
    causal, positions = config.objective == "causal", None
    if model.embedding_positions:
        kind = EMBEDDED[model.embedding_positions]
        positions = kind(width=width, max_length=model.max_length)
    return Backbone(
        vocab_size=vocab_size,
        width=width,
        layers=knobs.get("layers", config.size.layers),
        mixers=[_constructor("mixer", block.mixer, knobs, causal) for block in model.blocks],
        feed_forwards=[
            _constructor("feed_forward", block.feed_forward, knobs) if block.feed_forward else None
            for block in model.blocks
        ],
        positions=positions,
        checkpoint_activations=config.checkpoint_activations,
    )


def _constructor(
    slot: str, part: Part, knobs: Mapping[str, int], causal: bool = True
) -> Callable[..., Any]:
    """The part's class with its arguments and those knobs of its slot that it takes."""
    taken = constructor_parameters(part.target) or []
    widths: dict[str, Any] = {
        name: knobs[f"{slot}.{name}"] for name in taken if f"{slot}.{name}" in knobs
    }
    if not causal:
        widths["causal"] = False
    return partial(part.load(), **widths)


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
            raise UserError(told_pattern(config, layers))
        raise UserError(
            f"model={config.model.name}, match=params: cannot be sized to the reference's {goal:,} "
            f"parameters within 1 % (nearest {found:,}). match=none trains it at its own size."
        )
    return knobs


def told_pattern(config: TrainConfig, layers: int) -> str:
    """Why a hybrid of so few `layers` is none, and what to do."""
    pattern, size = len(config.model.blocks), config.size.name
    matched = config.match == "params" and "layers" in config.model.match
    how = f"size={size}: match=params makes {layers} layers of it" if matched else ""
    return (
        f"{how or f'size.layers={layers}'}, and the pattern of model={config.model.name} has "
        f"{pattern}: its last models would be in none. Use a larger size, a pattern of at most "
        f"{layers} layers, or match=none size.layers={pattern}."
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
        raise UserError("match=params: no layer has the width that the model's `match` names")
    width = 1
    for step in STEPS:
        width = max(step, step * round((16 + (goal - low) / slope) / step))
        if abs(cost(width) - goal) <= TOLERANCE * goal:
            break
    return width
