"""Which extensions act on which models, read from configurations: nothing heavy is imported.

An extension acts on position schemes: its `scaling` on those whose class lists the module of its
function, its attention pattern on those that take one, its training positions on those whose tokens
may be placed.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from zoo.config.groups import choices, extensions, model_section
from zoo.config.schema.model import Extension, Model
from zoo.config.schemes import DEFAULT, declared, schemes, short_name
from zoo.errors import refuse

UNSCALED = "extension.scaling=null"


class Declared(NamedTuple):
    """What the class of a position scheme declares, of what extensions act on."""

    name: str
    scaled_by: tuple[str, ...]
    takes_pattern: bool
    takes_patterns: tuple[str, ...]
    placeable: bool


def declared_by(target: str) -> Declared:
    """Return what the scheme of that class declares."""
    read = {name: declared(target, name) for name in Declared._fields[1:]}
    return Declared(short_name(target), **read)


def position_schemes(model: Model) -> set[Declared]:
    """Return the schemes that extensions can act on: in attention that lets them, and embedded."""
    mixers = [block.mixer for block in model.blocks]
    extendable = [part for part in mixers if declared(part.target, "extendable", False)]
    default = {"_target_": schemes()[DEFAULT]}
    targets = {
        declared(part.target, "scheme") or part.options.get("positions", default)["_target_"]
        for part in extendable
    }
    if model.embedding_positions is not None:
        targets.add(model.embedding_positions.target)
    return {declared_by(target) for target in targets}


def acts_on(tree: Mapping[str, Any], scheme: Declared) -> bool:
    """Whether an extension, as its YAML has it, acts on the scheme."""
    scaling, pattern, placed = tree["scaling"], tree["attention"], tree.get("positions")
    if isinstance(scaling, str) and scaling in extensions():  # by its name, as YAMLs have it
        scaling = extensions()[scaling]["scaling"]
    module = scaling["_target_"].rpartition(".")[0] if isinstance(scaling, dict) else None
    if scaling and not (module in scheme.scaled_by if module else scheme.takes_pattern):
        return False
    of_pattern = pattern["_target_"].rpartition(".")[0] if pattern else None
    takes = not pattern or scheme.takes_pattern or of_pattern in scheme.takes_patterns
    if not takes or (placed and not scheme.placeable):
        return False
    return bool(scaling or pattern or placed)


def check_applies(extension: Extension, found: Iterable[Declared]) -> None:
    """Refuse an extension of a model that has none of the position schemes, `found`, it acts on."""
    tree, option = extension.model_dump(by_alias=True), "extension"
    if not (tree["scaling"] or tree["attention"] or tree.get("positions")):
        return
    found = list(found)
    if any(acts_on(tree, scheme) for scheme in found):
        return
    able = [
        short_name(target)
        for target in (*schemes().values(), *_own_schemes())
        if acts_on(tree, declared_by(target))
    ]
    names = ", ".join(sorted(scheme.name for scheme in found))
    here = f"positions={names}" if names else "none that it can act on"
    rule = f"acts on positions={', '.join(able)}, and this model has {here}"
    if not able:
        rule = "its scaling, attention pattern and positions act on no position scheme together"
    own = extensions().get(extension.name, {})
    advice = f"Use {UNSCALED}, or " if own and _acts_unscaled(own, found) else "Use "
    refuse(option, extension.name, rule, f"{advice}{_applicable(found)}")


def _own_schemes() -> list[str]:
    """Return the classes of the schemes that are a mixer's own."""
    mixers = [model_section(name).get("mixer") for name in choices("model")]
    return [own for part in mixers if part and (own := declared(part["_target_"], "scheme"))]


def _acts_unscaled(tree: Mapping[str, Any], found: Iterable[Declared]) -> bool:
    """Whether an extension whose scaling is another one, by its name, acts on any without it."""
    named = isinstance(tree["scaling"], str)
    return named and any(acts_on({**tree, "scaling": None}, scheme) for scheme in found)


def _applicable(found: list[Declared]) -> str:
    """Return, in words, which extensions act on such schemes."""
    names: dict[bool, list[str]] = {False: ["none"], True: []}
    for name, tree in extensions().items():
        if any(acts_on(tree, scheme) for scheme in found):
            names[bool(tree.get("positions"))].append(name)
        elif _acts_unscaled(tree, found):
            names[bool(tree.get("positions"))].append(f"{name} with {UNSCALED}")
    advice = f"extension={', '.join(names[False])}"
    return advice + (f", or to train with {', '.join(names[True])}" if names[True] else "")
