"""Nested containers by dotted path."""

from collections.abc import Iterator, Sequence
from typing import Any


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything that is not a dict."""
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """{dotted path: value} of everything in `tree` that is neither a dict nor a list of dicts."""
    if isinstance(tree, list) and any(isinstance(item, dict | list) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {path: tree}
    parts = (flat(value, f"{path}.{key}" if path else str(key)) for key, value in tree.items())
    return {name: value for part in parts for name, value in part.items()}


def within(path: str, names: Sequence[str]) -> bool:
    """Whether `path` is one of `names` or below one."""
    return any(path == name or path.startswith(f"{name}.") for name in names)
