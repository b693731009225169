"""Starts the ranks of `chunks.read_all`, forked from this process: what is done here is so once.

`python ranks.py ranks report '{name: [model, extension, lengths]}'`
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo.cli import processes

if __name__ == "__main__":
    processes.load("chunks")
    from chunks import composed, read_all

    count, report = int(sys.argv[1]), Path(sys.argv[2])
    cases = {name: composed(*about) for name, about in json.loads(sys.argv[3]).items()}
    assert processes.can_fork()
    processes.run(read_all, cases, report, count=count)
