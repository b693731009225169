"""The rescale factors that a LongRoPE search has left in a run's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import refuse, refuse_path


def with_found_factors(extension: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the extension, where it is LongRoPE without factors, with those found for the run.

    Args:
        extension: its settings, as its YAML has them.
        folder: the run's.

    Raises:
        UserError: the search's file is damaged, or was made under another `magnitude`.
    """
    composition = extension.get("composition", "replace")
    scaling, file = extension["scaling"], folder / factors_file(extension["factor"], composition)
    if not isinstance(scaling, dict) or not file.is_file():
        return {**extension}
    if scaling.get("long_factors", ...) is not None:  # no LongRoPE, or its factors are given
        return {**extension}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["found"]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        refuse_path(
            file, f"is damaged ({reason})", "Remove it and search again with task=longrope."
        )
    magnitude = found["magnitude"]
    if scaling.get("magnitude") != magnitude:
        rule = f"{file} was searched under {magnitude}"
        advice = f"Use extension.scaling.magnitude={magnitude}."
        refuse("extension.scaling.magnitude", scaling.get("magnitude"), rule, advice)
    return {**extension, "scaling": {**scaling, **found}}


def factors_file(factor: float, composition: str = "replace") -> str:
    """Return the name, in a run's folder, of the search for texts of `factor` trained lengths."""
    on_top = "-on-top" if composition == "on_top" else ""
    return f"longrope{on_top}-x{factor:g}.json"
