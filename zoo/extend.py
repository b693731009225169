"""Gives a trained model another reach: rotary scalings and attention remaps, no new weights."""

from functools import partial

from zoo.attention.reach import Reach, Scaling
from zoo.backbone import Backbone
from zoo.errors import UserError
from zoo.mixers.softmax import SoftmaxAttention
from zoo.options import constructor_parameters
from zoo.positions.rope import inverse_frequencies
from zoo.schema import Extension


def extend(model: Backbone, extension: Extension, trained_length: int) -> Backbone:
    """The model with every rotary attention under `extension`, in place.

    Lengths are tokens. Raises UserError in one line where the extension does not apply to the
    model or its settings do not go together.
    """
    if extension.scaling is None and extension.reach is None:
        return model
    if any(isinstance(half, SoftmaxAttention) and half.reach for half in model.halves()):
        raise UserError(
            f"extension={extension.name}: this model was fine-tuned under an extension of its own, "
            "which extension=none measures"
        )
    mixers = [half for half in model.halves() if isinstance(half, SoftmaxAttention)]
    mixers = [mixer for mixer in mixers if mixer.positions == "rope"]
    if not mixers:
        raise UserError(
            f"extension={extension.name} acts on rotary positions, and this model has none: "
            "extension=none applies to it"
        )
    for mixer in mixers:
        mixer.reach = _reach(mixer, extension, extension.original_length or trained_length)
    return model


def _reach(mixer: SoftmaxAttention, extension: Extension, original_length: int) -> Reach:
    scaling, by_length = _scaling(mixer, extension, original_length)
    if extension.reach is None:
        return Reach(scaling, bucket=original_length if by_length else None)
    takes = constructor_parameters(extension.reach.target) or []
    more = {"original_length": original_length} if "original_length" in takes else {}
    if by_length:
        if "bucket" not in takes:
            raise UserError(
                f"extension={extension.name} keeps a window of the text: it composes with scalings "
                "that do not depend on the length"
            )
        more["bucket"] = original_length
    try:
        return extension.reach.load()(scaling, **more)
    except ValueError as error:
        raise UserError(f"extension={extension.name}: {error}") from error


def _scaling(
    mixer: SoftmaxAttention, extension: Extension, original_length: int
) -> tuple[Scaling, bool]:
    """Length -> (inverse frequencies, attention factor), and whether the length matters."""
    width, base = mixer.head_width, mixer.rope_base
    if extension.scaling is None:
        return (lambda _: (inverse_frequencies(width, base), 1.0)), False
    scaled = partial(
        extension.scaling.load(),
        width=width,
        base=base,
        factor=extension.factor,
        original_length=original_length,
    )
    try:
        within, beyond = (scaled(length=times * original_length) for times in (1, 2))
    except ValueError as error:
        raise UserError(f"extension={extension.name}: {error}") from error
    if within == beyond:
        return (lambda _: within), False
    return (lambda length: scaled(length=length)), True
