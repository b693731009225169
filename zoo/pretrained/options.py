"""The configuration of a run that is made of a pretrained checkpoint. Nothing heavy is imported."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.config.compose import compose
from zoo.config.schema.train import TrainConfig
from zoo.config.validate import plain, validate
from zoo.pretrained.checkpoint import read_checkpoint
from zoo.pretrained.families import Description


def described_config(checkpoint: Path, data: Mapping[str, Any], runs: Path) -> TrainConfig:
    """The options of a checkpoint's run on a text that may have the checkpoint's own tokenizer,
    which is not looked for."""
    described, _ = read_checkpoint(checkpoint, None)
    section = {**data, "tokenizer": data["tokenizer"] or "bytes"}
    return pretrained_config(described, checkpoint, section, runs)


def pretrained_config(
    described: Description, checkpoint: Path, data: Mapping[str, Any], runs: Path
) -> TrainConfig:
    """The options that `describe` found, with the text and the checkpoint beside them.

    What the options of training say is of no consequence: nothing is trained.
    """
    tree = plain(compose("train", [w for w in described.words if not w.startswith("extension")]))
    if described.own is not None:
        more = {"data": dict(data), "runs": str(runs), "checkpoint": str(checkpoint)}
        return validate(TrainConfig, {**tree, **described.own, **more})
    scaled = [word for word in described.words if word.startswith("extension")]
    if scaled:
        tree["extension"] = plain(compose("eval", ["run=x", *scaled]))["extension"]
    name = described.family
    if described.layers is not None:
        tree["model"]["blocks"] = _blocks_by_layer(described)
    size = {**tree["size"], "name": "checkpoint"}
    model = {**tree["model"], "name": name}
    more = {"data": dict(data), "size": size, "model": model, "runs": str(runs)}
    return validate(TrainConfig, {**tree, **more, "checkpoint": str(checkpoint)})


def _blocks_by_layer(described: Description) -> list[Any]:
    """The block of every layer, of a checkpoint whose layers differ."""
    kinds: dict[tuple[str, ...], Any] = {}
    for layer in map(tuple, described.layers or ()):
        if layer not in kinds:
            common = [word for word in described.words if not word.startswith("extension")]
            kinds[layer] = plain(compose("train", _merged([*common, *layer])))["model"]["blocks"][0]
    return [kinds[tuple(layer)] for layer in described.layers or ()]


def _merged(words: Sequence[str]) -> list[str]:
    """Options of which each is given once, the later value counting; where a later word changes
    the architecture, the earlier ones' mixer and positions do not go with it."""
    found: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name == "model" and found.get("model") not in (None, value):
            of_other = ("model.mixer", "model.positions")
            found = {key: one for key, one in found.items() if not key.startswith(of_other)}
        if name == "model.positions":
            found = {key: one for key, one in found.items() if not key.startswith(name)}
        found[name] = value
    return [f"{name}={value}" for name, value in found.items()]
