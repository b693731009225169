"""Makes a run of a trained one with a smaller model, which is measured and tuned like any other."""

import uuid
from functools import partial
from pathlib import Path

import torch

from zoo.config.schema.model import Shrunk
from zoo.config.schema.train import TrainConfig
from zoo.config.validate import plain, validate
from zoo.errors import refuse, refuse_path
from zoo.model.backbone import Backbone
from zoo.model.build import count_parameters
from zoo.model.checkpoint import load
from zoo.model.flops import forward_flops
from zoo.model.shrink import pruned, shrink
from zoo.runs.checkpoints import seal
from zoo.runs.claim import trained_by, weights_of
from zoo.runs.files import replacing
from zoo.runs.folder import RunFolder
from zoo.runs.provenance import digest, provenance, sources

FROM_BASE = ("fingerprint", "tokenizer", "data", "tokens_seen", "tokens_per_step", "step")


def shrunk_run(how: Shrunk, to: Path | None = None) -> str:
    """Write the run of a smaller model; return what was made, in a line.

    Args:
        how: the trained run, and how its model becomes smaller.
        to: the new folder; None: beside the run, under its name and the rank or share.

    Raises:
        UserError: the run is not whole or not done, was made smaller already, or has no layer to
            make smaller; the folder exists or cannot be written.
    """
    base = RunFolder.open(how.run)
    info, config = base.info, base.config
    if info["status"] != "done":
        refuse("run", how.run, f"its training is {info['status']}", "Train it to its end first")
    if config.shrunk is not None:
        rule = f"is a smaller model already, of {config.shrunk.run}"
        refuse("run", how.run, rule, "Shrink that run")
    setting = f"rank{how.rank}" if how.rank else f"sparsity{how.sparsity}".replace(":", "of")
    path = to or base.path.with_name(f"{base.path.resolve().name}-{setting}")
    if path.exists():
        refuse_path(path, "exists already", "Name another folder: to=<new folder>")
    model = load(base)
    before = count_parameters(model)
    shrink(model, how)
    whole = {"checkpoint": None, "lora": {}}  # its own weights, whatever they were read from
    made = validate(TrainConfig, plain(config) | whole | {"shrunk": plain(how)})
    files, zeros = sources(made), sum(int((~nonzero).sum()) for _, nonzero in pruned(model))
    facts = {
        **{name: info[name] for name in FROM_BASE if name in info},
        **{"id": uuid.uuid4().hex[:12], **provenance()},
        **{"sources": digest(files), "files": files, "shrunk": plain(how) | {"zeros": zeros}},
        "base": {"run": how.run, "weights": weights_of(base), "sources": trained_by(info)},
        "parameters": count_parameters(model),
        "flops_per_token": forward_flops(model, config.seq_len),
    }
    folder = RunFolder.create(path, made, facts | {"status": "done"}, partial(_save, model=model))
    if not folder.created:  # meanwhile, by another process
        refuse_path(path, "exists already", "Name another folder: to=<new folder>")
    smaller = f"{count_parameters(model):,} of {before:,} parameters"
    return f"{folder}: {smaller}" + (f", {zeros:,} of them zero" if zeros else "")


def _save(folder: RunFolder, model: Backbone) -> None:
    """Write the weights as a checkpoint after the step of the trained run."""
    step = folder.info["step"]
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    with replacing(folder.path / "checkpoints" / f"step={step:08d}.ckpt") as file:
        torch.save({"state_dict": state, "global_step": step}, file)
        seal(file, folder.info["id"], step)
