"""What an option may be: human sizes, and names that the code they configure must know.

What a mixer, a measurement or Lightning's Trainer accepts is read from its source with `ast`, so
that a misspelt argument is refused without importing anything heavy.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import UserError

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent

SUFFIXES = {"k": 2**10, "M": 2**20, "G": 2**30}
SIZE = re.compile(r"(?P<count>\d+)(?P<suffix>[kKMG])|(?P<base>\d{1,4})\*\*(?P<power>\d{1,2})")
PLAIN = re.compile(r"[+-]?\d+(_\d+)*")


def shipped(folder: str) -> Path:
    """A folder of ours that is no code: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / f"_{folder}"
    return inside if inside.is_dir() else ROOT / folder


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
    if isinstance(value, str) and PLAIN.fullmatch(value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError("is not a whole number (such as 512, 64k, 1M, 65_536 or 2**16)")
    return int(value)


def is_target(text: str) -> bool:
    return re.fullmatch(r"zoo(\.[a-z]\w*)+\.[A-Za-z]\w*", text) is not None


def parameters(file: Path, name: str) -> list[str] | None:
    """Names that function or class `name` in `file` takes; None where its source does not tell."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {file}") from None
    found = [node for node in tree.body if getattr(node, "name", None) == name]
    if not found:
        raise UserError(f"there is no {name} in {file}")
    node = found[0]
    if isinstance(node, ast.ClassDef):
        inits = [part for part in node.body if getattr(part, "name", None) == "__init__"]
        node = inits[0] if inits else node
    if not isinstance(node, ast.FunctionDef) or node.args.kwarg:
        return None
    return [arg.arg for arg in node.args.args + node.args.kwonlyargs if arg.arg != "self"]


# Set by the backbone, by the objective (a causal model must not be asked to look ahead) and by what
# extends a trained model.
PLACED = (
    *("width", "layer", "layers", "causal"),
    *("base", "factor", "original_length", "length", "scaling", "bucket"),
)


@functools.cache
def target_parameters(target: str) -> list[str] | None:
    """What the zoo's `target` lets a YAML file set: all but `PLACED`."""
    names = constructor_parameters(target)
    return names and [name for name in names if name not in PLACED]


def constructor_parameters(target: str) -> list[str] | None:
    """All that the zoo's `target` takes; None where its source does not tell."""
    module, _, name = target.rpartition(".")
    return parameters(ROOT / (module.replace(".", "/") + ".py"), name)


# Trainer arguments that are decided elsewhere, and where.
TRAINER_OWNED = {
    "logger": "the option logger",
    "callbacks": "the learner",
    "plugins": "the learner",
    "default_root_dir": "the option runs",
    "gradient_clip_val": "the option optim.clip",
    "val_check_interval": "the option valid_every",
    "enable_checkpointing": "the option save_every",
}


@functools.cache
def trainer_parameters() -> list[str]:
    """What Lightning's Trainer takes, in the installed version, without importing it."""
    spec = importlib.util.find_spec("lightning")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("lightning is not installed: run `make` in the project's folder")
    file = Path(spec.submodule_search_locations[0]) / "pytorch" / "trainer" / "trainer.py"
    return [name for name in parameters(file, "Trainer") or [] if name not in TRAINER_OWNED]


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
