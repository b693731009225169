"""The run-time type checker of `pytest --shape-checks`: beartype, to which an int is a float.

So is the symbol that stands for an int where torch.compile traces for any length.
"""

import torch
from beartype import BeartypeConf, BeartypeHintOverrides, beartype

ANY_INT = int | torch.SymInt
checked = beartype(
    conf=BeartypeConf(hint_overrides=BeartypeHintOverrides({int: ANY_INT, float: float | ANY_INT}))
)
