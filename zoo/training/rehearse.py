"""Checks before anything is written whether a run is possible: its model, devices and memory.

An architecture that refuses an argument, an extension that does not fit the model, missing devices
and too little memory are each refused in one line before the run folder exists.
"""

import logging
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from zoo.config.schema.train import TrainConfig
from zoo.config.schema.trainer import Trainer
from zoo.config.tree import flat
from zoo.config.validate import plain
from zoo.devices import machine_memory
from zoo.errors import UserError, refuse
from zoo.model.backbone import Backbone
from zoo.model.block import takes_state
from zoo.model.build import assemble, build_model, count_parameters, refuse_pattern
from zoo.model.checkpoint import vocabulary_of
from zoo.model.extend import extend_as_trained
from zoo.model.lora import add_adapters
from zoo.ops.runtime import dispatch
from zoo.runs.folder import RunFolder
from zoo.training.data import open_data, vocabulary
from zoo.training.distillation import distillation
from zoo.training.partition import (
    micro_batches,
    process_count,
    processes_here,
    ranks_per_window,
    sharded,
)

FROZEN_BYTES = 4  # per parameter in float32
TRAINED_BYTES = 16  # per parameter in float32: itself, its gradient, AdamW's two moments
PROBE_TOKENS = 128  # of one row: activations grow at least linearly with its length


def rehearse(config: TrainConfig) -> None:
    """Raise UserError where the model, the devices or the memory do not allow the run."""
    device = check_devices(config.trainer)
    vocab_size = model_vocabulary(config)
    try:
        with torch.device("meta"):
            model, knobs = build_model(config, vocab_size)
            extend_as_trained(model, config)
    except RuntimeError as error:  # a tensor larger than any can be
        reason = str(error).splitlines()[0]
        refuse("model", config.model.name, reason, "Use smaller sizes")
    if len(model.blocks) < len(config.model.blocks):
        # Here and not where models are built: runs that were trained so can still be opened.
        refuse_pattern(config, len(model.blocks))
    _check_length(config, model.max_length)
    if ranks_per_window(config) > 1:
        _check_chunks("trainer.sequence_parallel", config.trainer.sequence_parallel, model)
    if not isinstance(config.checkpoint_activations, bool):
        _check_chunks("checkpoint_activations", config.checkpoint_activations, model)
    if config.distil.teacher is not None:
        text = open_data(config.data, config.seq_len)
        distillation(config, text.tokenizer_name, text.vocab_size)
    if device == "cpu":
        _check_memory(config, vocab_size, knobs, count_parameters(model))
    elif config.lora.rank is not None:
        _assembled(config, vocab_size, {**knobs, "layers": len(config.model.blocks)})


def model_vocabulary(config: TrainConfig) -> int:
    """Tokens that a run's model has: its data's, or those of the model that it fine-tunes.

    These may be more, where a checkpoint's embedding has more rows than its tokenizer has tokens.
    UserError for data of another vocabulary than the model's.
    """
    tokens = vocabulary(config.data, config.seq_len) + (config.objective == "masked")
    if not config.finetune or not Path(config.finetune).is_dir():  # a run goes on without its base
        return tokens
    base = RunFolder.open(config.finetune)
    known = vocabulary_of(base)
    data, before = flat(plain(config.data)), flat(plain(base.config.data))
    changed = [key for key in ("name", *data) if data[key] != before.get(key)]
    names = [key for key in changed if key in ("name", "tokenizer") or key.startswith("task.")]
    if tokens > known or (names and tokens < known):
        name = (names or changed or ["tokenizer"])[0]
        rule = f"has {tokens:,} tokens, and the model of finetune={base} has {known:,}"
        option = "data" if name == "name" else f"data.{name}"
        refuse(option, data[name], rule, f"Leave {option} out, or train a new run on it")
    return known


def _check_length(config: TrainConfig, most: int | None) -> None:
    """Refuse a state that is passed on beyond the last position of the model."""
    passed = config.seq_len * config.trainer.max_steps
    if config.state_passing == "carry" and most is not None and passed > most:
        rule = f"each row reads on for {passed:,} tokens, and this model reads at most {most:,}"
        refuse("state_passing", "carry", rule, "Use state_passing=none")


def _check_chunks(option: str, value: int | None, model: Backbone) -> None:
    """Refuse to split windows where a layer cannot read on from the state before its chunk."""
    for layer in model.sublayers():
        if not takes_state(layer):
            rule = f"{type(layer).__name__} keeps no state, so its windows cannot be split"
            refuse(option, value, rule, "Leave it out")


def check_devices(trainer: Trainer) -> str:
    """The kind of device that `accelerator` selects here: cpu, cuda or mps.

    Raises UserError where this machine lacks the accelerator or as many devices.
    """
    counts = {"cpu": None, "cuda": torch.cuda.device_count(), "mps": int(torch.mps.is_available())}
    best = next((kind for kind in ("cuda", "mps") if counts[kind]), "cpu")
    accelerator, devices = trainer.accelerator, trainer.devices
    kind = accelerator if accelerator in counts else best
    if (accelerator == "gpu" and best == "cpu") or counts[kind] == 0:
        rule = "this machine has none"
        refuse("trainer.accelerator", accelerator, rule, "Use trainer.accelerator=auto")
    available = counts[kind]
    if isinstance(devices, list) and available is None:
        rule = "a list names GPUs, and this run is on the CPU"
        refuse("trainer.devices", devices, rule, f"Use trainer.devices={len(devices)}")
    needed = max(devices) + 1 if isinstance(devices, list) else devices
    if available is not None and isinstance(needed, int) and needed > available:
        rule = f"this machine has {available}"
        refuse("trainer.devices", devices, rule, f"Use at most {available}")
    return kind


def _check_memory(
    config: TrainConfig, vocab_size: int, knobs: dict[str, int], parameters: int
) -> None:
    """Refuse a run whose lower bound of memory exceeds this machine's.

    The bound: weights, gradients, AdamW's moments, and the activations that a backward pass needs.
    """
    memory = machine_memory()
    if memory is None:
        return
    if config.lora.rank is None:
        copies = 1 if sharded(config) else process_count(config)
        trained = TRAINED_BYTES * parameters * copies // (config.trainer.num_nodes or 1)
        numbers = (
            f"{_bytes(trained)} for {parameters:,} parameters, their gradients and AdamW's moments"
        )
    else:  # those of the adapters are few
        trained = FROZEN_BYTES * parameters * processes_here(config)
        numbers = f"{_bytes(trained)} for {parameters:,} frozen parameters"
    if trained > memory:
        size = config.size
        raise UserError(
            f"size.width={size.width}, size.layers={size.layers}: training needs at least "
            f"{numbers}, and this machine has {_bytes(memory)}. Use a smaller size."
        )
    rows, window = config.batch_size // micro_batches(config), config.seq_len
    read = 8 * rows * (window + 1) * (1 + 2 * config.workers)  # the batch, and those fetched ahead
    step = read if read > memory else read + rows * _activations_per_row(config, vocab_size, knobs)
    if trained + step > memory:
        raise UserError(
            f"batch_size={config.batch_size}, seq_len={window}: a step needs at least "
            f"{_bytes(trained + step)} ({numbers}; {_bytes(step)} for {rows * window:,} tokens at "
            f"once), and this machine has {_bytes(memory)}. Use fewer batch_tokens, "
            "trainer.accumulate_grad_batches=<parts of a step>, checkpoint_activations=true, "
            "a shorter seq_len or a smaller size."
        )


def _activations_per_row(config: TrainConfig, vocab_size: int, knobs: dict[str, int]) -> float:
    """Bytes of activations that one more window in a step saves for the backward pass.

    Measured on a row of `PROBE_TOKENS`, with the pattern's layers once and twice, and extrapolated
    linearly to the window and to all layers. Attention that saves its weights needs more.
    """
    tokens, cycle = min(config.seq_len, PROBE_TOKENS), len(config.model.blocks)
    layers = knobs.get("layers", config.size.layers)
    log, level = logging.getLogger("zoo"), logging.getLogger("zoo").level
    log.setLevel(logging.ERROR)  # the run itself logs which kernels it uses
    try:
        once, twice = (
            _activations(_assembled(config, vocab_size, {**knobs, "layers": n * cycle}), tokens)
            for n in (1, 2)
        )
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        reason = str(error).partition("DefaultCPUAllocator: ")[2].splitlines()[0]
        refuse("model", config.model.name, reason, "Use smaller sizes")
    finally:
        log.setLevel(level)
        dispatch.reset()
    more = max(0, layers - cycle) / cycle * (twice - once)
    return (once + more) * config.seq_len / tokens


def _assembled(config: TrainConfig, vocab_size: int, knobs: dict[str, int]) -> Backbone:
    model = assemble(config, vocab_size, knobs)
    if config.lora.rank is not None:
        add_adapters(model, config.lora)
    return model


def _activations(model: Backbone, tokens: int) -> int:
    """Bytes that a second row of `tokens` tokens adds to the saved activations."""
    return _saved_bytes(model, 2, tokens) - _saved_bytes(model, 1, tokens)


def _saved_bytes(model: Backbone, rows: int, tokens: int) -> int:
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}  # by storage; held, so that no address is used again

    def save(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(save, lambda x: x):
        logits = model(torch.zeros(rows, tokens, dtype=torch.long))
        logits.float().log_softmax(-1)
    return sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in weights)


def _bytes(count: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB", "PB", "EB", "ZB")
    power = min(int(math.log(max(count, 1), 1000)), len(units) - 1)
    return f"{count / 1000**power:.3g} {units[power]}"
