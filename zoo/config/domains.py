"""The values that an annotated argument may have.

A constructor declares them where it declares the type. They are checked before anything heavy is
imported, from the source (zoo.config.introspect), and again when a mixer is built:

    state_size: Positive = 16                        an integer >= 1
    conv_width: Annotated[int, Range(2, 8)] = 4      an integer from 2 to 8
    epsilon: Annotated[float, Range(above=0)]        a number > 0
    sharing: Literal["none", "kv"] = "kv"            none or kv
    positions: Callable[..., Any] = Rope             a class of the zoo by its _target_
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

import yaml

from zoo.errors import nearest, numeral, refuse, shown


class Range(NamedTuple):
    """Numbers from `least` to `most`, both included, and greater than `above`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most and value > self.above

    def __str__(self) -> str:
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"from {self.least} to {self.most}"
        bounds = [f">= {self.least}"] if math.isfinite(self.least) else []
        bounds += [f"> {self.above}"] if math.isfinite(self.above) else []
        bounds += [f"<= {self.most}"] if math.isfinite(self.most) else []
        return " and ".join(bounds)


class Several:
    """Marks a list of at least one value."""

    @staticmethod
    def holds(value: Sequence[Any]) -> bool:
        return len(value) > 0


Positive = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
MAX_WINDOW = 2**20  # keys that a layer may see of a text
Window = Annotated[int, Range(1, MAX_WINDOW)]
RopeBase = Annotated[float, Range(above=1)]  # rotary frequencies fall from 1 by its powers

# Of measurements: what is counted, how long texts are, and what random numbers start from.
MAX_COUNT, MAX_LENGTH = 2**20, 2**40
Count = Annotated[int, Range(1, MAX_COUNT)]
Lengths = Annotated[Sequence[Annotated[int, Range(1, MAX_LENGTH)]], Several]
Seed = Annotated[int, Range(0, 2**32 - 1)]

LARGEST = 10**15  # of an integer: beyond, sizes overflow before memory is allocated
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
NAMES[Path] = "a path"
LISTS = (Sequence, list, tuple)


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` is one that `kind` allows; a kind that no option has allows all."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Annotated:
        rules = [item for item in inner[1:] if isinstance(item, Range) or item is Several]
        return fits(value, inner[0]) and all(one.holds(value) for one in rules)
    if origin is Literal:
        return value in inner
    if origin in LISTS:
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value)
    if origin is Callable:  # of a configuration: what `_target_` names, with its options
        return callable(value) or (isinstance(value, Mapping) and "_target_" in value)
    if kind in (None, NoneType):
        return value is None
    if kind is int:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        return whole and abs(int(value)) < LARGEST
    if kind is float:  # neither nan nor infinite
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= (LARGEST if isinstance(value, int) else sys.float_info.max)
    return isinstance(value, kind) if kind in (bool, str, Path) else True


def in_words(kind: Any) -> str:
    """What `kind` allows, such as "an integer >= 1 or null"."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return listed([in_words(one) for one in inner])
    if origin is Annotated:
        words = " ".join([in_words(inner[0]), *(str(x) for x in inner[1:] if isinstance(x, Range))])
        return words.replace("a list,", "one or more,") if Several in inner[1:] else words
    if origin is Literal:
        return listed([str(one) for one in inner])
    if origin is Callable:
        return "a class of the zoo by its _target_"
    if origin in LISTS:
        return f"a list, each {in_words(inner[0])}"
    return NAMES.get(NoneType if kind is None else kind, "of its type")


def refusal(value: Any, kind: Any, default: Any = ...) -> tuple[str, str]:
    """The rule of a value that `kind` does not allow; the nearest choice and the default."""
    huge = isinstance(value, int) and abs(value) >= LARGEST
    rule = f"must be {in_words(kind)}{' of at most 15 digits' if huge else ''}"
    guess = nearest(str(value), _choices(kind))
    known = default is not ... and not callable(default)  # as in the source
    advice = f"The default is {shown(default)}" if known else ""
    hint = f"Did you mean {guess!r}? " if guess and advice else ""
    return rule, hint + advice


def typed(value: Any) -> str:
    """The value so that 2.0 differs from 2, and the text 'true' from the switch."""
    if isinstance(value, float):
        return numeral(value)
    with suppress(yaml.YAMLError):  # what is no YAML is read as nothing else
        if isinstance(value, str) and yaml.safe_load(value or "''") != value:
            return shown(f"'{value}'")
    return shown(value)


def refuse_kind(option: str, value: Any, kind: Any, default: Any = ...) -> NoReturn:
    """Refuse a value that `kind` does not allow, shown so that its type is seen."""
    rule, advice = refusal(value, kind, default)
    of_type = isinstance(value, float) and "a number" in rule  # so that its type is none of it
    refuse(option, value if of_type else typed(value), rule, advice)


def check(option: str, value: Any, kind: Any, default: Any = ...) -> None:
    """Refuse a value that `kind` does not allow, as the value of `option`."""
    if not fits(value, kind):
        refuse_kind(option, value, kind, default)


def _choices(kind: Any) -> list[str]:
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return [str(one) for one in inner]
    return [name for one in inner for name in _choices(one)]


def listed(words: Sequence[str]) -> str:
    """The words as a sentence lists them: "a, b or c"."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
