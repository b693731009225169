"""Measure trained runs: `python eval.py run='runs/compare/*'`. `--help` explains the options.

The program is `zoo/cli/eval.py`.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before the program takes it up
    from zoo.__main__ import main

    sys.exit(main(["eval", *sys.argv[1:]]))
