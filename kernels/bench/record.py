"""What every bench says of the machine, and how it keeps its figures."""

import json
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, its widest instructions, threads and versions: what a time belongs to."""
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """Its model and number of cores, as Linux reports them; else the architecture."""
    with suppress(OSError):
        fields = [x.partition(":") for x in Path("/proc/cpuinfo").read_text().splitlines()]
        names = [value.strip() for key, _, value in fields if key.strip() == "model name"]
        if names:
            return f"{len(names)} x {names[0]}"
    return platform.machine()


def record(path: Path | None, **figures: Any) -> None:
    """Write the figures with the command, the date and the machine; nothing without a path."""
    if path:
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
        about = {"command": " ".join(words), "date": datetime.now(UTC).date().isoformat()}
        path.write_text(json.dumps(about | {"machine": machine()} | figures, indent=1) + "\n")
