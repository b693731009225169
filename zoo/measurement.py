"""What identifies a measurement: one place for the run folder, the evaluation and the report.

A row of `results.jsonl` answers a question about the weights in its folder. Two rows are the same
measurement where the text, how it was read and the question agree; what came out does not count.
"""

import json
from collections.abc import Mapping
from typing import Any

READ = ("fingerprint", "extension_settings", "device", "dtype", "threads")  # what, how, by what
# Beside the task, what its settings come to; a row lists in `question` the fields that hold it.
# Rows of before it did are read by these.
QUESTIONS = {
    "perplexity": (
        *("split", "documents", "unit", "units", "stride", "protocol", "length", "windows"),
    ),
    "passkey": (
        *("split", "documents", "unit", "count", "depths", "candidates", "digits", "key_seed"),
        "length",
    ),
    "stream": ("split", "length", "chunk"),
    "speed": ("phase", "repeats", "decode_tokens", "length"),
    "longrope": (
        *("split", "length", "units", "searched", "texts", "times", "magnitude", "population"),
        *("mutations", "crossovers", "parents", "search_seed", "most"),
    ),
}


def question(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row that say what was asked, its task among them."""
    names = row.get("question") or QUESTIONS.get(str(row.get("task")), ("length",))
    return {name: row.get(name) for name in ("task", *names)}


def replaces(later: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    """Whether a row measured again what an earlier one had measured; a field that the earlier one
    lacks, being of an older kind, tells nothing apart."""
    asked = {name: later.get(name) for name in READ} | question(later)
    return all(earlier.get(name, value) == value for name, value in asked.items())


def agrees(row: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether the row has these fields, as JSON would have written them."""
    return all(row.get(name) == json.loads(json.dumps(value)) for name, value in part.items())
