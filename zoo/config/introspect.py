"""What constructors and functions take, read from their source: nothing heavy is imported."""

import ast
import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import refuse, refuse_path
from zoo.paths import ROOT


def is_target(text: str) -> bool:
    return re.fullmatch(r"zoo(\.[a-z]\w*)+\.[A-Za-z]\w*", text) is not None


def parameters(file: Path, name: str) -> dict[str, ast.expr | None] | None:
    """What function or class `name` in `file` takes: {name: annotation}.

    None where its source does not tell.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        refuse_path(file, "there is no such file", "Name a class of this package")
    found = [node for node in tree.body if getattr(node, "name", None) == name]
    if not found:
        refuse_path(file, f"there is no {name} in it", "Name a class or function of it")
    node = found[0]
    if isinstance(node, ast.ClassDef):
        inits = [part for part in node.body if getattr(part, "name", None) == "__init__"]
        node = inits[0] if inits else node
    if not isinstance(node, ast.FunctionDef) or node.args.kwarg:
        return None
    given = [arg for arg in node.args.args + node.args.kwonlyargs if arg.arg != "self"]
    return {arg.arg: arg.annotation for arg in given}


# Set by the backbone, by the objective (a causal model must not be asked to look ahead), by what
# extends a trained model and by what draws a task's examples.
PLACED = (
    *("width", "layer", "layers", "causal"),
    *("base", "factor", "original_length", "length", "scaling", "bucket"),
    *("generator", "rows"),
)


@functools.cache
def target_parameters(target: str) -> list[str] | None:
    """What the zoo's `target` lets a YAML file set: all but `PLACED`."""
    names = constructor_parameters(target)
    return names and [name for name in names if name not in PLACED]


def constructor_parameters(target: str) -> list[str] | None:
    """All that the zoo's `target` takes; None where its source does not tell."""
    found = _annotations(target)
    return None if found is None else list(found)


@functools.cache
def _annotations(target: str) -> dict[str, ast.expr | None] | None:
    module, _, name = target.rpartition(".")
    return parameters(ROOT / (module.replace(".", "/") + ".py"), name)


def check_types(target: str, values: Mapping[str, Any]) -> None:
    """Refuse values that are not of the types that the zoo's `target` declares for them."""
    declared = _annotations(target) or {}
    for name, value in values.items():
        annotation = declared.get(name)
        if annotation is not None and not _fits(value, annotation):
            digits = isinstance(value, int) and abs(value) >= LARGEST
            limit = " of at most 15 digits" if digits else ""
            refuse(name, value, f"must be {_in_words(annotation)}{limit}")


LARGEST = 10**15  # of a whole number: beyond, sizes overflow before memory is asked for
SIMPLE = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
}
SIMPLE |= {"str": "a word", "None": "null"}
MANY = ("Sequence", "list", "tuple")


def _fits(value: Any, annotation: ast.expr) -> bool:
    """Whether `value` is of the annotated type, of those that options have; any other holds all."""
    match annotation:
        case ast.BinOp(left=left, right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Subscript(value=ast.Name(id=kind), slice=item) if kind in MANY:
            return isinstance(value, list) and all(_fits(one, item) for one in value)
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="int"):
            whole = isinstance(value, int) and not isinstance(value, bool)
            return whole and abs(value) < LARGEST
        case ast.Name(id="float"):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            most = LARGEST if isinstance(value, int) else sys.float_info.max  # neither nan nor inf
            return number and abs(value) <= most
        case ast.Name(id="str"):
            return isinstance(value, str)
    return True


def _in_words(annotation: ast.expr) -> str:
    match annotation:
        case ast.BinOp(left=left, right=right):
            return f"{_in_words(left)} or {_in_words(right)}"
        case ast.Subscript(slice=item):
            return f"a list, each {_in_words(item)}"
    name = ast.unparse(annotation)
    return SIMPLE.get(name, name)
