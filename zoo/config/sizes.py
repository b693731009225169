"""Numbers as people write them: 64k, 1M, 2**16, 65_536."""

import re
from typing import Any

SUFFIXES = {"k": 2**10, "M": 2**20, "G": 2**30}
SIZE = re.compile(r"(?P<count>\d+)(?P<suffix>[kKMG])|(?P<base>\d{1,4})\*\*(?P<power>\d{1,2})")
PLAIN = re.compile(r"[+-]?\d+(_\d+)*")


def read_sizes(value: Any) -> Any:
    """`value` with every string such as 64k or 2**16 in it as the number it means."""
    if isinstance(value, list):
        return [read_sizes(item) for item in value]
    if isinstance(value, dict):
        return {key: read_sizes(item) for key, item in value.items()}
    if isinstance(value, str) and (match := SIZE.fullmatch(value)):
        if match["suffix"]:
            return int(match["count"]) * SUFFIXES[match["suffix"].replace("K", "k")]
        return int(match["base"]) ** int(match["power"])
    return value


def read_count(value: Any) -> int:
    """A whole number from what YAML or the command line holds: 512, 64k, 1M, 65_536, 2**16."""
    value = read_sizes(value)
    if isinstance(value, str) and len(value) < 100 and PLAIN.fullmatch(value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():  # neither nan nor inf
        return int(value)
    raise ValueError("must be a whole number (such as 512, 64k, 1M, 65_536 or 2**16)")
