"""What a run was made by: the commit, the versions, and the code that shapes its numbers.

That code is what a run's configuration names (its mixers, feed-forwards, extension), the learner,
the backbone and the data order, and all that these import within the package, with the native
sources of their kernels. Not the whole repository: another mixer, the report, the command line, a
message, a comment or a docstring may change, and a run stays what it is. Nothing heavy is imported.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from zoo.config.validate import plain
from zoo.paths import PACKAGE, ROOT, shipped

TRAINING = ("training.fit", "model.backbone")  # trains any model
MEASURING = ("model.backbone", "model.build", "model.extend")  # makes a trained one again
# What the numbers do not come from: words, records, options (config.yaml has what was chosen), and
# how text became tokens (the fingerprint has that).
APART = (
    *("errors", "paths", "console", "cli", "report", "model.audit"),
    *("config.applicability", "config.compose", "config.domains", "config.effects"),
    *("config.groups", "config.introspect", "config.longrope_factors"),
    *("config.resolve", "config.schema", "config.schemes", "config.sizes", "config.stored"),
    *("training.callbacks", "training.records"),
    "compression",  # named where prompts are compressed
    *("config.trainer_arguments", "config.tree", "config.validate"),
    *("runs", "data.sources", "data.store", "data.corpora"),
    *("data.files", "data.splits", "data.records", "data.hub"),
)
# They know every architecture, to build or to extend the one that the configuration names.
HUBS = ("training.fit", "model.build", "model.extend", "model.checkpoint", "model.shrink")
NAMED = ("mixers", "attention", "positions")
NATIVE = re.compile(r"\w+/\w+\.(?:c|cu)")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
C_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/|\s+', re.DOTALL)


def provenance() -> dict[str, Any]:
    """What produced a run: commit and dirty flag (null outside a checkout), versions, time."""
    return {**_checkout(), "versions": versions(), "created": datetime.now(UTC).isoformat()}


def _checkout() -> dict[str, Any]:
    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT:
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        pass
    return {"commit": None, "dirty": None}


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that numbers depend on; None where not installed
    as a package."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("zoo", "torch", "lightning"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def sources(
    *configs: BaseModel, roots: Sequence[str] = TRAINING, package: Path = PACKAGE
) -> dict[str, str]:
    """The files behind a configuration's numbers, relative to the checkout -> a hash of each.

    Follows the modules `roots` and those that the configurations name as `_target_`; what came
    from a measurement of them has `roots=MEASURING` and the task among the configurations.
    """
    targets = [target for config in configs for target in _targets(plain(config))]
    modules = [target.rpartition(".")[0].removeprefix("zoo.") for target in targets]
    kernels = shipped("kernels") if package == PACKAGE else package.parent / "kernels"
    return _closure(package, kernels, list(dict.fromkeys([*roots, *modules])))


def measured_by(
    trained: BaseModel,
    task: str,
    extended: bool,
    quantized: bool = False,
    shortened: bool = False,
) -> str:
    """One name for the code that measures a trained run by a task; of an `extended` one it goes on
    with one for all extensions, so that the first part is the same under each and under none.

    Of `shortened` prompts it names the code of compressions too.
    """
    also = ["model.quantization"] if quantized else []
    files = sorted((PACKAGE / "compression").glob("*.py")) if shortened else []
    also += [f"compression.{path.stem}" for path in files]
    own = digest(sources(trained, roots=[*MEASURING, *also, f"tasks.{task}"]))
    if not extended:
        return own
    reads = [path for part in ("attention", "positions") for path in (PACKAGE / part).glob("*.py")]
    names = sorted(f"{path.parent.name}.{path.stem}" for path in reads)
    return f"{own}-{digest(sources(roots=names))}"


def digest(files: Mapping[str, str]) -> str:
    """One short name for a set of sources."""
    text = json.dumps(sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files that differ between two sets of sources."""
    return sorted(name for name in {**before, **now} if before.get(name) != now.get(name))


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "_target_")
        node = list(node.values())
    for child in node if isinstance(node, list) else ():
        yield from _targets(child)


def _closure(package: Path, kernels: Path, roots: list[str]) -> dict[str, str]:
    """name of each file that the modules `roots` come to import -> its hash."""
    found: dict[str, str] = {}
    todo, seen = roots, set(roots)
    while todo:
        module = todo.pop()
        path = _file(package, module)
        if path is None:
            continue
        status = path.stat()
        parsed = _parsed(path, status.st_mtime_ns, status.st_size)
        found[f"zoo/{path.relative_to(package).as_posix()}"] = parsed.sha256
        for name in parsed.native:
            found |= _native(kernels, name)
        for name in parsed.imports:
            name = name if _file(package, name) else name.rpartition(".")[0]
            hub = module in HUBS and name.split(".")[0] in NAMED
            if name and name not in seen and not hub and not _within(name, APART):
                seen.add(name)
                todo.append(name)
    return found


def _within(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _file(package: Path, module: str) -> Path | None:
    """The file of a module of the package, its name without `zoo.`."""
    base = package / module.replace(".", "/")
    for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


class _Source:
    """One Python file: its hash, the package's modules it imports, the native sources it names."""

    def __init__(self, text: str) -> None:
        tree = ast.parse(text)
        self.imports, self.native = [], []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zoo":
                parent = (node.module or "").removeprefix("zoo").removeprefix(".")
                self.imports += [f"{parent}.{alias.name}".lstrip(".") for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("zoo.")]
                self.imports += [name.removeprefix("zoo.") for name in names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.native += [node.value] if NATIVE.fullmatch(node.value) else []
        text = json.dumps(_normal(tree), ensure_ascii=True)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.lru_cache(maxsize=512)
def _parsed(path: Path, changed: int, size: int) -> _Source:
    del changed, size  # they mark a file that was written again
    return _Source(path.read_text(encoding="utf-8"))


def _normal(node: Any) -> Any:
    """A syntax tree as plain lists, without what no number comes from, alike in every Python."""
    if isinstance(node, list):
        return [_normal(child) for child in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return ["Raise", _normal(node.exc.func)]  # the message is for people
    if isinstance(node, ast.Expr) and _is_message(node.value):
        return ["Message"]
    fields = {name: getattr(node, name, None) for name in node._fields}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
        fields["body"] = [child for child in node.body if not _is_text(child)]
    skipped = ("ctx", "kind", "msg", "returns", "annotation", "type_comment", "type_ignores")
    if isinstance(node, ast.AnnAssign):  # fields of a dataclass are its signature
        skipped = ("ctx",)
    kept = [(k, v) for k, v in fields.items() if k not in skipped and v is not None and v != []]
    return [type(node).__name__, *([name, _normal(value)] for name, value in kept)]


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring, or any other text on its own."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)


def _is_message(node: ast.expr) -> bool:
    """Whether an expression is `log.info(...)` or the like."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return isinstance(node.func.value, ast.Name) and node.func.value.id in ("log", "logging")


def _native(kernels: Path, name: str) -> dict[str, str]:
    """A native source and the headers of ours that it includes -> hashes, comments left out."""
    found, todo = {}, [kernels / name]
    while todo:
        path = Path(os.path.normpath(todo.pop()))
        key = f"kernels/{path.relative_to(kernels).as_posix()}"
        if key in found or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        code = C_TOKEN.sub(lambda m: m[0] if m[0][0] == '"' else " ", text)
        code = " ".join(code.split())
        found[key] = hashlib.sha256(code.encode()).hexdigest()[:12]
        for header in INCLUDE.findall(text):
            todo += [p for p in (path.parent / header, kernels / header) if p.is_file()][:1]
    return found
