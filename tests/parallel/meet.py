"""Says, a line each, why two processes cannot work together: `python meet.py`."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from zoo.cli import processes
from zoo.errors import RunError


def other_versions() -> None:
    import torch.distributed as dist

    from zoo.training.distributed import check_versions

    dist.init_process_group("gloo")
    check_versions({"python": "3.12", "torch": f"2.{dist.get_rank()}"})


def join() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")


def said(function: Callable[[], None]) -> None:
    try:
        processes.run(function, count=2)
    except RunError as error:
        sys.stdout.write(f"{error}\n")


def main() -> None:
    processes.load("zoo.training.distributed")
    assert processes.can_fork()
    said(other_versions)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes._rendezvous, processes.LEFT = lambda count: about, 0.5
        said(join)
    sys.stdout.write(f"{port}\n")


if __name__ == "__main__":
    main()
