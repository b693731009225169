"""Who is measured: the fields that every row of a run has, and the labels of its arm."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from zoo.config.groups import extensions
from zoo.config.schema.eval import Compress
from zoo.config.schema.model import Extension
from zoo.config.schema.train import TrainConfig
from zoo.config.stages import Stages, label, stages_of, trained_length
from zoo.config.stored import as_before
from zoo.config.tree import flat, within
from zoo.config.validate import plain
from zoo.errors import UserError
from zoo.measurement import numbers
from zoo.model.audit import AUTOCAST
from zoo.model.device import device_name
from zoo.model.pretrained import identify
from zoo.report.words import operations
from zoo.runs.claim import trained_by
from zoo.runs.folder import RunFolder
from zoo.runs.identity import identity
from zoo.tasks.context import Row

LABELS = ("arm", "extension_options")  # in words what `extension_settings` identifies
EXTENDED = (*LABELS, "extension", "extension_factor", "extension_settings")
SHORTENED = ("compression", "compression_family", "compression_flops")
UNSHAPED = (  # options that leave a run's weights as they are; the text is known by its fingerprint
    *("data.path", "data.cache", "valid_every", "valid_windows", "save_every"),
)


def row_identity(
    extension: Extension,
    folder: RunFolder,
    device: torch.device,
    weights: str = "float32",
    kv_cache: str | None = None,
) -> Row:
    """The fields every row of a run shares: what was trained, how, and what measures it.

    `weights` and `kv_cache` are the forms of the numbers (zoo.model.weights).
    """
    trained, info = folder.config, folder.info
    name = trained.model.name
    stages = stages_of(trained)
    tuned = trained.finetune or trained.stages  # what was exported has its stages alone
    if tuned or trained.extension.name != "none":
        how = "tuned" if tuned else "trained"
        name += f" {how}{stages_in_words(stages)}"
    name += _shrunk(trained)
    dtype = str(AUTOCAST.get(trained.trainer.precision, torch.float32)).removeprefix("torch.")
    return {
        "run": folder.name,
        "arm": name if extension.name == "none" else f"{name} + {_label(extension, stages)}",
        "model": trained.model.name,
        "size": trained.size.name,
        "seed": trained.seed,
        "extension": extension.name,
        "extension_factor": extension.factor,
        "extension_settings": extension_settings(extension),
        "extension_options": flat(plain(extension)),
        "parameters": info.get("parameters"),
        "flops_per_token": info.get("flops_per_token"),
        "train_length": trained.seq_len,
        **weights_of(folder),
        "lr": trained.optim.lr,
        "match": trained.match,
        "state_passing": trained.state_passing,
        "data": trained.data.name,
        "fingerprint": info.get("fingerprint"),
        "tokenizer": info.get("tokenizer"),
        **({"ignores": info["ignores"]} if info.get("ignores") else {}),
        "sources": trained_by(info),
        "commit": info.get("commit"),
        "device": device_name(device),
        "dtype": numbers(dtype if weights == "float32" else weights, kv_cache),
        "threads": torch.get_num_threads(),
        "ranks": None,  # of texts that several processes read together, their number
        "audit": None,  # of a model that leaks, the reason
    }


def _shrunk(config: TrainConfig) -> str:
    """How a run's model was made smaller, or by which one it was taught, in words."""
    words, shrunk = "", config.shrunk
    if shrunk is not None:
        words = f", rank {shrunk.rank}" if shrunk.rank else f", {shrunk.sparsity} sparse"
    if config.distil.teacher is not None:
        words += f", taught by {Path(config.distil.teacher).name}"
    return words


def compressed_identity(about: Row, compress: Compress) -> Row:
    """The fields that differ where prompts are compressed: it counts as part of the extension.

    Raises UserError where the scorer is no whole run and no checkpoint.
    """
    if compress.method is None:
        return {}
    method = compress.method.target.split(".")[-2]
    options = plain(compress) | {"by": _scorer_name(compress.by)}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:6]
    scored = f" by {Path(compress.by).name}" if compress.by else ""
    family = f"{about['arm']}, prompts by {compress.name}{scored}"
    budget = f"{compress.rate:g}" if compress.rate else operations(compress.flops or 0.0)
    flattened = flat({"compress": plain(compress)})
    return {
        "arm": f"{about['arm']}, prompts by {compress.name} to {budget}{scored}",
        "compression": method,
        "compression_family": family,
        "compression_flops": compress.flops,
        "extension_settings": f"{about['extension_settings']}+{compress.name}-{digest}",
        "extension_options": about["extension_options"] | flattened,
    }


def _scorer_name(by: str | None) -> list[Any] | None:
    """What identifies a scorer's weights: a run's id and step; a hash over a checkpoint's."""
    if by is None:
        return None
    if (Path(by) / "run.json").is_file():
        folder = RunFolder.open(by)
        return [folder.info.get("id"), weights_of(folder)["train_steps"]]
    return [identify(Path(by))["sha256"]]


def weights_of(folder: RunFolder) -> Row:
    """What the weights have read that are measured: after damage, not the run's last."""
    info = folder.info
    try:
        last = next(folder.whole_checkpoints(), None)
    except UserError:
        last = None
    step = info["step"] if last is None or last.step is None else last.step
    tokens = info.get("tokens_seen")
    if step != info["step"]:
        tokens = step * info["tokens_per_step"] if info.get("tokens_per_step") else None
    lost = {"lost_steps": info["step"] - step} if step < info["step"] else {}
    return {"train_tokens": tokens, "train_steps": step, **lost}


def stages_in_words(stages: Stages) -> str:
    """The stages of a training in words; of several, each with the lengths it went from and to."""
    words = [_label(extension, stages[:number]) for number, (extension, _) in enumerate(stages)]
    words = ["" if word == "none" else f" {word}" for word in words]
    if len(stages) > 1:
        for number, (extension, seq_len) in enumerate(stages):
            start = extension.original_length or seq_len
            words[number] += f" ({start} to {trained_length(extension, seq_len)})"
    return " with" * (stages[0][0].name != "none") + ", then".join(words)


def _label(extension: Extension, below: Stages = ()) -> str:
    """Its name, under a remap that of the scaling beneath, the factor, and how it composes."""
    scaling = None
    if extension.scaling and extension.attention:
        targets = {
            tree["scaling"]["_target_"]: other
            for other, tree in extensions().items()
            if isinstance(tree["scaling"], dict)
            and not tree["attention"]
            and not tree.get("positions")
        }
        scaling = targets.get(extension.scaling.target, extension.scaling.target)
    return label(extension, scaling, below)


def trained_settings(folder: RunFolder) -> dict[str, Any]:
    """Every option that shaped a run's weights but the seed: equal for runs that are its seeds.

    A fine-tuned run has its base's beside its own, in place of where the base lies.
    """
    config, base = folder.config, {}
    every = flat(identity(config))
    settings = {k: v for k, v in every.items() if not within(k, ("seed", *UNSHAPED))}
    shrunk = config.shrunk.run if config.shrunk else None
    for option, place in (("finetune", config.finetune), ("shrunk.run", shrunk)):
        if place and Path(place).is_dir():
            try:
                own = trained_settings(RunFolder.open(place))
            except UserError:  # damaged since
                return settings
            base |= own
            del settings[option]
    return settings | {f"base.{name}": value for name, value in base.items()}


def extension_settings(extension: Extension) -> str:
    """A name for the extension with all its settings, the same for the same ones."""
    if extension.name == "none":
        return "none"
    options = json.dumps(as_before({"extension": plain(extension)})["extension"], sort_keys=True)
    return f"{extension.name}-{hashlib.sha256(options.encode()).hexdigest()[:6]}"
