"""Train a model for a step by processes that divide its weights, and measure their memory.

`python tests/training/peaks.py [processes=2] [from=run] [option of train.py ...]`, in an empty
folder; `from=run` tunes the run of an earlier call, whose weights are read from its checkpoint.

Each process writes the bytes of all weights, and by how many the memory that is not of files had
grown at most while it built the model, after it had, and at most until it had trained and saved:
memory-<rank>.json. The first process prints them all, in parts of the weights.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from building import write_text
from grid import COMMON, given, train

from zoo.cli import processes

SIZES = ["size=small", "size.layers=12", "size.width=640", "size.heads=10", "batch_size=4"]
SIZES += ["trainer.max_steps=1", "valid_windows=1", "allocator=tuned"]


class Memory(threading.Thread):
    """Looks every millisecond at the memory of this process that is not of files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.most = self.now()
        self.start()

    def now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        while True:
            self.most = max(self.most, self.now())
            time.sleep(1e-3)


def main(count: int, tunes: bool, words: list[str]) -> None:
    processes.load("zoo.training.fit")
    from zoo.training import fit

    build, make_learner, fitted = fit._build, fit._learner, fit._fit
    found: dict[str, Any] = {}
    watched: list[Memory] = []

    def built(*args: Any) -> Any:
        if not watched:  # and not once more, to be audited
            watched.append(Memory())
        return build(*args)

    def learner(config: Any, model: Any, *args: Any) -> Any:
        (memory,) = watched
        found["weights"] = 4 * sum(weight.numel() for weight in model.parameters())
        found["building"] = memory.most - memory.start_bytes
        found["built"] = memory.now() - memory.start_bytes
        return make_learner(config, model, *args)

    def trained(*args: Any) -> None:
        fitted(*args)
        (memory,) = watched
        found["training"] = memory.most - memory.start_bytes
        Path(f"memory-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))

    fit._build, fit._learner, fit._fit = built, learner, trained
    if not Path("text").is_dir():
        write_text(Path())
    given_here = {word.partition("=")[0] for word in words}
    own = given_here | {word.partition("=")[0] for word in SIZES}
    common = [word for word in COMMON if word.partition("=")[0] not in own]
    sizes = [word for word in SIZES if word.partition("=")[0] not in given_here]
    if tunes:
        common = [w for w in [*common, *sizes] if not w.startswith(("size", "match"))]
        sizes = ["finetune=runs/whole"]
    name = f"name={'tuned' if tunes else 'whole'}-{count}" if tunes or count > 1 else "name=whole"
    divided = [w for w in given(count, 1, 1, "sharded") if w.partition("=")[0] not in given_here]
    train(*common, *sizes, *divided, name, "threads=1", *words)
    for rank in range(count):
        one = json.loads(Path(f"memory-{rank}.json").read_text())
        parts = {name: f"{value / one['weights']:.2f}" for name, value in one.items()}
        sys.stdout.write(f"{rank + 1} of {count}: {one['weights'] / 1e6:.0f} MB, {parts}\n")


if __name__ == "__main__":
    words = sys.argv[1:]
    numbers = [word for word in words if word.startswith("processes=")]
    count = int(numbers[-1].partition("=")[2]) if numbers else 2
    others = [word for word in words if word not in (*numbers, "from=run")]
    main(count, "from=run" in words, others)
