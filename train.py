"""Train a model: `python train.py model=mamba seq_len=64k`. `--help` explains the options.

The program is `zoo/cli/train.py`.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before the program takes it up
    from zoo.__main__ import main

    sys.exit(main(["train", *sys.argv[1:]]))
