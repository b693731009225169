"""What a LongRoPE search has left in a run's folder, for the extension that reads under it."""

import json
from collections.abc import Mapping
from typing import Any

from zoo.errors import UserError
from zoo.runs.files import one_line
from zoo.runs.files import replacing as replacing  # part of what a run folder offers
from zoo.runs.folder import RunFolder


def with_found(extension: Mapping[str, Any], folder: RunFolder) -> dict[str, Any]:
    """The extension with the LongRoPE factors that a search has left in the run's folder.

    UserError where that search was of other settings.
    """
    scaling, file = extension["scaling"], folder.path / found_file(extension["factor"])
    if not isinstance(scaling, dict) or not file.is_file():
        return {**extension}
    if scaling.get("long_factors", ...) is not None:  # no LongRoPE, or its factors are given
        return {**extension}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["found"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged: {one_line(error)}") from error
    if scaling.get("magnitude") != found["magnitude"]:
        told = f"{file} was searched under extension.scaling.magnitude={found['magnitude']}"
        raise UserError(f"{told}, not {scaling.get('magnitude')}")
    return {**extension, "scaling": {**scaling, **found}}


def found_file(factor: float) -> str:
    """Where in a run's folder a LongRoPE search keeps itself and what it found."""
    return f"longrope-x{factor:g}.json"
