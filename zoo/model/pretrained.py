"""The weights of a pretrained checkpoint as a model of the zoo.

A run that was made of a checkpoint (`config.checkpoint`) keeps no copy of its weights: it names the
folder or GGUF file, and `run.json` holds what identifies the files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from zoo.config.schema.train import TrainConfig
from zoo.console import say
from zoo.errors import refuse
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.model.convert import from_transformers
from zoo.model.extend import extend_as_trained
from zoo.pretrained.families import Description
from zoo.pretrained.gguf import GGUFFile
from zoo.pretrained.weights import (
    DTYPES,
    digest_files,
    open_weights,
    stored_dtype,
    weight_files,
)


def checkpoint_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's weights. UserError where one is missing."""
    if checkpoint.is_file():
        return [checkpoint]
    if not checkpoint.is_dir():
        refuse(
            "checkpoint",
            str(checkpoint),
            "no such file or folder",
            "Give a checkpoint's folder, or a .gguf file",
        )
    return weight_files(checkpoint)


def identify(checkpoint: Path) -> dict[str, Any]:
    """What identifies a checkpoint's weights: sha256 over the files, sizes and times."""
    files = checkpoint_files(checkpoint)
    return {"sha256": digest_files(files), "files": _stamps(files)}


def check_unchanged(checkpoint: Path, recorded: Mapping[str, Any]) -> None:
    """Refuse weights that changed since a run was made of them.

    The contents are hashed anew only where a size or a time differs.
    """
    files = checkpoint_files(checkpoint)
    if _stamps(files) != recorded["files"] and digest_files(files) != recorded["sha256"]:
        refuse(
            "checkpoint",
            str(checkpoint),
            "its weights changed since this run was made of them",
            "Put them back, or make another run of the new ones: runs=<another folder>",
        )


def _stamps(files: list[Path]) -> dict[str, list[int]]:
    stats = {file.name: file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def pretrained_weights(
    config: TrainConfig, dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    """The tensors of a run's checkpoint under the zoo's names, in `dtype`, mapped from its files
    where they can be; with None each in its own. Raises UserError for one that is stored in
    integers."""
    assert config.checkpoint is not None
    checkpoint = Path(config.checkpoint)
    if checkpoint.is_file():
        stored = GGUFFile(checkpoint).weights()
        stored = {name: one.to(dtype or one.dtype) for name, one in stored.items()}
    else:
        stored = open_weights(checkpoint, dtype)
    weights = from_transformers(stored, config.size.heads)
    allowed = [dtype] if dtype else [getattr(torch, name) for name in DTYPES.values()]
    for name, weight in weights.items():
        if weight.dtype not in allowed:
            form = str(weight.dtype).removeprefix("torch.")
            rule = f"its weights must be of {', '.join(DTYPES.values())}, and {name} is of {form}"
            refuse("checkpoint", str(checkpoint), rule, "Use a checkpoint in one of these")
    return weights


def load_pretrained(
    config: TrainConfig,
    dtype: torch.dtype | None = torch.float32,
    described: Description | None = None,
) -> Backbone:
    """The model that a run was made of, on the CPU.

    Weights that are stored in `dtype` are not copied: parameters are views of the mapped files.
    With None all are kept in the one dtype that most are stored in. `described` is what the
    checkpoint says of itself, where no run was made of it yet; its notes are printed.
    Raises UserError where the weights do not fit the model that is described, and where one is not
    finite.
    """
    assert config.checkpoint is not None
    checkpoint = Path(config.checkpoint)
    for note in described.notes if described else ():
        say(f"{checkpoint}: {note}")
    form: torch.dtype = dtype or getattr(torch, dtype_on_disk(checkpoint))
    weights = pretrained_weights(config, form)
    if "embedding.weight" not in weights:
        refuse("checkpoint", str(checkpoint), "has no embedding", "Give a whole checkpoint")
    if not config.model.tied and weights["head.weight"] is weights["embedding.weight"]:
        rule = "its head is not tied to its embedding, and its weights have no head"
        refuse("checkpoint", str(checkpoint), rule, "Give a whole checkpoint")
    if described is not None and (why := _other_counts(described, config, weights)):
        _refuse_misfit(checkpoint, why)
    with torch.device("meta"):
        model, _ = build_model(config, len(weights["embedding.weight"]))
    if why := misfit(model, weights):
        _refuse_misfit(checkpoint, why)
    for name, weight in weights.items():
        if weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():
            rule = f"{name} has a number that is not finite in {str(form).removeprefix('torch.')}"
            refuse("checkpoint", str(checkpoint), rule, "Give a whole checkpoint")
    if config.model.tied:
        head, embedding = weights.pop("head.weight"), weights["embedding.weight"]
        if head is not embedding and not torch.equal(head, embedding):
            rule = "its head is tied to its embedding, and its weights have another head"
            refuse("checkpoint", str(checkpoint), rule, "Set tie_word_embeddings to false")
    model.load_state_dict(weights, strict=False, assign=True)
    if config.model.tied:
        model.head.weight = model.embedding.weight
    return extend_as_trained(model, config)


def _refuse_misfit(checkpoint: Path, why: str) -> NoReturn:
    model = "its keys' model" if checkpoint.is_file() else "config.json's model"
    rule = f"{model} does not fit its weights ({why})"
    refuse("checkpoint", str(checkpoint), rule, "Give a whole checkpoint")


def _other_counts(
    described: Description, config: TrainConfig, weights: Mapping[str, Tensor]
) -> str | None:
    """How many tokens or layers are described, where the weights have others; None where not.

    Looked at before the model is built, which takes time and memory by the number of layers.
    """
    tokens = weights["embedding.weight"].shape[:1].numel()
    if described.vocab_size != tokens:
        return f"{described.vocab_size:,} tokens there and {tokens:,} here"
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if described.own is None and config.size.layers != layers:
        return f"{config.size.layers:,} layers there and {layers:,} here"
    return None


def dtype_on_disk(checkpoint: Path) -> str:
    """The dtype of a checkpoint's weights by PyTorch's name; that of a GGUF file is float32, into
    which it is restored."""
    return "float32" if checkpoint.is_file() else stored_dtype(checkpoint)


def misfit(model: Backbone, weights: Mapping[str, Tensor]) -> str | None:
    """How given weights differ from a model's in names or shapes, in words; None where they fit."""
    needed = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    given = {name: tuple(getattr(weight, "shape", ())) for name, weight in weights.items()}
    differ = [name for name in {**needed, **given} if needed.get(name) != given.get(name)]
    if not differ:
        return None
    name = differ[0]
    one, other = (shapes.get(name, "none") for shapes in (needed, given))
    which = f"{len(differ)} of its {len(needed)} weights differ, such as {name}"
    return f"{which}, which is {one} there and {other} here"
