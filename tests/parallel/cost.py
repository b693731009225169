"""What it costs to split a window: time and memory of a step over ranks against one process.

`python tests/parallel/cost.py [ranks=2] [rounds=3] [option of train.py ...]`

Time is that of ranks which each have a core of their own, on whatever machine: every rank has a
clock of its CPU time, a message brings the sender's, and who receives one from the future waits
until then. What messages themselves take is left out. It is given over that of one process with one
thread, divided by the number of ranks, which no number of threads can undercut.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo.cli import processes

CLOCK = 16  # of a message's tag: the sender's clock


def measure(words: list[str], rounds: int) -> None:
    """Print the ratios of time and of memory; in the first rank."""
    import torch
    import torch.distributed as dist
    from building import train_config
    from torch import Tensor

    from zoo.model.build import build_model
    from zoo.model.chunks import chunk_loss
    from zoo.parallel.ranks import Ranks
    from zoo.tasks.memory import peak_bytes

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

    def whole() -> None:
        model.loss(tokens).backward()

    def split() -> None:
        chunk_loss(model, ranks, tokens[:, :-1], tokens[:, 1:]).backward()
        ranks.finish()

    def gathered(x: float) -> list[float]:
        found = [torch.zeros(1, dtype=torch.float64) for _ in range(ranks.size)]
        dist.all_gather(found, torch.tensor([x], dtype=torch.float64))
        return [float(one) for one in found]

    alone, together, waits = [], [], []
    for turn in range(rounds + 1):  # the first builds kernels and tables
        start = time.thread_time()
        whole()  # in every rank, so that both are measured beside the same others
        spent = time.thread_time() - start
        start, waited = ranks.clock(), ranks.waited
        ranks.waited -= start  # all clocks begin at 0
        split()
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
        sys.stdout.write(
            f"{config.model.name} {length} tokens, {ranks.size} ranks: time "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of "
            f"{statistics.median(alone):.2f} s / {ranks.size}, waiting {waits[-1]}; memory "
            f"{[f'{peak / most:.2f}' for peak in peaks]} of {most / 2**20:.0f} MiB\n"
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    count, rounds = int(given.pop("ranks", 2)), int(given.pop("rounds", 3))
    processes.load("zoo.model.build")
    sys.path.insert(0, str(Path(__file__).parent))
    import cost

    processes.run(cost.measure, [f"{k}={v}" for k, v in given.items()], rounds, count=count)
