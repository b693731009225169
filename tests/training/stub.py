"""The programs with a learner that trains nothing: what happens around it, in a second.

`python stub.py <how the learner behaves> [option ...]`
"""

import ctypes
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from zoo.cli import processes
from zoo.cli import train as program
from zoo.errors import RunError
from zoo.runs import stopping


def done(config, folder, until=None) -> None:
    (folder.path / "checkpoints/step=00001000.ckpt").write_bytes(b"")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        folder.update(status="done", step=config.trainer.max_steps)


def crash(config, folder, until=None) -> None:
    if config.seed == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    done(config, folder)


def crash_of_one_rank(config, folder, until=None) -> None:
    if os.environ["LOCAL_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def refuse(config, folder, until=None) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "1":
        raise RunError("the loss is nan at step 3")
    time.sleep(0.3)
    raise ConnectionError("connection closed by peer")


def steps(config, folder, until=None) -> None:
    """Ends at the end of a step, once requested."""
    stop = stopping.current()
    with stop.deferred():
        print("training", flush=True)  # noqa: T201
        while not stop.requested:
            time.sleep(0.05)
    raise KeyboardInterrupt(f"stopped by {stop.requested} at step 7")


def one_long_step(config, folder, until=None) -> None:
    """In C, where Python cannot run its handlers, longer than any test waits."""
    with stopping.current().deferred():
        print("training", flush=True)  # noqa: T201
        library = ctypes.CDLL(None)
        for _ in range(3000):
            library.usleep(100_000)


def broken_by_it(config, folder, until=None) -> None:
    """What a stop interrupts may fail in any way."""
    print("training", flush=True)  # noqa: T201
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise RecursionError("maximum recursion depth exceeded") from None


def building(config, folder, until=None) -> None:
    """Before the steps: a first signal ends it where it is."""
    print("training", flush=True)  # noqa: T201
    for _ in range(6000):
        time.sleep(0.01)


def main(how: str, words: list[str]) -> int:
    module = types.ModuleType("zoo.training.fit")
    module.train = globals()[how.removesuffix("_in_a_thread")]  # type: ignore[attr-defined]
    sys.modules["zoo.training.fit"] = module
    rehearsal = types.ModuleType("zoo.training.rehearse")
    rehearsal.rehearse = lambda config: None  # type: ignore[attr-defined]
    sys.modules["zoo.training.rehearse"] = rehearsal
    stopping.GRACE = processes.GRACE = float(os.environ.get("GRACE", stopping.GRACE))
    given, codes = list(sys.argv), []
    if how.endswith("_in_a_thread"):
        thread = threading.Thread(target=lambda: codes.append(program.main(words)))
        thread.start()
        thread.join()
    else:
        codes.append(program.main(words))
    assert sys.argv == given, "the caller's command line is not ours"
    return codes[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], ["size=tiny", "logger=none", *sys.argv[2:]]))
