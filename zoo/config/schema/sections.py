"""What the sections of a configuration are: named options, open ones, and parts of the zoo."""

import functools
import importlib
from collections.abc import Mapping
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
from zoo.errors import refuse, refuse_unknown, shown


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
        """What it names, its arguments bound; imports the module."""
        module, _, name = self.target.rpartition(".")
        options = {
            key: Component.model_validate(value).load() if _is_part(value) else value
            for key, value in self.options.items()
        }
        return functools.partial(getattr(importlib.import_module(module), name), **options)


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
