"""Train a grid of runs, each under several layouts, in one process that forks the ranks of all.

`python grid.py '[kinds, layouts]'`, with {name: options} and (processes, micro-batches); what is
imported is so once. A text of three splits lies in text/; runs/<name>-<processes>-<micro-batches>.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from zoo.cli import processes
from zoo.cli import train as program
from zoo.runs.folder import RunFolder

STEPS, ROWS = 4, 4
COMMON = [
    *("size=tiny", "data=text", "data.path=text", "logger=none", "match=none", "seq_len=32"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.log_every_n_steps=1"),
    *(f"batch_size={ROWS}", f"trainer.max_steps={STEPS}", "save_every=2", "valid_windows=20"),
    # A step that rounding cannot turn: AdamW divides what gradient there is by its own size.
    *("optim.eps=1e-2", "optim.lr=1e-2", "optim.warmup_steps=1", "allocator=system"),
]


def train(*words: str) -> None:
    code = program.main(list(words))
    assert code == 0, f"{words}: exit code {code}"


def main(kinds: dict[str, list[str]], layouts: list[tuple[int, int]]) -> None:
    processes.load("zoo.training.fit")
    assert processes.can_fork()
    train(*COMMON, "name=base", "-m")  # a sweep of one: in a process of its own
    for kind, words in kinds.items():
        own = {word.partition("=")[0] for word in words}
        if "finetune" in own:
            own |= {"size", "match"}  # the base's
        if "data" in own:  # a task, which has no text
            own.add("data.path")
        for ranks, micro in layouts:
            given = f"trainer.devices={ranks}", f"trainer.accumulate_grad_batches={micro}"
            common = [w for w in COMMON if w.partition("=")[0] not in own]
            train(*common, f"name={kind}-{ranks}-{micro}", *given, *words, "-m")
    for kind in kinds:  # half of a run in several processes goes on under another layout
        for ranks, micro in layouts if "carry" in kind else ():
            half = Path(f"runs/{kind}-half-{ranks}-{micro}")
            shutil.copytree("runs/{}-{}-{}".format(kind, *layouts[1]), half)
            (half / f"checkpoints/step={STEPS:08d}.ckpt").unlink()
            RunFolder.open(half).update(status="stopped", step=STEPS // 2)
            given = f"trainer.devices={ranks}", f"trainer.accumulate_grad_batches={micro}"
            train(f"resume={half}", *given, "-m")


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
