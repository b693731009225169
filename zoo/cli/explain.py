"""`train.py --explain`: what a run would cost, before anything is trained or written.

Operations and memory are measured on short windows of the model itself and extrapolated to the
run's: linearly in the window's length from the two longest ones, so that what grows with its square
comes out too low. Memory is what PyTorch allocates; the system's allocator may add a tenth. Where
weights are divided among processes, what is gathered of them for a block is not counted.
"""

import logging

import torch

from zoo.config.schema.train import TrainConfig
from zoo.devices import machine_memory
from zoo.model.backbone import Backbone
from zoo.model.build import build_model, count_parameters
from zoo.model.chunks import bytes_sent
from zoo.model.extend import extend_as_trained
from zoo.model.flops import forward_flops
from zoo.model.lora import add_adapters
from zoo.model.recompute import forward_passes
from zoo.ops.runtime.sizes import ceil_div
from zoo.parallel.ranks import Ranks
from zoo.report.words import count, size
from zoo.tasks.memory import peak_bytes
from zoo.training.partition import (
    micro_batches,
    process_count,
    processes_here,
    ranks_per_window,
    sharded,
)
from zoo.training.rehearse import FROZEN_BYTES, TRAINED_BYTES, model_vocabulary, rehearse

log = logging.getLogger("zoo")

PROBE = 8192  # tokens of the longest window that is measured
NUMBER = 4  # bytes of a weight or gradient in float32
STATES = (1, 8, 64)  # training lengths after which the state is measured


def explain(config: TrainConfig) -> str:
    """The costs, a line each. Raises UserError where the run is not possible."""
    rehearse(config)
    model, sized = build_model(config, model_vocabulary(config))
    extend_as_trained(model, config)
    parameters, length = count_parameters(model), config.seq_len
    processes, micro, ranks = process_count(config), micro_batches(config), ranks_per_window(config)
    rows, chunk = config.batch_size * ranks // (processes * micro), ceil_div(length, ranks)
    tokens, passes = config.batch_size * length, 2 + forward_passes(model, length)
    passes -= config.lora.rank is not None  # frozen weights have no gradient
    level = log.level
    log.setLevel(logging.ERROR)  # which kernels run is the run's to say
    try:
        flops = forward_flops(model, length)
        if config.lora.rank is not None:
            add_adapters(model, config.lora)
        activations = step_bytes(model, rows, chunk)
    finally:
        log.setLevel(level)
    if ranks > 1:
        activations += 2 * model.state_bytes(length - chunk, rows)  # received, and its gradient
    tuned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = count_parameters(model) - tuned
    trained = FROZEN_BYTES * frozen + TRAINED_BYTES * tuned
    activations -= NUMBER * tuned  # the gradients, which are among what is trained
    held = ceil_div(trained, processes) if sharded(config) else trained
    whole = processes_here(config) * (held + activations)
    # With fsdp what is outside of the blocks is gathered once, the blocks once more to go back.
    inside = count_parameters(model.blocks)
    passes_sent = micro * (2 * tuned + inside) if sharded(config) else 2 * tuned
    knobs = ", ".join(f"{name}={value}" for name, value in sized.items())
    steps = config.trainer.max_steps
    lines = {
        "model": f"{config.model.name}, {parameters:,} parameters" + (f" ({knobs})" * bool(knobs)),
        "step": f"{tokens:,} tokens: {processes} process{'es' * (processes > 1)} x {micro} "
        f"micro-batch{'es' * (micro > 1)} x {rows} window{'s' * (rows > 1)} of {length:,}"
        f"{f', {ranks} processes to a window' * (ranks > 1)}",
        "operations": f"{count(flops / 1e6)} MFLOP a token forward, "
        f"{count(passes * flops * tokens / 1e9)} GFLOP a step, "
        f"{count(passes * flops * tokens * steps / 1e12)} TFLOP in {steps:,} steps",
        "memory": f"{size(held)} for weights, gradients and moments, {size(activations)} more at "
        f"the peak of a step{', in each process' * (processes > 1)}; {size(whole)} in all"
        f"{' on each machine' * ((config.trainer.num_nodes or 1) > 1)}{_of_machine(whole)}",
        "state": _states(model, length),
    }
    if processes > 1:
        sent = (processes - 1) / processes * NUMBER * passes_sent
        what = "weights and gradients" if sharded(config) else "the gradients"
        lines["sent"] = f"{size(sent)} a step by each process, its share of {what}"
    if ranks > 1:
        places = [Ranks(ranks, index) for index in range(ranks)]
        most = micro * max(bytes_sent(model, one, length, rows, sharded(config)) for one in places)
        lines["sent"] += f"; up to {size(most)} for states of split windows and their gradients"
    width = max(map(len, lines)) + 2
    return "".join(f"{name:<{width}}{text}\n" for name, text in lines.items())


def _states(model: Backbone, length: int) -> str:
    if not model.causal:
        return "none: the model reads both ways"
    after = [times * length for times in STATES]
    after = [n for n in after if model.max_length is None or n <= model.max_length]
    return ", ".join(f"{size(model.state_bytes(n))} after {n:,} tokens" for n in after)


def _of_machine(needed: int) -> str:
    memory = machine_memory()
    return "" if memory is None else f", {needed / memory:.0%} of this machine's {size(memory)}"


def step_bytes(model: Backbone, rows: int, length: int) -> int:
    """Bytes allocated at the peak of a step over `rows` windows, its gradients among them.

    Measured up to `PROBE` tokens of one and two windows, and extrapolated.
    """
    long = max(model.min_window, min(length, PROBE))
    one = peak(model, 1, long)
    more = peak(model, 2, long) - one if rows > 1 else 0
    if length > long:
        shorter = 3 * long // 4  # near: ops cut long texts otherwise than short ones
        slope = (one - peak(model, 1, shorter)) / (long - shorter)
        scale = 1 + slope * (length - long) / one
        one, more = round(one * scale), round(more * scale)
    return one + (rows - 1) * more


def peak(model: Backbone, rows: int, length: int) -> int:
    """Bytes that PyTorch holds at the peak of a forward and backward pass, beside the weights."""
    tokens = torch.zeros(rows, length + 1, dtype=torch.long)

    def step() -> None:
        if model.causal:
            loss = model.loss(tokens)
        else:
            shown = tokens[:, 1:]
            loss = model.masked_loss(shown, shown, torch.ones_like(shown, dtype=torch.bool))
        loss.backward()

    step()  # builds kernels and tables that stay
    model.zero_grad(set_to_none=True)
    found = peak_bytes(tokens.device, step)
    model.zero_grad(set_to_none=True)
    assert found is not None  # it is on the CPU
    return found
