"""What the sections of a configuration are: named options, open ones, and parts of the zoo."""

import functools
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from zoo.config.introspect import check_types, is_target, target_parameters
from zoo.config.schemes import scheme
from zoo.config.sizes import read_sizes
from zoo.errors import UserError, place_of, refuse, refuse_unknown, sentence, shown


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    # Options that are left out of what is written at these values, which change nothing: runs of
    # before such an option existed keep the names that are made from what is written.
    unwritten: ClassVar[Mapping[str, Any]] = {}

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unwritten = self.unwritten
        return {k: v for k, v in write(self).items() if k not in unwritten or unwritten[k] != v}


class OpenSection(Section):
    """A section whose further keys belong to the code that reads it."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, value: Any) -> Any:
        return read_sizes(value)

    @property
    def options(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


class Component(OpenSection):
    """A constructor or function of the zoo and its arguments: `_target_` and whatever it takes."""

    home: ClassVar[str] = "zoo."
    target: str = Field(alias="_target_")

    @model_validator(mode="after")
    def _known(self) -> "Component":
        # A run folder may come from anywhere: it names what this package defines, nothing else.
        if not (is_target(self.target) and self.target.startswith(self.home)):
            refuse("_target_", self.target, f"must be in {self.home}*")
        allowed = target_parameters(self.target)
        for name in self.options if allowed is not None else ():
            if name not in (allowed or []):
                given = f"{name}={shown(self.options[name])}"
                refuse_unknown(given, "option", name, allowed or [])
        check_types(self.target, self.options)
        if isinstance(self.options.get("positions"), dict):
            scheme(self.options["positions"], "positions")
        return self

    def load(self) -> functools.partial[Any]:
        """What it names, its arguments bound. UserError where its module cannot be imported."""
        name, found = self.target.rpartition(".")[2], module_of(self.target)
        options = {
            key: Component.model_validate(value).load() if _is_part(value) else value
            for key, value in self.options.items()
        }
        return functools.partial(getattr(found, name), **options)


def module_of(target: str) -> ModuleType:
    """Import the module of a target. UserError, with the line that fails, where it cannot be."""
    try:
        return importlib.import_module(target.rpartition(".")[0])
    except Exception as error:
        what = f"cannot be imported: {type(error).__name__}: {error}{place_of(error)}"
        raise UserError(sentence(f"_target_={target}", what, "Mend that file")) from error


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


class MixerPart(Component):
    home: ClassVar[str] = "zoo.mixers."


class TaskPart(Component):
    home: ClassVar[str] = "zoo.tasks."


class PositionsPart(Component):
    home: ClassVar[str] = "zoo.positions."


class DataPart(Component):
    home: ClassVar[str] = "zoo.data."


class CompressionPart(Component):
    home: ClassVar[str] = "zoo.compression."


class AttentionPart(Component):
    home: ClassVar[str] = "zoo.attention."
