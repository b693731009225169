"""What a class of the zoo declares, read from its source: nothing heavy is imported.

Position schemes are the classes of zoo/positions that derive from `PositionScheme`, one to a file;
`rope` is short for the one of zoo/positions/rope.py.
"""

import ast
import functools
from typing import Any

from zoo.config.introspect import check_types, is_target, lineage, target_parameters
from zoo.config.sizes import read_sizes
from zoo.errors import UserError, below, choose, refuse, refuse_unknown, shown
from zoo.paths import ROOT

HOME = "zoo.positions."
BASE = "zoo.positions.base.PositionScheme"
DEFAULT = "rope"  # of a mixer that is given no scheme


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@functools.cache
def declared(target: str, attribute: str, default: Any = None) -> Any:
    """Return a class attribute's literal, of the class `target` or one that it derives from."""
    for path in lineage(target):
        module, _, name = path.rpartition(".")
        for line in _classes(module)[name].body:
            names = (
                [line.target] if isinstance(line, ast.AnnAssign) else getattr(line, "targets", [])
            )
            if any(isinstance(name, ast.Name) and name.id == attribute for name in names):
                value = line.value  # type: ignore[attr-defined]
                return default if value is None else ast.literal_eval(value)
    return default


@functools.cache
def schemes() -> dict[str, str]:
    """Return the class of every position scheme by its short name."""
    found = {}
    for file in sorted((ROOT / "zoo/positions").glob("*.py")):
        for name in _classes(HOME + file.stem) if file.stem != "base" else ():
            if BASE in lineage(target := f"{HOME}{file.stem}.{name}"):
                found[file.stem] = target
    return found


def short_name(target: str) -> str:
    """Return `rope` for zoo.positions.rope.Rope."""
    return target.split(".")[-2]


def scheme_target(value: Any, option: str) -> str:
    """Return the class of a scheme that is given by its short name or as `_target_`.

    Raises:
        UserError: there is none of that name or class.
    """
    if not isinstance(value, dict):
        known = schemes()
        return known[choose(option, str(value), [*known])]
    target = str(value.get("_target_"))
    if not is_target(target) or BASE not in lineage(target):
        refuse(f"{option}._target_", target, f"must be a position scheme: {', '.join(schemes())}")
    return target


def scheme(value: Any, option: str) -> dict[str, Any]:
    """Return a scheme as `_target_` with options, checked; it may be given by its short name.

    Raises:
        UserError: there is none of that name or class, or it has no such option or value.
    """
    target = scheme_target(value, option)
    given = read_sizes(value) if isinstance(value, dict) else {}
    options = {name: one for name, one in given.items() if name != "_target_"}
    allowed = target_parameters(target) or []
    for name, one in options.items():
        if name not in allowed:
            refuse_unknown(f"{option}.{name}={shown(one)}", "option", name, allowed)
    try:
        check_types(target, options)
    except UserError as error:
        raise below(option, error) from None
    return {"_target_": target, **options}
