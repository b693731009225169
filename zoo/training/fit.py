"""`train` fits the model of a configuration into a run folder; `load` gets it back from there."""

import functools
import json
import logging
import os
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from zoo.config.schema import TrainConfig
from zoo.config.validate import plain
from zoo.console import say
from zoo.data.corpora import Corpus
from zoo.data.examples import SyntheticData
from zoo.devices import cuda_line, prepare
from zoo.errors import UserError
from zoo.model.audit import AUTOCAST, audit, stretch
from zoo.model.backbone import Backbone
from zoo.model.build import build_model, count_parameters
from zoo.model.checkpoint import last_checkpoint, load_weights, trained_weights
from zoo.model.device import device_name
from zoo.model.extend import extend
from zoo.model.flops import forward_flops
from zoo.ops.runtime import dispatch
from zoo.ops.runtime.allocator import tune_allocator
from zoo.report import wandb
from zoo.runs.files import one_line, write_text
from zoo.runs.folder import RunFolder
from zoo.runs.stopping import current
from zoo.training.callbacks import Checkpoints, Metrics
from zoo.training.learner import Learner, NonFiniteError
from zoo.training.shares import micro_batches, process_count
from zoo.training.windows import Windows, open_data, validation

log = logging.getLogger("zoo")


def train(config: TrainConfig, folder: RunFolder, until: int | None = None) -> None:
    """Train the configured model in its run folder, from its last good checkpoint if it has one.

    It pauses at step `until`, on the schedule of the whole run, which the next call goes on with.

    Writes metrics, checkpoints and the status as it goes; of several processes the first does.
    Raises UserError for what the user can mend, NonFiniteError when the loss is lost,
    KeyboardInterrupt after a stop by signal.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    log.setLevel(logging.INFO if first else logging.ERROR)
    if not first:
        warnings.simplefilter("ignore")  # the first process says it too
    if config.threads:
        torch.set_num_threads(config.threads)
    elif (processes := process_count(config)) > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    dispatch.reset()
    if config.allocator == "tuned" and (told := tune_allocator()):
        log.info("%s; allocator=system leaves it alone", told)
    data = open_data(config.data, config.seq_len)
    _check_data(data, folder)
    lightning.seed_everything(config.seed, verbose=False)
    model, knobs = build_model(config, data.vocab_size + (config.objective == "masked"))
    last, state = last_checkpoint(folder)
    if config.finetune and not last:
        model.load_state_dict(trained_weights(RunFolder.open(config.finetune)))
    extend(model, config.extension, config.seq_len)
    if state:
        load_weights(model, state, folder)
        del state
    learner = Learner(
        model=model,
        optim=config.optim,
        max_steps=config.trainer.max_steps,
        seq_len=config.seq_len,
        state_passing=config.state_passing,
        micro_batches=micro_batches(config),
        rows=config.batch_size,
    )
    stop, tokens_per_step = current(), config.batch_size * config.seq_len
    checkpoints = Checkpoints(
        folder, every=config.save_every, tokens_per_step=tokens_per_step, stop=stop
    )
    metrics = Metrics(
        folder,
        valid=validation(data, config),
        valid_every=config.valid_every,
        tokens_per_step=tokens_per_step,
        stop=stop,
    )
    about = {
        "parameters": count_parameters(model),
        "flops_per_token": forward_flops(model, config.seq_len),
        "sized": knobs,
        "tokens_per_step": tokens_per_step,
        "fingerprint": data.fingerprint,
        "tokenizer": data.tokenizer,
        "data": data.summary,
        "threads": torch.get_num_threads(),
    }
    trainer = _trainer(config, folder, [metrics, checkpoints], about, until)
    cuda = prepare(trainer.strategy.root_device.type)
    if first:
        device = device_name(trainer.strategy.root_device)
        if cuda:
            say(f"{cuda_line(config.trainer.precision, trainer.world_size)}; {cuda}")
        folder.update(**about, device=device, processes=trainer.world_size)
        if isinstance(data, Corpus):
            record_documents(data, folder)
        _tell(config, data, about)
    try:
        with stop.deferred():
            _fit(trainer, learner, Windows(data, config), last)
    except NonFiniteError as error:
        good = folder.checkpoint()
        raise NonFiniteError(f"{error}; last good checkpoint: {good or 'none yet'}") from None
    finally:
        if first:
            folder.update(backends=dispatch.used_backends())
    if checkpoints.interrupted:
        by = stop.requested or "SIGTERM"  # which another process may have got
        raise KeyboardInterrupt(f"stopped by {by} at step {trainer.global_step}")
    if first:
        if trainer.global_step >= config.trainer.max_steps:
            model.to(trainer.strategy.root_device)  # which fit has left
            folder.update(audit=_audited(model, data, config))
        _conclude(config, folder, trainer, metrics)


def _fit(trainer: lightning.Trainer, learner: Learner, windows: Windows, last: Path | None) -> None:
    """Lightning's `fit`, in which signals are ours alone, and a stop is one."""
    # Lightning's handler of SIGTERM broadcasts, in the midst of whatever the others are doing.
    trainer._signal_connector.register_signal_handlers = lambda: None
    try:
        trainer.fit(
            learner, datamodule=windows, ckpt_path=str(last) if last else None, weights_only=True
        )
    except SystemExit as end:  # what it makes of a KeyboardInterrupt
        if isinstance(end.__context__, KeyboardInterrupt):
            raise end.__context__ from None
        raise


def _trainer(
    config: TrainConfig,
    folder: RunFolder,
    callbacks: list[Any],
    about: Mapping[str, Any],
    until: int | None,
) -> lightning.Trainer:
    """Lightning's Trainer under the run's options. UserError where this machine has no such."""
    options = config.trainer.model_dump()
    options["max_steps"] = until or options["max_steps"]
    if options["devices"] == "auto":
        options["devices"] = 1
    if process_count(config) > 1:  # a carried state's parameters have no gradient in the first step
        options["strategy"] = "ddp_find_unused_parameters_true"
    make = functools.partial(
        lightning.Trainer,
        **{
            "max_epochs": -1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "log_every_n_steps": 10,
            **options,
        },
        enable_checkpointing=False,
        default_root_dir=folder.path,
    )
    try:
        make(callbacks=[*callbacks], logger=False)  # before W&B begins a run that cannot be
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        given = (f"trainer.{key}={options[key]}" for key in ("accelerator", "devices"))
        told = str(error).split(". ")[0].rstrip(".")
        raise UserError(
            f"{' '.join(given)}: not to be had on this machine ({told}). Use trainer.accelerator="
            "auto or cpu, and trainer.devices=1."
        ) from None
    return make(callbacks=[*callbacks], logger=_logger(config, folder, about))


def _tell(config: TrainConfig, data: Corpus | SyntheticData, about: Mapping[str, Any]) -> None:
    """What is trained, on what."""
    say(f"model: {config.model.name}, {about['parameters']:,} parameters")
    steps = f"{config.trainer.max_steps:,} steps of {about['tokens_per_step']:,} tokens"
    if isinstance(data, SyntheticData):
        say(f"data: {data.name}, generated, {data.symbols} symbols; {steps}")
        return
    text, read = len(data.train), config.trainer.max_steps * about["tokens_per_step"]
    say(
        f"data: {data.name}, {text:,} tokens to train on, {len(data.valid):,} to validate "
        f"({data.tokenizer}); {steps} read it {read / text:.2g} times"
    )


def _conclude(
    config: TrainConfig, folder: RunFolder, trainer: lightning.Trainer, metrics: Metrics
) -> None:
    """Record how far the run came, and say what comes next."""
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


def _audited(model: Backbone, data: Corpus | SyntheticData, config: TrainConfig) -> dict[str, Any]:
    """What the audit for leaks finds on the trained weights, as run.json holds it."""
    lengths = config.seq_len, 2 * config.seq_len
    text, dtype = stretch(data.text("valid"), lengths[1]), AUTOCAST.get(config.trainer.precision)
    try:
        return audit(model, text, lengths=lengths, autocast=dtype).record()
    except Exception as error:  # such as too little memory: no reason to lose the training
        log.warning("the audit for leaks could not be carried out: %s", one_line(error))
        return {"ok": None, "reason": one_line(error)}


def _logger(config: TrainConfig, folder: RunFolder, about: Mapping[str, Any]) -> Any:
    """W&B's mirror of the run folder, or False for none: the first process has it alone."""
    if config.logger.name == "none" or os.environ.get("LOCAL_RANK", "0") != "0":
        return False
    from lightning.pytorch.loggers import WandbLogger

    info = folder.info
    run = wandb.begin(
        config.logger.mode,
        project=config.logger.project,
        name=folder.name,
        dir=str(folder.path),
        config={**plain(config), "run": {**about, "commit": info.get("commit")}},
        job_type="train",
        group=info.get("sweep"),
        id=info.get("wandb"),
        resume="allow",
    )
    folder.update(wandb=run.id)
    return WandbLogger(experiment=run)


def record_documents(corpus: Corpus, folder: RunFolder) -> None:
    """Write which document went into which split to the run's documents.json."""
    names = {store.name: store.documents for store in (corpus.train, corpus.valid, corpus.test)}
    write_text(folder.path / "documents.json", json.dumps(names, indent=0) + "\n")


def _check_data(data: Corpus | SyntheticData, folder: RunFolder) -> None:
    """Refuse to go on with a run on another text or task than it began on."""
    info = folder.info
    began = info.get("fingerprint")
    if info["step"] and began and began != data.fingerprint:
        raise UserError(
            f"data={data.name} is not the text that {folder} was trained on so far: its "
            f"fingerprint is {data.fingerprint[:8]}, the run's {began[:8]}. Put the text back, "
            "name it with data.path=, or begin a new run with fresh=true"
        )


# Lightning's advertisements and notes to itself; what matters here is said by the callbacks.
for library in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(library).setLevel(logging.WARNING)
for noise in (
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    ".*weights_only.*",
    ".*find_unused.*",
):
    warnings.filterwarnings("ignore", message=noise)
