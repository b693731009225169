"""What a training run writes beside its metrics: run.json, documents.json, the audit, W&B."""

import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

import lightning

from zoo.config.schema.train import TrainConfig
from zoo.config.validate import plain
from zoo.console import say
from zoo.data.corpora import Corpus
from zoo.data.examples import SyntheticData
from zoo.model.audit import AUTOCAST, audit, stretch
from zoo.model.backbone import Backbone
from zoo.model.device import device_name
from zoo.report import wandb
from zoo.runs.files import one_line, write_text
from zoo.runs.folder import RunFolder
from zoo.training.callbacks import MetricsLogger
from zoo.training.partition import is_first

MAX_NAMES = 100_000  # documents of a split that are recorded by name
RECORD = re.compile(r":\d+$")  # the number of a record in its file, at the end of a name

log = logging.getLogger("zoo")


def record_start(
    config: TrainConfig,
    folder: RunFolder,
    data: Corpus | SyntheticData,
    trainer: lightning.Trainer,
    facts: Mapping[str, Any],
) -> None:
    """Record the model, the data and the device in the folder, and print the first two."""
    device = device_name(trainer.strategy.root_device)
    folder.update(**facts, device=device, processes=trainer.world_size)
    say(f"model: {config.model.name}, {facts['parameters']:,} parameters")
    steps = f"{config.trainer.max_steps:,} steps of {facts['tokens_per_step']:,} tokens"
    if isinstance(data, SyntheticData):
        say(f"data: {data.name}, generated, {data.symbols} symbols; {steps}")
        return
    record_documents(data, folder)
    text, read = len(data.train), config.trainer.max_steps * facts["tokens_per_step"]
    say(
        f"data: {data.name}, {text:,} tokens to train on, {len(data.valid):,} to validate "
        f"({data.tokenizer_name}); {steps} read it {read / text:.2g} times"
    )


def conclude(
    config: TrainConfig, folder: RunFolder, trainer: lightning.Trainer, metrics: MetricsLogger
) -> None:
    """Record how far the run came, and print the command that goes on from there."""
    step, last, name = trainer.global_step, config.trainer.max_steps, shlex.quote(str(folder))
    if step >= last:
        folder.update(status="done", reason=None)
        loss = "" if metrics.valid_loss is None else f", validation loss {metrics.valid_loss:.4f}"
        say(f"saved to {folder}{loss}; next: python eval.py run={name}")
        return
    limit = config.trainer.model_dump().get("max_time")
    by = f"trainer.max_time={limit} at step" if limit else "step"
    folder.update(status="stopped", reason=f"stopped by {by} {step} of {last}")
    say(f"stopped by {by} {step} of {last}; python train.py resume={name} goes on")


def audit_trained(
    model: Backbone, data: Corpus | SyntheticData, config: TrainConfig
) -> dict[str, Any]:
    """The audit for leaks on the trained weights, as run.json holds it."""
    lengths = config.seq_len, 2 * config.seq_len
    text, dtype = stretch(data.text("valid"), lengths[1]), AUTOCAST.get(config.trainer.precision)
    try:
        return audit(model, text, lengths=lengths, autocast=dtype).record()
    except Exception as error:  # such as too little memory: no reason to lose the training
        log.warning("the audit for leaks could not be carried out: %s", one_line(error))
        return {"ok": None, "reason": one_line(error)}


def wandb_logger(config: TrainConfig, folder: RunFolder, facts: Mapping[str, Any]) -> Any:
    """W&B's copy of the run folder, in the first process; False for none."""
    if config.logger.name == "none" or not is_first():
        return False
    from lightning.pytorch.loggers import WandbLogger

    info = folder.info
    run = wandb.begin(
        config.logger.mode,
        project=config.logger.project,
        name=folder.name,
        dir=str(folder.path),
        config={**plain(config), "run": {**facts, "commit": info.get("commit")}},
        job_type="train",
        group=info.get("sweep"),
        id=info.get("wandb"),
        resume="allow",
    )
    folder.update(wandb=run.id)
    return WandbLogger(experiment=run)


def end_wandb(trainer: lightning.Trainer, *, failed: bool) -> None:
    """End W&B's copy, if there is one: a process that was forked does not do so when it exits, and
    W&B's service, which others may share, would hold the run and refuse that it goes on."""
    for logger in trainer.loggers:
        logger.experiment.finish(exit_code=int(failed))  # type: ignore[attr-defined]


def record_documents(corpus: Corpus, folder: RunFolder) -> None:
    """Write which document went into which split to the run's documents.json.

    Of very many documents, the number from each file that holds several.
    """
    names: dict[str, Any] = {}
    for store in (corpus.train, corpus.valid, corpus.test):
        names[store.name] = store.documents
        if len(names[store.name]) > MAX_NAMES:
            by_file = Counter(RECORD.sub("", name) for name in names[store.name])
            if len(by_file) < len(names[store.name]):
                names[store.name] = by_file
    write_text(folder.path / "documents.json", json.dumps(names, indent=0) + "\n")
