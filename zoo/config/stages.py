"""What the stages of a run's training come to: at which length each of its extensions acts.

A run that is tuned under an extension may be tuned, or measured, under another. Its stages are
(extension, tokens of the training windows), the first first. A remap of attention takes the place
of the one before and goes over whatever frequencies there are. A scaling under `composition`

    replace   scales the model's own frequencies, by its factor of the length that these had
    on_top    scales the frequencies of the stage before, by its factor of the length tuned at
"""

from collections.abc import Sequence

from zoo.config.schema.model import Extension
from zoo.config.schema.train import TrainConfig
from zoo.errors import refuse

Stages = Sequence[tuple[Extension, int]]


def stages_of(config: TrainConfig) -> list[tuple[Extension, int]]:
    """Return the stages that a run's model has gone through, its own the last."""
    earlier = [(stage.extension, stage.seq_len) for stage in config.stages]
    return [*earlier, (config.extension, config.seq_len)]


def trained_length(extension: Extension, seq_len: int) -> int:
    """Return the tokens of the longest text whose positions a stage has trained."""
    if extension.positions is None:
        return seq_len
    return max(seq_len, int((extension.original_length or seq_len) * extension.factor))


def scalings(stages: Stages) -> list[Extension]:
    """Return those whose scalings are in force: the last that replaced, and all on top of it."""
    found: list[Extension] = []
    for extension, _ in stages:
        if extension.scaling is not None:
            found = [*(found if extension.composition == "on_top" else []), extension]
    return found


def original_length(extension: Extension, stages: Stages, seq_len: int) -> int:
    """Return L of an extension after the stages: as given, or as its composition has it.

    Args:
        seq_len: tokens of the windows of a model without stages.
    """
    if extension.original_length is not None:
        return extension.original_length
    scaled = [stage for stage in stages if stage[0].scaling is not None]
    if scaled and extension.scaling is not None and extension.composition == "replace":
        return scaled[0][0].original_length or scaled[0][1]
    return trained_length(*stages[-1]) if stages else seq_len


def pattern_length(stages: Stages) -> int:
    """Return L of the last stage's pattern of attention, which its scaling's may differ from."""
    *before, (extension, seq_len) = stages
    if scalings(before) and extension.scaling and extension.composition == "replace":
        return trained_length(*before[-1])  # of the distances; the other is of the frequencies
    return original_length(extension, before, seq_len)


def tuned_length(extension: Extension, stages: Stages, seq_len: int) -> int:
    """Return the tokens of the windows to tune on under an extension, where they are not given.

    Args:
        stages: those before.
        seq_len: tokens of the windows before; kept where the extension draws positions.
    """
    if extension.positions is not None or extension.name == "none":
        return seq_len
    unset = extension.model_copy(update={"original_length": None})
    return int(original_length(unset, stages, seq_len) * extension.factor)


def check_composition(extension: Extension, stages: Stages, given: Sequence[str] = ()) -> None:
    """Refuse a composition that was `given`, or is not the default, where there is none.

    Raises:
        UserError: the extension has no scaling, or none of the stages has.
    """
    if "extension.composition" not in given and extension.composition == "replace":
        return
    option, advice = "extension.composition", "Leave it out."
    if extension.scaling is None:
        rule = f"is of two scalings, and extension={extension.name} has none"
        refuse(option, extension.composition, rule, advice)
    if not scalings(stages):
        rule = "is of two scalings, and the model was trained under none"
        refuse(option, extension.composition, rule, advice)


def label(extension: Extension, scaling: str | None, below: Stages) -> str:
    """Return an extension in words: its name, its scaling's, its factor, and how it composes.

    Args:
        scaling: the name of the scaling beneath a remap; None where there is none.
        below: the stages before it.
    """
    words = extension.name + (f" over {scaling}" if scaling else "")
    words += f" x{extension.factor:g}" if extension.factor > 1 else ""
    before = [one.name for one in scalings(below)]
    if extension.scaling is None or not before:
        return words
    if extension.composition == "on_top":
        return f"{words} on top of {before[-1]}"
    return f"{words} in place of {' and '.join(before)}"
