"""Measures run folders of which some end the process: `python crashing.py <folder> <options>`.

The model of run `killed` sends itself SIGKILL when it reads more than 64 tokens at once, as the
system does when memory runs out; `broken` raises what nobody foresaw.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of this script is there already

from zoo.cli import processes
from zoo.config.compose import compose
from zoo.runs.folder import RunFolder
from zoo.runs.provenance import sources


def main(folder: Path, words: list[str]) -> int:
    processes.load("zoo.tasks.evaluate")
    sources()  # read once, not in every fork
    from fakes import Remembers, random_text, text_corpus, text_store

    import zoo.tasks.measured_run as driver
    from zoo.tasks.evaluate import evaluate
    from zoo.tasks.progress import Progress

    class Killed(Remembers):
        def forward(self, tokens, state=None):
            if tokens.shape[1] > 64:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(tokens, state)

    def broken(folder: RunFolder) -> None:
        assert folder.name != "broken", "this cannot be"

    assert "lightning" not in sys.modules, "measuring does not need it, and it takes seconds"
    corpus = text_corpus(text_store(random_text(2000)))
    driver.load = lambda folder, *_: (Killed if folder.name == "killed" else Remembers)(5)
    driver.open_data = lambda data, seq_len: corpus
    driver._report_code = broken
    folders = [RunFolder.open(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    config = compose("eval", words)
    for _ in range(2):  # drawing a report leaves a process that can be forked
        assert processes.can_fork()
        code = evaluate(
            config, folders, say=sys.stdout.write, progress=Progress(), apart=processes.run
        )
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
