"""Divides a step's windows among processes and micro-batches. Nothing heavy is imported.

A step reads `batch_size` windows (`batch_tokens` tokens) in any number of processes and
micro-batches: these change a run's speed and memory, not what it learns.
"""

import os

from zoo.config.schema.train import TrainConfig
from zoo.devices import cuda_devices, on_cuda
from zoo.errors import UserError, refuse

CPU_PROCESSES = 2  # that share a step unless their number is given


def process_index() -> int:
    """The number of this process among those of all machines, from 0.

    Ranks are given as torchrun does, in the environment.
    """
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def is_first() -> bool:
    """Whether this process is the one of its run that writes the record and speaks."""
    return process_index() == 0


def process_count(config: TrainConfig) -> int:
    """The number of processes on all machines."""
    return processes_here(config) * (config.trainer.num_nodes or 1)


def processes_here(config: TrainConfig) -> int:
    """The number of processes on this machine, one for each device.

    `auto` is one for each chunk of a window; with a strategy that shares a step every CUDA device,
    or on the CPU at least two.
    """
    devices, ranks = config.trainer.devices, ranks_per_window(config)
    if isinstance(devices, list):
        return len(devices)
    if str(devices).isdecimal():
        return int(devices)
    if config.trainer.strategy in (None, "auto"):
        return ranks
    return cuda_devices() if on_cuda(config.trainer.accelerator) else max(ranks, CPU_PROCESSES)


def sharded(config: TrainConfig) -> bool:
    """Whether each process keeps a part of every weight."""
    return config.trainer.strategy == "fsdp"


def ranks_per_window(config: TrainConfig) -> int:
    """The number of processes that read one window together."""
    return config.trainer.sequence_parallel or 1


def micro_batches(config: TrainConfig) -> int:
    """The number of micro-batches in which a process reads its part of a step."""
    given = config.trainer.model_dump().get("accumulate_grad_batches")
    if given is None:
        return 1
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        refuse("trainer.accumulate_grad_batches", given, "must be a whole number of at least 1")
    return given


def check_machines(config: TrainConfig) -> None:
    """Refuse a run on several machines that was not started on each of them."""
    nodes, world = config.trainer.num_nodes or 1, process_count(config)
    if nodes > 1 and os.environ.get("WORLD_SIZE") != str(world):
        here = processes_here(config)
        advice = f"Start it on each by torchrun --nnodes={nodes} --nproc-per-node={here} train.py"
        refuse("trainer.num_nodes", nodes, f"is a run of {world} processes", advice)
    if nodes > 1 and config.fresh:
        rule = "each process of several machines would begin a run of its own"
        refuse("fresh", True, rule, "Leave it out, and use another name=")


def sharing(config: TrainConfig) -> list[str]:
    """A line where one process has a step that several were to share, or more than the cores."""
    if config.trainer.strategy == "ddp" and process_count(config) == 1:
        return ["trainer.strategy=ddp: there is one device, which shares no step with another"]
    if on_cuda(config.trainer.accelerator):
        return []
    given = f"trainer.devices={config.trainer.devices}"
    if config.trainer.devices == "auto":
        given = f"trainer.sequence_parallel={ranks_per_window(config)}"
    line = crowded(given, processes_here(config))
    return [line] if line else []


def crowded(given: str, count: int) -> str:
    """A line where so many processes are more than the cores; `given` is their option."""
    if count <= (cores := os.cpu_count() or 1):
        return ""
    return f"{given}: {count} processes share {cores} cores, and take longer than {cores} would"


def check_partition(config: TrainConfig) -> None:
    """Refuse numbers of processes and micro-batches that do not divide a step's windows."""
    count, micro, windows = process_count(config), micro_batches(config), config.batch_size
    ranks = ranks_per_window(config)
    if count % ranks:
        rule = f"must divide the {count} processes of trainer.devices={config.trainer.devices}"
        refuse("trainer.sequence_parallel", ranks, rule, "Leave trainer.devices out")
    if ranks > config.seq_len:
        rule = f"must be at most seq_len={config.seq_len}, a token for each process"
        refuse("trainer.sequence_parallel", ranks, rule, "Use fewer")
    processes = count // ranks
    if windows % (processes * micro) == 0:
        return
    options = []
    if processes > 1:
        options.append(f"trainer.devices={config.trainer.devices}")
    if (nodes := config.trainer.num_nodes or 1) > 1:
        options.append(f"trainer.num_nodes={nodes}")
    if processes > 1 and ranks > 1:
        options.append(f"trainer.sequence_parallel={ranks}")
    if micro > 1:
        options.append(f"trainer.accumulate_grad_batches={micro}")
    divisors = [n for n in range(1, min(windows, 4096) + 1) if windows % n == 0]
    raise UserError(
        f"{' '.join(options)}: must divide the {windows} windows of a step (batch_size) into equal "
        f"parts. Use a product of {', '.join(map(str, divisors[:12]))}"
        f"{' ..' if len(divisors) > 12 else ''}, or another batch_tokens."
    )
