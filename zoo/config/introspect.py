"""What constructors and functions take, read from their source: nothing heavy is imported."""

import ast
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zoo.config import domains
from zoo.config.domains import fits, refuse_kind
from zoo.errors import refuse_path
from zoo.paths import ROOT


class Argument(NamedTuple):
    """One argument of a constructor or function."""

    kind: Any  # its annotation, such as `int | None`; Any where it is of no option's type
    default: Any  # `...` where it has none, or one that is not a constant


def is_target(text: str) -> bool:
    return re.fullmatch(r"zoo(\.[a-z]\w*)+\.[A-Za-z]\w*", text) is not None


def parameters(file: Path, name: str) -> dict[str, Argument] | None:
    """The arguments of function or class `name` in `file`.

    None where its source does not say.
    """
    _, node = _defined(file, name)
    return _own(node) if (node := _constructor(node)) and not node.args.kwarg else None


def _defined(file: Path, name: str) -> tuple[ast.Module, ast.AST]:
    """The source of `file`, and what it defines as `name`."""
    try:
        status = file.stat()
        tree = _parsed(file, status.st_mtime_ns, status.st_size)
    except FileNotFoundError:
        refuse_path(file, "there is no such file", "Name a class of this package")
    found = [node for node in tree.body if getattr(node, "name", None) == name]
    if not found:
        refuse_path(file, f"there is no {name} in it", "Name a class or function of it")
    return tree, found[0]


@functools.lru_cache(maxsize=256)
def _parsed(file: Path, _changed: int, _size: int) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        refuse_path(f"{file}:{error.lineno}", f"{error.msg}", "Mend that line")


def _constructor(node: ast.AST) -> ast.FunctionDef | None:
    """The function itself, or the class's own __init__."""
    if isinstance(node, ast.ClassDef):
        inits = [part for part in node.body if getattr(part, "name", None) == "__init__"]
        node = inits[0] if inits else node
    return node if isinstance(node, ast.FunctionDef) else None


def _own(node: ast.FunctionDef) -> dict[str, Argument]:
    given, defaults = node.args.args + node.args.kwonlyargs, node.args.defaults
    values = [*[None] * (len(node.args.args) - len(defaults)), *defaults, *node.args.kw_defaults]
    return {
        arg.arg: Argument(_kind(arg.annotation), _constant(value))
        for arg, value in zip(given, values, strict=True)
        if arg.arg != "self"
    }


def _fields(node: ast.AST) -> dict[str, Argument]:
    """The fields of a dataclass; none of another class."""
    if not isinstance(node, ast.ClassDef) or "dataclass" not in map(
        _decorator, node.decorator_list
    ):
        return {}
    return {
        part.target.id: Argument(_kind(part.annotation), _constant(part.value))
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        if "ClassVar" not in ast.unparse(part.annotation)
    }


def _decorator(node: ast.expr) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def _kind(annotation: ast.expr | None) -> Any:
    """The annotation itself, of those that options have."""
    if annotation is None:
        return Any
    try:
        return eval(ast.unparse(annotation), {**vars(domains)})
    except (NameError, TypeError, AttributeError):  # a tensor's, or of another package
        return Any


def _constant(value: ast.expr | None) -> Any:
    try:
        return ... if value is None else ast.literal_eval(value)
    except ValueError:
        return ...


# Set by the backbone, by the objective (a causal model must not look ahead), by what
# extends a trained model, by what draws a task's examples and by what shortens prompts.
PLACED = (
    *("width", "layer", "layers", "causal"),
    *("base", "theta", "factor", "original_length", "length", "scaling", "bucket"),
    *("generator", "rows"),
    *("scorer", "_scorer", "prompt", "budget"),
)


@functools.cache
def target_parameters(target: str) -> list[str] | None:
    """What the zoo's `target` lets a YAML file set: all but `PLACED`; of a task, all."""
    names, of_task = constructor_parameters(target), target.startswith("zoo.tasks.")
    return names and [name for name in names if of_task or name not in PLACED]


def constructor_parameters(target: str) -> list[str] | None:
    """All that the zoo's `target` takes; None where its source does not say."""
    found = arguments(target)
    return None if found is None else list(found)


@functools.cache
def arguments(target: str) -> dict[str, Argument] | None:
    """All arguments of the zoo's `target` by name; None where its source does not say.

    A class without a constructor of its own has its base's, and one that passes on `**kwargs`
    takes what its base takes as well. A dataclass takes its fields.
    """
    node = _source(target)[1]
    init = _constructor(node)
    own = _own(init) if init else _fields(node)
    if init and not init.args.kwarg:
        return own
    for base in _bases(target):
        inherited = arguments(base)
        if inherited is not None:
            return {**inherited, **own}
    return own or None if not init else None


def lineage(target: str) -> list[str]:
    """The zoo's `target` and the classes of the zoo that it is derived from, nearest first."""
    return [target, *(name for base in _bases(target) for name in lineage(base))]


def _source(target: str) -> tuple[ast.Module, ast.AST]:
    module, _, name = target.rpartition(".")
    return _defined(ROOT / (module.replace(".", "/") + ".py"), name)


def _bases(target: str) -> list[str]:
    """The direct bases of a class that the zoo defines, as targets."""
    tree, node = _source(target)
    if not isinstance(node, ast.ClassDef):
        return []
    names = {
        part.name: f"{target.rpartition('.')[0]}.{part.name}"
        for part in tree.body
        if isinstance(part, ast.ClassDef)
    }
    for part in tree.body:
        if isinstance(part, ast.ImportFrom):
            names |= {one.asname or one.name: f"{part.module}.{one.name}" for one in part.names}
        elif isinstance(part, ast.Import):
            names |= {one.asname: one.name for one in part.names if one.asname}
    found = []
    for base in map(ast.unparse, node.bases):
        first, dot, rest = base.partition(".")
        found.append(names.get(first, first) + dot + rest)
    return [base for base in found if is_target(base)]


def check_types(target: str, values: Mapping[str, Any]) -> None:
    """Refuse values that the annotations of the zoo's `target` do not allow."""
    declared = arguments(target) or {}
    for name, value in values.items():
        if name in declared and not fits(value, declared[name].kind):
            refuse_kind(name, value, *declared[name])
