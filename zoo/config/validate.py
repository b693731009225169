"""From a composed tree to the typed configuration, or one line on what is wrong with it."""

import re
from collections.abc import Sequence
from types import NoneType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from zoo.config.domains import typed
from zoo.config.schema.eval import EvalConfig
from zoo.config.schema.train import TrainConfig
from zoo.config.tree import flat
from zoo.errors import UserError, refuse, refuse_unknown, sentence, shown

Config = TypeVar("Config", TrainConfig, EvalConfig)


MISSING = "???"  # of a value that a YAML file leaves to the command


def validate(schema: type[Config], tree: dict[str, Any], partly: bool = False) -> Config:
    """The typed configuration, or one line about the first thing wrong with it.

    A value that is still to be given is refused last: to give it mends nothing where the rest does
    not go together. `partly`: not at all, by `refuse_missing` once more is known; what comes of the
    configuration until then must not depend on those values.
    """
    try:
        config = schema.model_validate(_without_missing(tree))
    except ValidationError as error:
        raise UserError(_explain(error.errors(include_url=False), schema)) from None
    if not partly:
        refuse_missing(schema, tree)
    return config


def refuse_missing(schema: type[BaseModel], tree: dict[str, Any]) -> None:
    """Refuse a value that was not given and has no default."""
    for path, value in flat(tree).items():
        if value == MISSING:
            field, owner = None, schema
            for name in path.split("."):
                field = getattr(owner, "model_fields", {}).get(name)
                owner = field.annotation if field else None
            about = f" ({field.description})" if field and field.description else ""
            refuse(_as_written(path), "", f"must be given{about}")


def _without_missing(tree: Any) -> Any:
    """The tree without the values that are still to be given."""
    if isinstance(tree, list):
        return [_without_missing(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    known = {key: _without_missing(value) for key, value in tree.items() if value != MISSING}
    if "scaling" in tree and tree.get("factor") == MISSING:
        known["factor"] = 1  # an extension's, which has none by default
    return known


def _as_written(path: str) -> str:
    """A place in the configuration as its option is written."""
    return re.sub(r"^model\.blocks\.\d+", "model", path)


def check_option(schema: type[BaseModel], path: str, value: Any) -> None:
    """Refuse the value of one option, by its dotted path, as `validate` refuses it."""
    *sections, last = path.split(".")
    owner: Any = schema
    for name in sections:
        owner = owner.model_fields[name].annotation
    field = owner.model_fields[last]
    try:
        TypeAdapter(field.rebuild_annotation()).validate_python(value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        for one in errors:
            one["loc"] = (*sections, last, *one["loc"])
        raise UserError(_explain(errors, schema)) from None


def _explain(errors: list[ErrorDetails], schema: type[BaseModel]) -> str:
    error = errors[0]
    path = _as_written(".".join(str(key) for key in error["loc"]))
    given, context = error["input"], error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        parent: Any = schema
        for key in error["loc"][:-1]:
            field = getattr(parent, "model_fields", {}).get(key)
            parent = field.annotation if field else None
        names = list(getattr(parent, "model_fields", {}))
        refuse_unknown(f"{path}={shown(given)}", "option", error["loc"][-1], names)
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):  # of a list
        lacking = [e for e in errors if e["loc"][:-1] == error["loc"][:-1]]
        count = len(given) + len(lacking)
        return sentence(f"{path.rpartition('.')[0]}={shown(given)}", f"must have {count} values")
    if error["type"] == "missing":
        return sentence(path, "is missing", "Add it to the YAML file, or give its value")
    if isinstance(cause := context.get("error"), UserError):
        named = re.match(r"\w+=", str(cause)) is not None  # it begins with the option's last name
        return f"{path}.{cause}" if named and path else f"{path}: {cause}" if path else str(cause)
    said = (
        str(cause) if cause else re.sub("^(Input|String|List|Tuple) should", "must", error["msg"])
    )
    rule = re.sub(" after validation, not [0-9]+$", "", said).removesuffix(".")
    if may_be_null(schema, error["loc"]) and "null" not in rule:
        rule += ", or null"
    return sentence(f"{path}={typed(given)}", rule)


def may_be_null(schema: type[BaseModel], place: Sequence[int | str]) -> bool:
    """Whether the option at a place, as errors name it, may be null."""
    kind, described = schema, ""
    for key in place:
        field = getattr(kind, "model_fields", {}).get(key)
        if field is None:  # an element of a list, or the branch of a union
            break
        kind, described = field.annotation, field.description or ""
        inner = [one for one in get_args(kind) if one is not NoneType]
        if len(inner) == 1 and hasattr(inner[0], "model_fields") and key != place[-1]:
            kind = inner[0]
    return NoneType in get_args(kind) or "null: " in described


def plain(config: BaseModel) -> dict[str, Any]:
    """The configuration as plain containers, as `config.yaml` holds it."""
    return config.model_dump(mode="json", by_alias=True)
