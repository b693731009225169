"""The YAML groups in configs/."""

import functools
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from zoo.paths import shipped

CONFIGS = shipped("configs")


@functools.cache
def groups(program: str) -> dict[str, str | None]:
    """The program's groups and the choice each has by default."""
    entries = yaml.safe_load((CONFIGS / f"{program}.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return {group: choice for group, choice in pairs if not group.startswith("override ")}


def choices(group: str) -> list[str]:
    """The YAML files of a group, by name."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


FEED_FORWARD = {"_target_": "zoo.mixers.feed_forward.SwiGLU", "hidden_width": None}


def completed(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """A model's section with the keys that its YAML leaves out.

    Its name is the file's, its feed-forward a SwiGLU, `match=params` sizes that (or the layers,
    where there is none), and no short convolution precedes its mixer.
    """
    whole = {"name": name, "short_conv": None, **model}
    if "mixer" in model:
        whole.setdefault("feed_forward", {**FEED_FORWARD})
        without = whole["feed_forward"] is None
        whole.setdefault("match", ["layers" if without else "feed_forward.hidden_width"])
    return whole


def corpora() -> dict[str, dict[str, Any]]:
    """The YAML of every text by its name: those of data= that are no synthetic task."""
    trees = {name: inherited(name, "data") for name in choices("data")}
    return {name: tree for name, tree in trees.items() if "task" not in tree}


def extensions() -> dict[str, dict[str, Any]]:
    """Every extension's YAML by its name."""
    return {name: inherited(name, "extension") for name in choices("extension")}


def model_section(name: str) -> dict[str, Any]:
    """The section of the model of that name, with the keys that its YAML leaves out."""
    return completed(name, inherited(name))


def inherited(name: str, group: str = "model") -> dict[str, Any]:
    """A YAML of a group over those its `defaults` name, as Hydra merges them."""
    folder = CONFIGS / group
    stamps = sorted(
        (file.name, (at := file.stat()).st_mtime_ns, at.st_size) for file in os.scandir(folder)
    )
    return deepcopy(_inherited(name, folder, tuple(stamps)))


@functools.lru_cache(maxsize=256)
def _inherited(name: str, folder: Path, _stamps: tuple[object, ...]) -> dict[str, Any]:
    """The same, read once while no file of the folder changes: a refusal that names what acts on a
    model reads every extension and every model."""
    part: Any = OmegaConf.load(folder / f"{name}.yaml")
    parents = [parent for parent in part.pop("defaults", []) if parent != "_self_"]
    merged = OmegaConf.merge(*[_inherited(parent, folder, _stamps) for parent in parents], part)
    return OmegaConf.to_container(merged)  # type: ignore[return-value]
