"""Reads the LongRoPE factors that a search has written into a run's folder."""

import json
from collections.abc import Mapping
from typing import Any

from zoo.errors import refuse, refuse_path
from zoo.runs.files import one_line
from zoo.runs.folder import RunFolder


def with_found(extension: Mapping[str, Any], folder: RunFolder) -> dict[str, Any]:
    """The extension with the LongRoPE factors that a search has written into the run's folder.

    Raises UserError where the search was of another magnitude, or its file is damaged.
    """
    scaling, file = extension["scaling"], folder.path / found_file(extension["factor"])
    if not isinstance(scaling, dict) or not file.is_file():
        return {**extension}
    if scaling.get("long_factors", ...) is not None:  # no LongRoPE, or its factors are given
        return {**extension}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["found"]
    except (OSError, ValueError, KeyError) as error:
        refuse_path(file, f"is damaged ({one_line(error)})", "Delete it and search again")
    if scaling.get("magnitude") != found["magnitude"]:
        refuse(
            "extension.scaling.magnitude",
            scaling.get("magnitude"),
            f"must be {found['magnitude']}, with which {file} was searched",
        )
    return {**extension, "scaling": {**scaling, **found}}


def found_file(factor: float) -> str:
    """The name of the file in a run's folder that holds a LongRoPE search and its result."""
    return f"longrope-x{factor:g}.json"
