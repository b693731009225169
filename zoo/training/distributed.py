"""Collective operations between the processes of one run. With one process each is local."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from zoo.errors import RunError
from zoo.parallel.ranks import Ranks


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def ranks_of_window(count: int) -> Ranks:
    """The `count` consecutive processes that read this one's windows together."""
    index = rank() % count
    return Ranks(count, index, rank() - index)


def whole(value: Tensor) -> Tensor:
    """The tensor, put together where each process has a part of it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def all_gather(value: Tensor) -> list[Tensor]:
    """Return the value of each process, in the order of ranks; all have one shape and dtype."""
    if world_size() == 1:
        return [value]
    found = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(found, value.contiguous())
    return found


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds in any process."""
    return any(bool(other) for other in all_gather(torch.tensor(int(flag), device=device)))


def check_versions(own: Mapping[str, str | None]) -> None:
    """Raise RunError, in every process, where one has another version of something than the first.

    Args:
        own: this process's versions by name.
    """
    if world_size() == 1:
        return
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, dict(own))
    for number, other in enumerate(found, 1):
        for name, version in other.items():
            if version != found[0][name]:
                raise RunError(
                    f"process {number} of {len(found)} has {name} {version} and the first "
                    f"{found[0][name]}: install the same on all machines; the same command goes on"
                )


def broadcast_text(text: str, source: int) -> str:
    """Return the text of process `source`."""
    if world_size() == 1:
        return text
    texts: list[str | None] = [text]
    dist.broadcast_object_list(texts, src=source)
    return str(texts[0])
