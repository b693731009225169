"""What it costs to split a window: time and memory of a step over ranks against one process.

So many processes of one thread each are measured against one process, in turns.

`python tests/parallel/cost.py [ranks=2] [rounds=3] [what=step] [json=] [option of train.py ...]`

`what=scores` measures a text instead, as `eval.py task=perplexity` reads it; `json=<file>` adds a
row to the file.

CPU time is that of ranks which each have a core of their own, on whatever machine: every rank has a
clock of its CPU time, a message brings the sender's, and who receives one from the future waits
until then. What messages themselves take is left out. It is given over that of one process with one
thread, divided by the number of ranks, which no number of threads can undercut. Wall time is given
over that of one process with as many threads as there are ranks; it holds only of a machine that
does nothing else and has a core for each. Memory is the most that tensors take at a time.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels/bench"))

from zoo.cli import processes

CLOCK = 16  # of a message's tag: the sender's clock
SHORT = 1024  # tokens
CHUNK = 4096  # tokens read at a time where a text is measured: task.perplexity.chunk


class Spent(NamedTuple):
    """What a call took: seconds of a clock and of the wall's, and the most bytes of tensors."""

    seconds: float
    wall: float
    bytes: float

    @classmethod
    def by(cls, call: Callable[[], None], clock: Callable[[], float]) -> "Spent":
        import torch

        from zoo.tasks.memory import peak_bytes

        spent: list[float] = []

        def timed() -> None:
            started, wall = clock(), time.perf_counter()
            call()
            spent.extend([clock() - started, time.perf_counter() - wall])

        peak = peak_bytes(torch.device("cpu"), timed)
        seconds, seconds_of_wall = spent
        return cls(seconds, seconds_of_wall, float(peak or 0))


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def measure(words: list[str], rounds: int, what: str, file: str | None) -> None:
    """Print the ratios of time and of memory; in the first rank."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from building import train_config
    from record import machine
    from torch import Tensor

    from zoo.model.build import build_model, count_parameters
    from zoo.model.chunks import chunk_loss
    from zoo.parallel.ranks import Ranks
    from zoo.tasks.context import EvalContext, score
    from zoo.tasks.readers import chunk_nats

    class Timed(Ranks):
        """Ranks whose messages bring the clock."""

        waited = 0.0

        def clock(self) -> float:
            return time.thread_time() + self.waited

        def send(self, x: Tensor, to: int, tag: int) -> None:
            now = torch.tensor([self.clock()], dtype=torch.float64)
            super().send(now, to, tag + CLOCK)
            super().send(x, to, tag)

        def receive(self, like: Tensor, source: int, tag: int) -> Tensor:
            now = super().receive(torch.empty(1, dtype=torch.float64), source, tag + CLOCK)
            self.waited += max(0.0, float(now) - self.clock())
            return super().receive(like, source, tag)

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Timed(dist.get_world_size(), dist.get_rank())
    config = train_config("size=small", "data=stdlib", "match=none", *words)
    length = config.seq_len
    torch.manual_seed(0)
    model = build_model(config, 256)[0]
    tokens = torch.randint(256, (1, length + 1))

    about: dict[str, Any] = {"data": SimpleNamespace(tokenizer=SimpleNamespace(bos=None))}
    about |= {"model": model, "folder": Path(), "train_length": length}
    alone_context, context = EvalContext(**about), EvalContext(**about, ranks=ranks)

    def whole(tokens: Tensor = tokens) -> None:
        if what == "step":
            return model.loss(tokens).backward()
        with context.arithmetic():
            score(alone_context, np.asarray(tokens), chunk=CHUNK)

    def split(tokens: Tensor = tokens) -> None:
        if what == "step":
            chunk_loss(model, ranks, tokens[:, :-1], tokens[:, 1:]).backward()
        else:
            with context.arithmetic():
                chunk_nats(context, tokens, CHUNK)
        ranks.finish()

    def gathered(x: float) -> list[float]:
        found = [torch.zeros(1, dtype=torch.float64) for _ in range(ranks.size)]
        dist.all_gather(found, torch.tensor([x], dtype=torch.float64))
        return [float(one) for one in found]

    found: dict[str, list[Any]] = defaultdict(list)
    for turn in range(rounds + 1):  # the first, of a short text, builds kernels
        text = tokens if turn else tokens[:, : SHORT + 1]
        # In every rank, so that both are measured beside the same others.
        model.zero_grad(set_to_none=True)
        alone = Spent.by(partial(whole, text), time.thread_time)
        model.zero_grad(set_to_none=True)
        dist.barrier()
        ranks.waited = waited = -time.thread_time()  # all clocks begin at 0
        together = Spent.by(partial(split, text), ranks.clock)
        clocks, waits = gathered(together.seconds), gathered(ranks.waited - waited)
        walls, peaks = gathered(together.wall), gathered(together.bytes)
        model.zero_grad(set_to_none=True)
        if ranks.index == 0:
            torch.set_num_threads(ranks.size)
            threads = Spent.by(partial(whole, text), time.perf_counter)
            torch.set_num_threads(1)
            if turn:
                found["seconds_alone"].append(alone.seconds)
                found["seconds_together"].append(max(clocks))
                found["waiting"].append([round(wait / max(clocks), 3) for wait in waits])
                found["wall_alone"].append(threads.wall)
                found["wall_together"].append(max(walls))
                found["bytes_alone"].append(int(alone.bytes))
                found["bytes_of_ranks"].append([int(peak) for peak in peaks])
        dist.barrier()
    if ranks.index == 0:
        pairs = zip(found["seconds_together"], found["seconds_alone"], strict=True)
        times = [together * ranks.size / alone for together, alone in pairs]
        walls = [b / a for b, a in zip(found["wall_together"], found["wall_alone"], strict=True)]
        memory = [
            max(parts) / most
            for parts, most in zip(found["bytes_of_ranks"], found["bytes_alone"], strict=True)
        ]
        if file:
            row = {"model": config.model.name, "parameters": count_parameters(model)}
            given = [word for word in sys.argv[1:] if not word.startswith("json=")]
            row |= {"what": what, "command": " ".join(["cost.py", *given])}
            row |= {"options": words, "length": length, "ranks": ranks.size}
            row |= {"time_ratios": times, "wall_ratios": walls, "memory_ratios": memory, **found}
            row |= {"date": datetime.now(UTC).date().isoformat(), "machine": machine()}
            rows = json.loads(Path(file).read_text()) if Path(file).is_file() else []
            Path(file).write_text(json.dumps([*rows, row], indent=1) + "\n")
        n = ranks.size
        sys.stdout.write(
            f"{config.model.name}, {length} tokens, {what}, {n} processes of one thread:\n"
            f"CPU time    {_spread(times)} of 1/{n} of one process's "
            f"{statistics.median(found['seconds_alone']):.2f} s, waiting {found['waiting'][-1]}\n"
            f"wall time   {_spread(walls)} of one process's with {n} threads, "
            f"{statistics.median(found['wall_alone']):.2f} s\n"
            f"memory      {_spread(memory)} of one process's "
            f"{statistics.median(found['bytes_alone']) / 2**20:.0f} MiB\n"
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    count, rounds = int(given.pop("ranks", 2)), int(given.pop("rounds", 3))
    what, file = given.pop("what", "step"), given.pop("json", None)
    if what not in ("step", "scores"):
        sys.exit(f"what={what}: must be step or scores.")
    processes.load("zoo.tasks.readers")
    sys.path.insert(0, str(Path(__file__).parent))
    import cost

    words = [f"{k}={v}" for k, v in given.items()]
    processes.run(cost.measure, words, rounds, what, file, count=count)
