"""A run's weights as a model."""

import logging
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from zoo.config.stored import weights_as_now
from zoo.errors import refuse_path
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.model.extend import extend_as_trained
from zoo.model.lora import merged
from zoo.model.pretrained import check_unchanged, load_pretrained, misfit, pretrained_weights
from zoo.pretrained.checkpoint import read_checkpoint
from zoo.runs.checkpoints import reject, shards_of
from zoo.runs.claim import weights_of
from zoo.runs.files import one_line
from zoo.runs.folder import RunFolder

log = logging.getLogger("zoo")
REPLACE = "Put back the files as they were, or train a new run with fresh=true"


def load(
    folder: RunFolder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Backbone:
    """The model of a run, with the weights of its last good checkpoint, ready to measure.

    Weights are kept in `dtype`. UserError where there is none, or where it is of another model than
    config.yaml's.
    """
    if folder.config.checkpoint:
        check_unchanged(Path(folder.config.checkpoint), folder.info["checkpoint"])
        return load_pretrained(folder.config, dtype).to(device).eval().requires_grad_(False)
    path, state = _a_checkpoint(folder)
    weights = _with_base(folder, weights_in(state))
    vocabulary = weights.get("embedding.weight")
    if not isinstance(vocabulary, Tensor) or vocabulary.ndim != 2:
        refuse_path(path, "holds no model of this package (it has no embedding)", REPLACE)
    model, _ = build_model(folder.config, vocabulary.shape[0])
    extend_as_trained(model, folder.config)
    load_weights(model, weights, partial(refuse_checkpoint, folder))
    return model.to(device, dtype).eval().requires_grad_(False)


def vocabulary_of(folder: RunFolder) -> int:
    """Tokens that a run's model has, the rows of its embedding: a checkpoint's may be more than its
    tokenizer's. UserError where the run has no checkpoint."""
    if folder.config.checkpoint:
        return read_checkpoint(Path(folder.config.checkpoint), None)[0].vocab_size
    if folder.config.lora.rank is not None:
        return vocabulary_of(base_of(folder))
    return weights_in(_a_checkpoint(folder, mapped=True)[1])["embedding.weight"].shape[0]


def load_weights(
    model: Backbone,
    weights: dict[str, Tensor],
    refused: Callable[[str], NoReturn],
    load: Callable[[Backbone, dict[str, Tensor]], Any] = Backbone.load_state_dict,
) -> None:
    """Give a model weights by `load`, or raise what `refused` does for how they differ from its."""
    weights = {**weights}
    weights_as_now(weights)
    if why := misfit(model, weights):
        refused(why)
    try:
        load(model, weights)
    except (RuntimeError, TypeError) as error:
        refused(str(error).splitlines()[0])


def refuse_checkpoint(folder: RunFolder, why: str) -> NoReturn:
    """Refuse a run whose checkpoint holds another model's weights."""
    rule = f"config.yaml's model does not fit the checkpoint ({why})"
    refuse_path(str(folder), rule, REPLACE)


def trained_weights(folder: RunFolder, mapped: bool = False) -> dict[str, Tensor]:
    """The model's weights in a run's last good checkpoint. UserError where it has none.

    With `mapped` as in `read_file`: adapters are added when a weight is read, and pretrained
    weights have the dtype that they are stored in.
    """
    if folder.config.checkpoint:
        return pretrained_weights(folder.config, None if mapped else torch.float32)
    return _with_base(folder, weights_in(_a_checkpoint(folder, mapped)[1]), mapped)


def checkpoint_weights(folder: RunFolder) -> dict[str, Tensor]:
    """What a run's last good checkpoint holds. UserError where it has none."""
    return weights_in(_a_checkpoint(folder)[1])


def _with_base(
    folder: RunFolder, weights: dict[str, Tensor], mapped: bool = False
) -> dict[str, Tensor]:
    """The weights of a run's model from those in its checkpoint, which may be adapters alone."""
    if folder.config.lora.rank is None:
        return weights
    base = base_weights(folder, base_of(folder), mapped)
    return merged(base, weights, folder.config.lora, later=mapped)


def base_weights(folder: RunFolder, base: RunFolder, mapped: bool = False) -> dict[str, Tensor]:
    """The weights of the run that a run fine-tunes, `mapped` as in `read_file`.

    UserError where they are not those that its run.json names: of a checkpoint that turns out to be
    unreadable the one before is read.
    """
    weights = trained_weights(base, mapped)
    recorded = (folder.info.get("base") or {}).get("weights")
    if recorded is not None and recorded != weights_of(base):
        rule = f"fine-tunes the run {base}, whose last checkpoint cannot be read"
        refuse_path(str(folder), rule, "Put it back, or fine-tune anew with fresh=true")
    return weights


def base_of(folder: RunFolder) -> RunFolder:
    """The run whose model the adapters of a run adapt. UserError where it is not as it was."""
    place = Path(str(folder.config.finetune))
    if not place.is_dir():
        place = folder.path.parent / place.name  # moved together
    if not place.is_dir():
        rule = f"holds adapters of the run {folder.config.finetune}, which is not there"
        refuse_path(str(folder), rule, "Put that run's folder back, or beside this one")
    base = RunFolder.open(place)
    if folder.info["base"]["weights"] != weights_of(base):
        rule = f"holds adapters of the run {place}, whose weights changed since"
        refuse_path(str(folder), rule, "Put them back, or tune that run anew with fresh=true")
    if base.config.checkpoint:
        check_unchanged(Path(base.config.checkpoint), base.info["checkpoint"])
    return base


def _a_checkpoint(folder: RunFolder, mapped: bool = False) -> tuple[Path, dict[str, Any]]:
    path, state = last_checkpoint(folder, mapped)
    if path is None:
        step = folder.info["step"]
        rule = f"has no checkpoint{f' of its {step:,} steps' if step else ' yet'}"
        refuse_path(str(folder), rule, REPLACE if step else "Train it first")
    return path, state


def weights_in(state: dict[str, Any]) -> dict[str, Tensor]:
    stored = state.get("state_dict", {})
    return {name.removeprefix("model."): value for name, value in stored.items()}


def read_file(path: Path, mapped: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU, its tensors put together where they are in parts.

    With `mapped` nothing is read yet that `stored` does not read: tensors are mapped from the file,
    and in the place of one that is in parts is what reads it.

    Raises what PyTorch does for a file that it cannot read or that holds more than tensors and
    plain containers, and ValueError where parts are missing or damaged.
    """
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if isinstance(state, dict) and "shards" in state:
        from zoo.model import shards  # torch.distributed.checkpoint

        read = shards.unread if mapped else shards.read
        return read(state, shards_of(path))
    return state


def last_checkpoint(folder: RunFolder, mapped: bool = False) -> tuple[Path | None, dict[str, Any]]:
    """The file of a run's last checkpoint that can be read, and what it holds, `mapped` as in
    `read_file`; (None, {}) before the first.

    What PyTorch cannot read, or refuses to, is passed over in words like what is damaged. UserError
    where none is left.
    """
    unread = ""
    for whole in folder.whole_checkpoints():
        try:
            state = read_file(whole.path, mapped)
            if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
                raise ValueError("it holds no weights")
            if type(state.get("global_step")) is not int:
                raise ValueError("it holds no step")
        except Exception as error:  # torch has no class of its own for what it cannot read
            message = one_line(error)[:120]
            if isinstance(error, pickle.UnpicklingError):
                message = "it holds more than tensors and plain containers, or no pickle"
            unread = f"{whole.path.name} cannot be read ({message})"
            log.warning("%s: %s: passed over", folder, unread)
            reject(whole.path)
            continue
        return whole.path, state
    if unread:
        refuse_path(str(folder), f"has no checkpoint that can be read ({unread})", REPLACE)
    return None, {}
