"""Measures run folders in two processes, a and b in one too: `python reading.py <folder> <words>`.

Of two processes the second one ends itself when it reads a text of run `killed`, as the system does
when memory runs out; of run `raises` the layers cannot compute. Behind the first text of run
`second` the second process ends itself, of run `first` the first one: these two are measured once
more at the end, without that. Each time the second process is slow with the texts of run `b`.
"""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of this script is there already

from zoo.cli import processes
from zoo.config.compose import compose
from zoo.runs.folder import RunFolder
from zoo.runs.provenance import sources

SLOW = 0.2  # seconds


def main(folder: Path, words: list[str]) -> int:
    processes.load("zoo.tasks.evaluate")
    sources()  # read once, not in every fork
    import torch
    from fakes import random_text, text_corpus, text_store

    import zoo.tasks.measured_run as driver
    from zoo.data.tokenizers import BYTE_TOKENIZER
    from zoo.model.backbone import Backbone
    from zoo.model.build import build_model
    from zoo.tasks import readers
    from zoo.tasks.evaluate import evaluate
    from zoo.tasks.progress import Progress

    def broken(*_) -> None:
        if driver.ranks_here().size > 1:
            raise RuntimeError("no such layer")

    def killed(*_) -> None:
        if driver.ranks_here().index:
            os.kill(os.getpid(), signal.SIGKILL)

    def load(run: RunFolder, *_) -> Backbone:
        torch.manual_seed(0)
        model = (
            build_model(run.config, BYTE_TOKENIZER.vocab_size)[0]
            .double()
            .eval()
            .requires_grad_(False)
        )
        if failing := {"killed": killed, "raises": broken}.get(run.name):
            model.blocks[1].register_forward_pre_hook(failing)
        return model

    def share(context, *command):
        index, run = driver.ranks_here().index, context.folder.name
        if (run, index) == ("b", 1):
            time.sleep(SLOW)
        found = shared(context, *command)
        if (run, index) in lost:
            while index and not (context.folder / "results.jsonl").exists():
                time.sleep(0.02)  # what was found has not arrived yet
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    shared, readers._share = readers._share, share
    lost = {("second", 1), ("first", 0)}
    corpus = text_corpus(text_store(random_text(2000)))
    corpus = dataclasses.replace(corpus, tokenizer=BYTE_TOKENIZER)
    driver.load = load
    driver.open_data = lambda data, seq_len: corpus
    driver.Leaks.check = lambda self, wanted: None  # which would call the layers

    def measure(runs: list[str], *more: str) -> int:
        assert processes.can_fork()
        how = {"say": lambda _: None, "progress": Progress(), "apart": processes.run}
        folders = [RunFolder.open(folder / run) for run in runs]
        return evaluate(compose("eval", [*words, *more]), folders, **how)

    found = sorted(run.name for run in folder.iterdir())
    measure(["a", "b"])
    code = measure(found, "sequence_parallel=2")
    lost.clear()
    if measure(["first", "second"], "sequence_parallel=2"):
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
