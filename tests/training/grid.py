"""Train a grid of runs, each under several layouts, in one process that forks the ranks of all.

`python grid.py '[kinds, layouts, dtype]'`, with {name: options}, (processes, micro-batches,
processes to a window, strategy) and the type of weights; what is imported is so once. A text of
three splits lies in text/; runs are runs/<name>-<processes>-<micro-batches>-<processes to a
window>-<strategy>.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from zoo.cli import processes
from zoo.cli import train as program
from zoo.runs.folder import RunFolder

if TYPE_CHECKING:
    from zoo.model.backbone import Backbone

Layout = tuple[int, int, int, str]
STEPS, ROWS = 4, 4
SHARED = "batch_size=12"  # windows that two, three and four processes can share
TAUGHT = ["distil.teacher=runs/base", "distil.temperature=2"]
COMMON = [
    *("size=tiny", "data=text", "data.path=text", "logger=none", "match=none", "seq_len=32"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.log_every_n_steps=1"),
    *(f"batch_size={ROWS}", f"trainer.max_steps={STEPS}", "save_every=2", "valid_windows=20"),
    # A step that rounding cannot turn: AdamW divides what gradient there is by its own size.
    *("optim.eps=1e-2", "optim.lr=1e-2", "optim.warmup_steps=1", "allocator=system"),
]


def layouts_of(words: list[str], layouts: list[Layout]) -> list[Layout]:
    """Those that go with the options: windows that depend on one another are not split, and
    weights not divided where a state is passed on: ddp is in the place of fsdp."""
    carry = "state_passing=carry"
    whole = {carry, "objective=masked", *TAUGHT} & {*words}
    found = [tuple(layout) for layout in layouts if layout[2] == 1 or not whole]
    divided = ("fsdp", "sharded")
    found = [(*one[:3], "ddp") if carry in words and one[3] in divided else one for one in found]
    return [*dict.fromkeys(found)]


def goes_on(words: list[str]) -> bool:
    """Whether runs of the kind are resumed as well."""
    return bool({"state_passing=carry", "data=mqar", SHARED} & {*words})


def run_name(kind: str, layout: Layout) -> str:
    return "-".join(map(str, (kind, *layout)))


def train(*words: str) -> None:
    code = program.main(list(words))
    assert code == 0, f"{words}: exit code {code}"


def given(processes: int, micro: int, ranks: int, strategy: str) -> list[str]:
    """The options of a layout; the strategy `sharded` is fsdp with such checkpoints."""
    words = [f"trainer.devices={processes}", f"trainer.accumulate_grad_batches={micro}"]
    words.append(f"trainer.sequence_parallel={ranks}")
    if strategy == "sharded":
        return [*words, "trainer.strategy=fsdp", "trainer.checkpoint=sharded"]
    return [*words, f"trainer.strategy={strategy}", "trainer.checkpoint=whole"]


def in_dtype(dtype: str) -> None:
    """Train in this type, here and in forked processes: train.py itself has float32 alone."""
    import torch  # not before `processes.load`, which keeps this process fit to be forked

    from zoo.training import fit

    def build(*given: Any) -> tuple[Backbone, dict[str, int]]:
        model, sizes = built(*given)
        return model.to(getattr(torch, dtype)), sizes  # some weights are float32 by name

    built, fit.build_model = fit.build_model, build
    torch.set_default_dtype(getattr(torch, dtype))


def main(kinds: dict[str, list[str]], layouts: list[Layout], dtype: str) -> None:
    processes.load("zoo.training.fit")
    in_dtype(dtype)
    assert processes.can_fork()
    train(*COMMON, "name=base", "-m")  # a sweep of one: in a process of its own
    for kind, words in kinds.items():
        own = {word.partition("=")[0] for word in words}
        if "finetune" in own:
            own |= {"size", "match"}  # the base's
        if "data" in own:  # a task, which has no text
            own.add("data.path")
        common = [w for w in COMMON if w.partition("=")[0] not in own]
        for layout in layouts_of(words, layouts):
            train(*common, f"name={run_name(kind, layout)}", *given(*layout), *words, "-m")
    for kind, words in kinds.items():  # half of a run goes on under another layout
        those = layouts_of(words, layouts)
        for layout in those if goes_on(words) else ():
            half = Path(f"runs/{run_name(f'{kind}-half', layout)}")
            shutil.copytree(f"runs/{run_name(kind, those[-1])}", half)
            (half / f"checkpoints/step={STEPS:08d}.ckpt").unlink()
            RunFolder.open(half).update(status="stopped", step=STEPS // 2)
            train(f"resume={half}", *given(*layout), "-m")


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
