"""What it costs to split a window: time and memory of a step over ranks against one process.

`python tests/parallel/cost.py [ranks=2] [rounds=3] [what=step] [json=] [option of train.py ...]`

`what=scores` measures a text instead, as `eval.py task=perplexity` reads it; `json=<file>` adds a
row to the file.

Time is that of ranks which each have a core of their own, on whatever machine: every rank has a
clock of its CPU time, a message brings the sender's, and who receives one from the future waits
until then. What messages themselves take is left out. It is given over that of one process with one
thread, divided by the number of ranks, which no number of threads can undercut.
"""

import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels/bench"))

from zoo.cli import processes

CLOCK = 16  # of a message's tag: the sender's clock
SHORT = 1024  # tokens
CHUNK = 4096  # tokens read at a time where a text is measured: task.perplexity.chunk


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
    from zoo.tasks.memory import peak_bytes
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

    alone, together, waits = [], [], []
    for turn in range(rounds + 1):  # the first, of a short text, builds kernels
        text = tokens if turn else tokens[:, : SHORT + 1]
        start = time.thread_time()
        whole(text)  # in every rank, so that both are measured beside the same others
        spent = time.thread_time() - start
        start, waited = ranks.clock(), ranks.waited
        ranks.waited -= start  # all clocks begin at 0
        split(text)
        took, waited = gathered(ranks.clock()), gathered(ranks.waited + start - waited)
        if turn and ranks.index == 0:
            alone.append(spent)
            together.append(max(took))
            waits.append([f"{w / max(took):.2f}" for w in waited])
        model.zero_grad(set_to_none=True)
    device = torch.device("cpu")
    memory = [peak_bytes(device, split)]
    model.zero_grad(set_to_none=True)
    peaks = gathered(float(memory[0] or 0))
    if ranks.index == 0:
        most = peak_bytes(device, whole) or 0
        ratios = [b * ranks.size / a for a, b in zip(alone, together, strict=True)]
        if file:
            row = {"model": config.model.name, "parameters": count_parameters(model)}
            row |= {"what": what, "options": words, "length": length, "ranks": ranks.size}
            row |= {"seconds_alone": alone, "seconds_together": together, "time_ratios": ratios}
            row |= {"bytes_alone": most, "bytes_of_ranks": [int(peak) for peak in peaks]}
            row |= {"date": datetime.now(UTC).date().isoformat(), "machine": machine()}
            rows = json.loads(Path(file).read_text()) if Path(file).is_file() else []
            Path(file).write_text(json.dumps([*rows, row], indent=1) + "\n")
        sys.stdout.write(
            f"{config.model.name} {length} tokens, {what}, {ranks.size} ranks: time "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of "
            f"{statistics.median(alone):.2f} s / {ranks.size}, waiting {waits[-1]}; memory "
            f"{[f'{peak / most:.2f}' for peak in peaks]} of {most / 2**20:.0f} MiB\n"
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
