"""`zoo training-free FACTOR`: the extensions that a trained rotary model can be read under at once.

A line each, as options of eval.py: `extension=dca`, or `extension=pi extension.factor=8` where the
extension needs a factor. Left out are those that train, search first, or act on other positions.
"""

import math
import sys
from collections.abc import Iterator, Sequence

from zoo.config.compose import compose
from zoo.config.groups import choices
from zoo.errors import UserError
from zoo.model.build import build_model
from zoo.model.extend import extend

TRAINED = 64  # tokens


def training_free(factor: str) -> Iterator[list[str]]:
    """The options of each such extension, in order of their names, `none` last.

    Raises UserError for a factor that no extension takes.
    """
    compose("eval", ["run=none", "extension=pi", f"extension.factor={factor}"])  # refuses a bad one
    train = compose("train", ["model=transformer", "size=tiny", f"seq_len={TRAINED}", "match=none"])
    for name in sorted(choices("extension"), key=lambda name: (name == "none", name)):
        for options in ([f"extension={name}"], [f"extension={name}", f"extension.factor={factor}"]):
            try:
                config = compose("eval", ["run=none", *options])
                extend(build_model(train, vocab_size=8)[0], config.extension, TRAINED)
            except UserError:  # this one is not, or not without a factor
                continue
            yield options
            break


def main(argv: Sequence[str]) -> int:
    """Print the lines. UserError unless `argv` is one number of at least 1."""
    try:
        good = len(argv) == 1 and 1 <= float(argv[0]) < math.inf
    except ValueError:
        good = False
    if not good:
        words = " ".join(argv) or "no factor"
        raise UserError(f"zoo training-free: {words}: must be one factor >= 1, such as 8.")
    for options in training_free(argv[0]):
        sys.stdout.write(" ".join(options) + "\n")
    return 0
