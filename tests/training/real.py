"""Runs that go wrong, stop early or go on, in one process that imports the libraries once.

`python real.py` beside a text in text/: writes what each run came to into codes.json.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from zoo.cli import processes
from zoo.cli import train as program
from zoo.config.compose import compose
from zoo.runs.provenance import sources

COMMON = [
    *("size=tiny", "data=text", "data.path=text", "match=none", "seq_len=32", "batch_size=4"),
    *("trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "valid_windows=8"),
]


def fork(*words: str) -> int:
    """The exit code of the program in a fork of this process."""
    child = os.fork()
    if not child:
        os._exit(program.main(list(words)))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def not_a_number() -> None:
    """From now on, the loss of the second process is none at its third step."""
    from zoo.training.learner import Learner

    loss, calls = Learner.loss, iter(range(100))

    def broken(self, *given, **more):
        value = loss(self, *given, **more)
        second = os.environ.get("LOCAL_RANK") == "1" and self.training
        return value * float("nan") if second and next(calls) == 2 else value

    Learner.loss = broken  # type: ignore[method-assign]


def main() -> dict[str, int]:
    processes.load("zoo.training.fit")
    sources(compose("train", COMMON))  # read once, not in every fork
    new = [*COMMON, "logger=none"]
    codes = {
        "short": fork(
            *new, "name=short", "trainer.max_steps=100000", "trainer.max_time=00:00:00:01"
        ),
        "long": fork(*new, "name=long", "trainer.max_steps=10", "optim.warmup_steps=2"),
    }
    steps = json.loads(Path("runs/short/run.json").read_text())["step"]
    codes["fewer"] = fork("resume=runs/long", "trainer.max_steps=9")
    more = [f"trainer.max_steps={steps + 3}", "trainer.max_time=00:01:00:00"]
    codes["rest"] = fork("resume=runs/short", *more)
    for how in ("cosine", "constant", "rewarm"):
        os.system(f"cp -r runs/long runs/{how}")
        words = [] if how == "cosine" else [f"optim.continuation={how}"]
        codes[how] = fork(f"resume=runs/{how}", "trainer.max_steps=20", *words)
    codes["alone"] = fork(*new, "name=alone", "trainer.max_steps=9", "optim.continuation=constant")
    wandb = [*COMMON, "logger.mode=offline", "name=wandb"]
    codes["wandb"] = fork(*wandb, "trainer.max_steps=4", "trainer.devices=2")
    codes["again"] = fork("resume=runs/wandb", "trainer.max_steps=6")
    not_a_number()
    words = [*new, "name=lost", "trainer.max_steps=9", "trainer.devices=2", "save_every=1"]
    codes["lost"] = fork(*words)
    return codes


if __name__ == "__main__":
    Path("codes.json").write_text(json.dumps(main()))
