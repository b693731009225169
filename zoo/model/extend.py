"""Gives a model another reach: rotary scalings, attention remaps, training positions of a longer
text. New weights only where frequencies are trained (CLEX)."""

from collections.abc import Callable
from functools import partial

from torch import Generator, Tensor

from zoo.attention.pattern import Reach, Scaling
from zoo.config.applicability import LINEAR, ROTARY, check_applies
from zoo.config.introspect import constructor_parameters
from zoo.config.schema import Extension
from zoo.data.loader import DrawPositions
from zoo.errors import UserError, below
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.backbone import Backbone
from zoo.positions.absolute import Learned, Sinusoidal
from zoo.positions.rope import inverse_frequencies
from zoo.positions.scaling import temperature

EMBEDDED = {Sinusoidal: "sinusoidal", Learned: "learned"}


def extend(model: Backbone, extension: Extension, trained_length: int) -> Backbone:
    """The model with every attention that it acts on under `extension`, in place.

    One tuned under LongRoPE may be read under LongRoPE with factors searched for it anew. Lengths
    are tokens. Raises UserError in one line where the extension does not apply to the model or its
    settings do not go together.
    """
    kinds = check_applies(extension, _positions(model), model.extended)
    if not kinds:
        return model
    original_length = extension.original_length or trained_length
    if extension.positions is not None:
        _check_places(model, extension, original_length, trained_length)
    if kinds == ROTARY and _is_trained(extension):
        _train_frequencies(model, extension, original_length)
    elif kinds == ROTARY:
        for mixer in rotary_mixers(model):
            mixer.reach = _reach(mixer, extension, original_length)
    elif kinds == LINEAR:
        _interpolate(model, extension)
    model.extended = extension.name
    return model


def places(extension: Extension, seq_len: int) -> DrawPositions | None:
    """Where the tokens of training windows stand, drawn step by step; None: at 0, 1, 2 .."""
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
        raise UserError(
            f"extension={extension.name} places windows of seq_len={seq_len} tokens in a text of "
            f"{longest}, {extension.factor:g} times {original_length}: ask for a larger factor"
        )
    if limit is not None and limit < longest:
        raise UserError(
            f"extension={extension.name} places tokens up to {longest}, and this model has {limit} "
            f"positions: model.max_length={longest} gives it as many"
        )


def _positions(model: Backbone) -> set[str]:
    """The kinds of positions that the model's layers and its embedding have."""
    kinds = {one.positions for one in model.sublayers() if isinstance(one, SoftmaxAttention)}
    return kinds | {EMBEDDED[type(model.positions)]} if model.positions is not None else kinds


def rotary_mixers(model: Backbone) -> list[SoftmaxAttention]:
    return _attending(model, "rope")


def _attending(model: Backbone, positions: str) -> list[SoftmaxAttention]:
    mixers = [one for one in model.sublayers() if isinstance(one, SoftmaxAttention)]
    return [mixer for mixer in mixers if mixer.positions == positions]


def _is_trained(extension: Extension) -> bool:
    """Whether the scaling is a module, whose frequencies are learned."""
    return extension.scaling is not None and isinstance(extension.scaling.load().func, type)


def _train_frequencies(model: Backbone, extension: Extension, original_length: int) -> None:
    """One module of frequencies for all rotary layers, trained with the model's weights."""
    assert extension.scaling is not None
    if extension.positions is None:
        raise UserError(
            f"extension={extension.name}: its scaling is trained, with windows that are placed: "
            "python train.py finetune=<run> extension=clex"
        )
    mixers = rotary_mixers(model)
    if len({(mixer.head_width, mixer.rope_base) for mixer in mixers}) > 1:
        raise UserError(f"extension={extension.name} needs one width and base in all rotary layers")
    try:
        frequencies = extension.scaling.load()(
            width=mixers[0].head_width,
            base=mixers[0].rope_base,
            factor=extension.factor,
            original_length=original_length,
        )
    except (TypeError, ValueError) as error:  # a word where a number should be
        raise UserError(f"extension={extension.name}: {error}") from error
    model.frequencies = frequencies
    for mixer in mixers:
        mixer.reach = Reach(frequencies, bucket=original_length)


def _interpolate(model: Backbone, extension: Extension) -> None:
    """Every slope divided by the factor."""
    assert extension.scaling is not None
    if extension.attention or extension.positions or extension.scaling.options:
        raise UserError(
            f"extension={extension.name}: slopes are interpolated by extension.factor alone, "
            "without a remap, positions or further options"
        )
    for mixer in _attending(model, "alibi"):
        mixer.slope_factor = extension.factor


def _reach(mixer: SoftmaxAttention, extension: Extension, original_length: int) -> Reach:
    scaling, by_length = _scaling(mixer, extension, original_length)
    if extension.attention is None:
        return Reach(scaling, bucket=original_length if by_length else None)
    takes = constructor_parameters(extension.attention.target) or []
    more = {"original_length": original_length} if "original_length" in takes else {}
    if by_length:
        if "bucket" not in takes:
            raise UserError(
                f"extension={extension.name} keeps a window of the text: it composes with scalings "
                "that do not depend on the length"
            )
        more["bucket"] = original_length
    try:
        return extension.attention.load()(scaling, **more)
    except ValueError as error:
        of_length = str(error).startswith("original_length=")
        raise below("extension" if of_length else "extension.attention", error) from error


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
    except (TypeError, ValueError) as error:  # a word where a number should be
        raise UserError(f"extension={extension.name}: {error}") from error
    if all_dim := extension.scaling.options.get("mscale_all_dim"):
        # DeepSeek multiplies all scores by its square: here q and k of every channel carry it.
        inv_freq, magnitude = within
        within = beyond = inv_freq, magnitude * temperature(extension.factor, all_dim)
    if within == beyond:
        return (lambda _: within), False
    return (lambda length: scaled(length=length)), True
