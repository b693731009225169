"""What the values of options may be."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from zoo.config.sizes import read_count


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _switch_or_tokens(value: Any) -> Any:
    try:
        tokens = value if isinstance(value, bool) else read_count(value)
    except ValueError:
        tokens = 0
    if tokens is not False and not 1 <= tokens <= MANY:
        raise ValueError(f"must be true, false or a number of tokens from 1 to {MANY}")
    return tokens


def spelt(pattern: str, rule: str) -> BeforeValidator:
    """That a word matches a pattern; `rule` says in words how it must be spelt."""

    def check(value: Any) -> Any:
        if value is not None and not (isinstance(value, str) and re.fullmatch(pattern, value)):
            raise ValueError(rule)
        return value

    return BeforeValidator(check)


MANY = 2**48  # steps, tokens or windows; memory is checked later
Positive = Annotated[int, BeforeValidator(read_count), Field(ge=1, le=MANY)]
Natural = Annotated[int, BeforeValidator(read_count), Field(ge=0, le=MANY)]
Number = Annotated[float, BeforeValidator(_not_bool)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Switch = Annotated[bool, Field(strict=True)]
SwitchOrTokens = Annotated[bool | int, BeforeValidator(_switch_or_tokens)]
Seed = Annotated[int, BeforeValidator(read_count), Field(ge=0, lt=2**32)]  # as NumPy seeds
Threads = Annotated[Positive, Field(le=1024)]  # far more and the C library aborts
Path = Annotated[str, Field(min_length=1)]
ShortConv = Annotated[int, BeforeValidator(read_count), Field(ge=2, le=8)]
NAME = "must begin with a letter or digit and go on with letters, digits and ._+- alone"
Name = Annotated[str, spelt(r"[A-Za-z0-9][\w.+-]*", NAME)]
