"""Train a model of 200 MB for a step by two processes, in a folder with text/, under fsdp.

Each writes when, in seconds, and with what memory, in bytes, it began to build the model, had built
it, had cut it and ended its training: parts-<rank>.json.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from grid import COMMON, given, train

from zoo.cli import processes

SIZES = ["size=small", "size.layers=4", "size.width=1024", "size.heads=8", "batch_size=2"]
SIZES += ["trainer.max_steps=1"]


def held() -> int:
    """Bytes of this process that are not of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> None:
    processes.load("zoo.training.fit")
    from zoo.training import fit, sharding

    build, cut, fitted, found = fit._build, sharding.cut, fit._fit, {}

    def noted(name: str) -> None:
        found[name] = [time.monotonic(), held()]

    def built(*args: Any) -> Any:
        if "before" in found:  # once more, to be audited
            return build(*args)
        noted("before")
        whole = build(*args)
        noted("built")
        return whole

    def was_cut(*args: Any, **about: Any) -> Any:
        parts = cut(*args, **about)
        noted("cut")
        return parts

    def trained(*args: Any) -> None:
        fitted(*args)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        about = {**found, "peak": 1024 * peak}
        Path(f"parts-{os.environ['RANK']}.json").write_text(json.dumps(about))

    fit._build, sharding.cut, fit._fit = built, was_cut, trained
    own = {word.partition("=")[0] for word in SIZES}
    common = [word for word in COMMON if word.partition("=")[0] not in own]
    how = given(2, 1, 1, "sharded")
    train(*common, *SIZES, *how, "name=a", "model=transformer", "threads=1")


if __name__ == "__main__":
    main()
