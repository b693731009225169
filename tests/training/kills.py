"""Kill runs at random points, let them go on, and compare them with unbroken ones, bit for bit.

`python kills.py <seed> '{name: options}'` beside a text in text/. Runs are forks of one process
that has imported the libraries. A run is killed when its metrics reach a step drawn at random, and
a few milliseconds later: on the way into a step, a validation or a checkpoint.
"""

import csv
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from zoo.cli import processes
from zoo.cli import train as program
from zoo.config.compose import compose
from zoo.runs.provenance import sources

STEPS = 30
COMMON = [
    *("size=tiny", "data=text", "data.path=text", "logger=none", "match=none", "seq_len=32"),
    *("trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "batch_size=4"),
    *(f"trainer.max_steps={STEPS}", "save_every=4", "valid_every=5", "valid_windows=8"),
]


def begin(words: list[str]) -> int:
    """The process id of a run that a fork of this process begins."""
    child = os.fork()
    if not child:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(program.main(words))
    return child


def finish(child: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"exit code {code}:\n{Path('log.txt').read_text()}"


def step(name: str) -> int:
    """The last step in the run's metrics."""
    try:
        with open(f"runs/{name}/metrics.csv") as file:
            return max((int(row["step"]) for row in csv.DictReader(file)), default=0)
    except (FileNotFoundError, ValueError):
        return 0


def kill_at(child: int, name: str, at: int, later: float) -> bool:
    """Whether it was killed on the way: when it was past step `at`."""
    while step(name) < at:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            assert code == 0, f"exit code {code}:\n{Path('log.txt').read_text()}"
            return False
        time.sleep(0.001)
    time.sleep(later)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main(seed: int, kinds: dict[str, list[str]]) -> None:
    draw = random.Random(seed)
    processes.load("zoo.training.fit")
    sources(compose("train", COMMON))  # read once, not in every fork
    finish(begin([*COMMON, "name=base"]))
    for kind, given in kinds.items():
        kept = any(word.startswith("finetune=") for word in given)  # the run's own
        words = [w for w in COMMON if not (kept and w.startswith(("size=", "match=")))] + given
        finish(begin([*words, f"name={kind}-whole"]))
        kills = 0
        for at in sorted(draw.sample(range(1, STEPS - 5), 3)):
            child = begin([*words, f"name={kind}-killed"])
            kills += kill_at(child, f"{kind}-killed", at, draw.uniform(0, 0.03))
        finish(begin([*words, f"name={kind}-killed"]))
        sys.stdout.write(f"{kind}: {kills} kills\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
