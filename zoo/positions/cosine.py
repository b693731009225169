"""Angles of cosFormer's cosines, and what an extension makes of them (Qin 2022, section 3.3, arXiv
2202.08791).

    a_i = pi i / (2 f M)        i the place of a token, M the reference length, f the factor

Under a factor f the cosine of a text of f M tokens is that of M tokens in training, at distances
that are f times as long: the authors' program, too, takes M from the length of the text at hand.
"""

import math

from jaxtyping import Float, Real
from torch import Tensor

from zoo.errors import refuse


def angles(
    places: Real[Tensor, " t"], reference_length: int, *, factor: float = 1.0
) -> Float[Tensor, " t"]:
    """Return a_i of each place, in float64.

    Args:
        places: of the tokens, from 0 on.
        reference_length: M, in tokens.
        factor: f, at least 1.
    """
    if not factor >= 1:
        refuse("factor", factor, "must be at least 1")
    return math.pi / 2 / (factor * reference_length) * places.double()
