"""Measures run folders in one process and in several: `python reading.py <folder> <options>`.

Of two processes the second one ends itself when it reads a text of run `killed`, as the system does
when memory runs out; of run `raises` the layers cannot compute.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of this script is there already

from zoo.cli import processes
from zoo.config.compose import compose
from zoo.runs.folder import RunFolder


def main(folder: Path, words: list[str]) -> int:
    processes.load("zoo.tasks.evaluate")
    import torch
    from fakes import VOCABULARY, random_text, text_corpus, text_store

    import zoo.tasks.measured_run as driver
    from zoo.model.backbone import Backbone
    from zoo.model.build import build_model
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
        model = build_model(run.config, VOCABULARY)[0].double().eval().requires_grad_(False)
        if failing := {"killed": killed, "raises": broken}.get(run.name):
            model.blocks[1].register_forward_pre_hook(failing)
        return model

    corpus = text_corpus(text_store(random_text(2000)))
    driver.load = load
    driver.open_data = lambda data, seq_len: corpus
    driver.Leaks.check = lambda self, wanted: None  # which would call the layers
    found, code = [RunFolder.open(run) for run in sorted(folder.iterdir())], 0
    for more in ([], ["sequence_parallel=2"]):
        assert processes.can_fork()
        how = {"say": lambda _: None, "progress": Progress(), "apart": processes.run}
        code = evaluate(compose("eval", [*words, *more]), found, **how)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
