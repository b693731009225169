"""How a step's windows are dealt to processes and micro-batches. Nothing heavy is imported.

A step reads `batch_size` windows (`batch_tokens` tokens), however many processes share them and
however many micro-batches each reads them in: these change the speed and the memory of a run, not
what is learned.
"""

from zoo.config.schema import TrainConfig
from zoo.errors import UserError


def process_count(config: TrainConfig) -> int:
    """The processes that train side by side, one for each device; `auto` is one device."""
    devices = config.trainer.devices
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdecimal() else 1


def micro_batches(config: TrainConfig) -> int:
    """The micro-batches that a process reads its share of a step in."""
    given = config.trainer.model_dump().get("accumulate_grad_batches")
    if given is None:
        return 1
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise UserError(
            f"trainer.accumulate_grad_batches={given}: must be a whole number of 1 or more"
        )
    return given


def check_shares(config: TrainConfig) -> None:
    """Refuse processes and micro-batches that a step's windows cannot be dealt to equally."""
    processes, micro, windows = process_count(config), micro_batches(config), config.batch_size
    if windows % (processes * micro) == 0:
        return
    told = []
    if processes > 1:
        told.append(f"trainer.devices={config.trainer.devices}")
    if micro > 1:
        told.append(f"trainer.accumulate_grad_batches={micro}")
    fit = [n for n in range(1, min(windows, 4096) + 1) if windows % n == 0]
    raise UserError(
        f"{' '.join(told)}: must divide the {windows} windows of a step (batch_size) into equal "
        f"parts. Use a product of {', '.join(map(str, fit[:12]))}{' ..' if len(fit) > 12 else ''}, "
        "or another batch_tokens."
    )
