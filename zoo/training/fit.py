"""Trains the model of a configuration in its run folder, through Lightning's Trainer."""

import logging
import re
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import lightning
import torch
from torch import Tensor

from zoo.config.schema.train import TrainConfig
from zoo.console import say
from zoo.data.corpora import Corpus
from zoo.data.examples import SyntheticData
from zoo.devices import cuda_line, machine_memory, prepare
from zoo.errors import NonFiniteError, RunError, refuse, refuse_path
from zoo.locks import alone_on_machine
from zoo.model.backbone import Backbone, BackboneState
from zoo.model.build import build_model, count_parameters
from zoo.model.checkpoint import (
    REPLACE,
    base_of,
    base_weights,
    last_checkpoint,
    load_weights,
    refuse_checkpoint,
    vocabulary_of,
    weights_in,
)
from zoo.model.extend import extend
from zoo.model.flops import forward_flops
from zoo.model.later import Later
from zoo.model.lora import add_adapters, trained_names
from zoo.ops.runtime import dispatch
from zoo.ops.runtime.allocator import tune_allocator
from zoo.runs.checkpoints import step_of
from zoo.runs.claim import check_data
from zoo.runs.folder import RunFolder
from zoo.runs.provenance import digest, sources, versions
from zoo.runs.stopping import current
from zoo.training.callbacks import Checkpoints, MetricsLogger
from zoo.training.data import open_data, validation
from zoo.training.distillation import Distillation, distillation
from zoo.training.learner import Learner
from zoo.training.partition import (
    is_first,
    micro_batches,
    process_count,
    process_index,
    processes_here,
    ranks_per_window,
    sharded,
)
from zoo.training.pruning import KeepZeros
from zoo.training.records import (
    audit_trained,
    conclude,
    end_wandb,
    record_start,
)
from zoo.training.rehearse import FROZEN_BYTES
from zoo.training.trainer import make_trainer
from zoo.training.unused import every_weight_learns
from zoo.training.windows import Windows

if TYPE_CHECKING:
    from zoo.training.sharding import Cut

log = logging.getLogger("zoo")


def train(config: TrainConfig, folder: RunFolder, until: int | None = None) -> None:
    """Train the configured model in its run folder, from its last whole checkpoint if it has one.

    With `until` it pauses after that step; the schedule stays that of the whole run, and the next
    call continues it.

    Writes metrics, checkpoints and the status as it goes; of several processes the first does.
    Raises UserError for what the user can change, NonFiniteError where the loss is not finite,
    KeyboardInterrupt after a stop by signal.
    """
    stop, first = current(), is_first()
    stop.check()
    _prepare_process(config, first)
    data = open_data(config.data, config.seq_len)
    check_data(data.name, data.fingerprint, folder)
    lightning.seed_everything(config.seed, verbose=False)
    cut = _cutting(config)
    model, sizes, checkpoint, weights = _build(config, folder, data.vocab_size, cut)
    with cut.zeros(model) if cut else nullcontext():
        facts = _facts(config, data, model, sizes)
        empty = model.empty_state(1) if cut else None
    before = (folder.info.get("teacher") or {}).get("weights")
    taught = distillation(config, data.tokenizer_name, data.vocab_size, before)
    if taught is not None:
        facts["teacher"] = taught.facts(config.seq_len)
        if first:
            said = f"{facts['teacher']['flops_per_token']:,} FLOPs a token"
            say(f"{config.distil.teacher} teaches, {said} beside {facts['flops_per_token']:,}")
    if config.lora.rank is not None:
        facts |= _adapt(config, folder, model, weights)
    del weights  # as large as the model
    metrics, checkpoints = _callbacks(config, folder, data, step_of(checkpoint))
    zeros = _keep_zeros(config, model)  # before a step is measured or saved
    alone = process_count(config) == 1 or sharded(config)
    alike = alone or every_weight_learns(model, config)
    trainer = make_trainer(config, folder, [*zeros, metrics, checkpoints], facts, until, alike)
    tf32 = prepare(trainer.strategy.root_device.type)
    if first:
        if tf32:
            say(f"{cuda_line(config.trainer.precision, trainer.world_size)}; {tf32}")
        record_start(config, folder, data, trainer, facts)
    try:
        with stop.deferred():
            learner = _learner(config, model, taught, cut.parts if cut else None, empty)
            _fit(trainer, learner, Windows(data, config), checkpoint)
    except NonFiniteError as error:
        good = folder.checkpoint()
        raise NonFiniteError(f"{error}; last good checkpoint: {good or 'none yet'}") from None
    finally:
        if first:
            folder.update(backends=dispatch.used_backends())
        end_wandb(trainer, failed=sys.exc_info()[0] is not None)
    if checkpoints.interrupted:
        by = stop.requested or "SIGTERM"  # which another process may have received
        raise KeyboardInterrupt(f"stopped by {by} at step {trainer.global_step}")
    if first:
        if trainer.global_step >= config.trainer.max_steps:
            folder.update(audit=_audit(config, folder, data, model, trainer.strategy.root_device))
        conclude(config, folder, trainer, metrics)


def _audit(
    config: TrainConfig,
    folder: RunFolder,
    data: Corpus | SyntheticData,
    model: Backbone,
    device: torch.device,
) -> dict[str, Any]:
    """The audit of the trained model, which is built as a whole where this process has a part."""
    if sharded(config):
        memory, size = machine_memory(), FROZEN_BYTES * count_parameters(model)
        if memory is not None and 2 * size > memory:  # what was trained is still in the other half
            reason = f"the model has {size / 1e9:.3g} GB, too much for one process"
            log.warning("the audit for leaks could not be carried out: %s", reason)
            return {"ok": None, "reason": reason}
        model = _build(config, folder, data.vocab_size)[0]
    model.to(device)  # which fit has left
    return audit_trained(model, data, config)


def _prepare_process(config: TrainConfig, first: bool) -> None:
    """Set this process's logging, threads and allocator; only the first process logs."""
    log.setLevel(logging.INFO if first else logging.ERROR)
    if not first:
        warnings.simplefilter("ignore")
    if config.threads:
        torch.set_num_threads(config.threads)
    elif (processes := processes_here(config)) > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    dispatch.reset()
    if config.allocator == "tuned" and (line := tune_allocator(returns=sharded(config))):
        log.info("%s; allocator=system leaves it alone", line)


def _build(
    config: TrainConfig, folder: RunFolder, vocab_size: int, cut: "Cut | None" = None
) -> tuple[Backbone, dict[str, int], Path | None, dict[str, Tensor]]:
    """Build the model with the weights it starts from.

    Where weights are divided `cut` takes this process's parts of them, and of a checkpoint it is
    restored from nothing else is read.

    It has the tokens of what it goes on from, which may be more than the data's `vocab_size`.

    Returns it, the sizes that `match` chose, the checkpoint it was restored from, if any, and what
    that holds.
    """
    take, load = cut or (lambda _: None), cut.load if cut else Backbone.load_state_dict
    checkpoint, state = last_checkpoint(folder, mapped=cut is not None)
    restored, adapts = weights_in(state), config.lora.rank is not None
    base, tokens = None, vocab_size + (config.objective == "masked")
    if config.finetune and (adapts or not checkpoint):
        base = base_of(folder) if adapts else RunFolder.open(config.finetune)
        tokens = vocabulary_of(base)
    elif isinstance(known := restored.get("embedding.weight"), Tensor | Later):
        tokens = known.shape[0]
    model, sizes = build_model(config, tokens, take)
    for stage in config.stages:
        extend(model, stage.extension, stage.seq_len)
    take(model)  # frequencies
    if base is not None:
        # A GGUF file is converted as a whole: in one process after another.
        with alone_on_machine(folder.path) if cut else nullcontext():
            weights = base_weights(folder, base, mapped=cut is not None)
            load_weights(model, weights, partial(_refuse_base, config), load)
            del weights
    extend(model, config.extension, config.seq_len)
    take(model)
    if restored and not adapts:
        load_weights(model, restored, partial(refuse_checkpoint, folder), load)
    return model, sizes, checkpoint, restored


def _refuse_base(config: TrainConfig, why: str) -> NoReturn:
    rule = f"its weights do not fit this model ({why})"
    refuse("finetune", config.finetune, rule, "Leave the options of the model out")


def _cutting(config: TrainConfig) -> "Cut | None":
    """What takes this process's parts of the weights, where these are divided."""
    if not sharded(config):
        return None
    from zoo.training.sharding import Cut  # a second to import

    return Cut(process_index(), process_count(config))


def _adapt(
    config: TrainConfig, folder: RunFolder, model: Backbone, weights: dict[str, Tensor]
) -> dict[str, Any]:
    """Freeze the model beside adapters, with the weights of a checkpoint if there are any.

    Returns the entry of run.json about them.
    """
    add_adapters(model, config.lora)
    trained = trained_names(model)
    if weights and {*weights} != trained:
        refuse_path(str(folder), "config.yaml's lora does not fit the checkpoint", REPLACE)
    model.load_state_dict(weights, strict=False)
    numbers = sum(model.get_parameter(name).numel() for name in trained)
    return {"trained_parameters": numbers}


def _facts(
    config: TrainConfig, data: Corpus | SyntheticData, model: Backbone, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """The entries of run.json about a run's model and data."""
    return {
        "parameters": count_parameters(model),
        "flops_per_token": forward_flops(model, config.seq_len),
        "sized": sizes,
        "tokens_per_step": config.batch_size * config.seq_len,
        "fingerprint": data.fingerprint,
        "tokenizer": data.tokenizer_name,
        "data": data.summary,
        "threads": torch.get_num_threads(),
    }


def _callbacks(
    config: TrainConfig, folder: RunFolder, data: Corpus | SyntheticData, reached: int
) -> tuple[MetricsLogger, Checkpoints]:
    shared: dict[str, Any] = {
        "tokens_per_step": config.batch_size * config.seq_len,
        "stop": current(),
    }
    valid = validation(data, config)
    if (held := len(valid["tokens"])) < config.valid_windows and is_first():
        few = f"the validation text holds {held} of {config.seq_len} tokens"
        say(f"valid_windows={config.valid_windows}: {few}")
    every = config.valid_every
    metrics = MetricsLogger(folder, valid=valid, valid_every=every, reached=reached, **shared)
    divided = (config.trainer.checkpoint or "whole") if sharded(config) else None
    return metrics, Checkpoints(folder, every=config.save_every, divided=divided, **shared)


def _keep_zeros(config: TrainConfig, model: Backbone) -> list[Any]:
    pruned = config.shrunk is not None and config.shrunk.sparsity is not None
    return [KeepZeros(model)] if pruned else []


def _learner(
    config: TrainConfig,
    model: Backbone,
    taught: Distillation | None,
    parts: dict[Tensor, Tensor] | None,
    empty: BackboneState | None,
) -> Learner:
    return Learner(
        model=model,
        optim=config.optim,
        max_steps=config.trainer.max_steps,
        seq_len=config.seq_len,
        state_passing=config.state_passing,
        micro_batches=micro_batches(config),
        rows=config.batch_size,
        sequence_parallel=ranks_per_window(config),
        distillation=taught,
        parts=parts,
        empty=empty,
        versions=_versions(config) if (config.trainer.num_nodes or 1) > 1 else None,
    )


def _versions(config: TrainConfig) -> dict[str, str | None]:
    return {**versions(), "sources of zoo": digest(sources(config))}


def _fit(trainer: lightning.Trainer, learner: Learner, windows: Windows, last: Path | None) -> None:
    """Run Lightning's `fit` without its signal handlers; a stop raises KeyboardInterrupt.

    RunError where a process is waited for too long.
    """
    # Lightning's handler of SIGTERM broadcasts while the other processes do something else.
    trainer._signal_connector.register_signal_handlers = lambda: None
    try:
        trainer.fit(
            learner, datamodule=windows, ckpt_path=str(last) if last else None, weights_only=True
        )
    except RuntimeError as error:
        waited = re.search(r"[Tt]imed out waiting (\d+)ms", str(error))
        if waited is None:
            raise
        minutes = f"{int(waited[1]) / 60_000:.3g} minutes"
        rule = f"a process waited {minutes} for another one, which hangs or is too slow"
        raise RunError(f"{rule}; the same command goes on from the last checkpoint") from None
    except SystemExit as end:  # what it makes of a KeyboardInterrupt
        if isinstance(end.__context__, KeyboardInterrupt):
            raise end.__context__ from None
        raise
