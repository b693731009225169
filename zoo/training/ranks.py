"""What the processes of one run tell each other. With one process, each has only itself to ask."""

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """The processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return dist.get_rank() if world() > 1 else 0


def gathered(value: Tensor) -> list[Tensor]:
    """The value of each process, of one shape and type, in the order of their ranks."""
    if world() == 1:
        return [value]
    found = [torch.empty_like(value) for _ in range(world())]
    dist.all_gather(found, value.contiguous())
    return found


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether it holds in any process."""
    return any(bool(other) for other in gathered(torch.tensor(int(flag), device=device)))


def told_by(source: int, words: str) -> str:
    """What process `source` has to say."""
    if world() == 1:
        return words
    told: list[str | None] = [words]
    dist.broadcast_object_list(told, src=source)
    return str(told[0])
