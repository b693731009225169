"""What an option may be: human sizes, and names that the code they configure must know.

What a mixer, a measurement or Lightning's Trainer accepts is read from its source with `ast`, so
that a misspelt argument is refused without importing anything heavy.
"""

import ast
import functools
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    if isinstance(value, str) and len(value) < 100 and PLAIN.fullmatch(value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():  # neither nan nor inf
        return int(value)
    raise ValueError("is not a whole number (such as 512, 64k, 1M, 65_536 or 2**16)")


def is_target(text: str) -> bool:
    return re.fullmatch(r"zoo(\.[a-z]\w*)+\.[A-Za-z]\w*", text) is not None


def parameters(file: Path, name: str) -> dict[str, ast.expr | None] | None:
    """What function or class `name` in `file` takes: {name: annotation}.

    None where its source does not tell.
    """
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
            shown = json.dumps(value) if value is None or isinstance(value, bool) else value
            digits = isinstance(value, int) and abs(value) >= LARGEST
            limit = " of at most 15 digits" if digits else ""
            raise UserError(f"{name}={shown}: must be {_in_words(annotation)}{limit}")


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


# Trainer arguments that are decided elsewhere, and where.
TRAINER_OWNED = {
    "logger": "the option logger",
    "callbacks": "the learner",
    "plugins": "the learner",
    "default_root_dir": "the option runs",
    "gradient_clip_val": "the option optim.clip",
    "val_check_interval": "the option valid_every",
    "enable_checkpointing": "the option save_every",
    "use_distributed_sampler": "the order of the data, which every process shares",
}
# Those that would do nothing here, or not what they say, and what to use. What neither these nor
# `schema.Trainer` names, such as an argument of a later Lightning, is refused as well.
_LENGTH = "a run is as long as trainer.max_steps or trainer.max_time says"
_VALIDATION = "validation reads valid_windows windows every valid_every steps"
TRAINER_REFUSED = {
    **dict.fromkeys(("max_epochs", "min_epochs", "min_steps", "limit_train_batches"), _LENGTH),
    **dict.fromkeys(("fast_dev_run", "overfit_batches"), f"{_LENGTH}, for a trial too"),
    **dict.fromkeys(("limit_val_batches", "check_val_every_n_epoch"), _VALIDATION),
    **dict.fromkeys(("num_sanity_val_steps", "inference_mode"), _VALIDATION),
    **dict.fromkeys(("limit_test_batches", "limit_predict_batches"), "eval.py measures"),
    "gradient_clip_algorithm": "gradients are clipped by their norm: optim.clip sets it",
    "num_nodes": "a run trains on one machine",
    "sync_batchnorm": "no architecture normalises over a batch",
    "reload_dataloaders_every_n_epochs": "the order of the data follows from seed and step",
    "profiler": "its report is not written; torch.profiler or py-spy can watch the program",
    "enable_model_summary": "run.json has the number of parameters",
    "barebones": "metrics and checkpoints are always written",
    "enable_autolog_hparams": "config.yaml has every option",
    "model_registry": "the run folder is the record",
}


@functools.cache
def trainer_parameters() -> list[str]:
    """What Lightning's Trainer takes, in the installed version, and nothing above decides.

    Read from its source, without importing it.
    """
    spec = importlib.util.find_spec("lightning")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("lightning is not installed: run `make` in the project's folder")
    file = Path(spec.submodule_search_locations[0]) / "pytorch" / "trainer" / "trainer.py"
    decided = {*TRAINER_OWNED, *TRAINER_REFUSED}
    return [name for name in parameters(file, "Trainer") or {} if name not in decided]


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
